"""Labelled examples from wherever they lie: a file, a folder, or a data set on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

# end of a file's name -> the reader of `datasets.load_dataset`
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_rows(source: str | Path, split: str = "train") -> Dataset:
    """One split of a data set.

    Args:
        source: a parquet, csv or json file (all of it is read), a folder with one file per split
            (``train.parquet``, ``test.parquet``) or anything else that `datasets` reads, or a data set's id.
        split: which part of a folder or of a Hub data set.

    Raises:
        FusionError: there is no such file, folder, data set or split.
    """
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    path = Path(source)
    if path.is_file():
        reader = READERS.get(path.suffix)
        if reader is None:
            raise FusionError(f"{path} ends in {path.suffix!r}", f"convert it to one of {', '.join(READERS)}")
        return load_dataset(reader, data_files=str(path), split="train")
    if path.is_dir():
        files = [file for suffix in READERS if (file := path / f"{split}{suffix}").is_file()]
        if files:
            return load_rows(files[0])
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = load_from_disk(str(path))
            return saved if isinstance(saved, Dataset) else _split(saved, split, str(source))
    elif "." in path.name and not path.exists() and (path.suffix in READERS or path.is_absolute()):
        raise FusionError(f"{path} does not exist", "--data FILE, FOLDER or a data set's id on the Hub")
    try:
        return _split(load_dataset(str(source)), split, str(source))
    except (DatasetNotFoundError, FileNotFoundError):
        raise FusionError(
            f"{source} is no file, no folder with data, and no data set on the Hub",
            "--data FILE.parquet, or a folder with train.parquet and test.parquet, or owner/name",
        ) from None


def _split(splits: DatasetDict, split: str, source: str) -> Dataset:
    if split not in splits:
        raise FusionError(f"{source} has no split {split!r}", f"--split {next(iter(splits), 'train')}")
    return splits[split]


def owners_by_name(tasks: Iterable[str], experts: Sequence[str]) -> dict[str, str]:
    """Task → expert, for the tasks that bear an expert's name: ``owner/name``, or ``name`` alone."""
    known = {name: expert for expert in experts for name in (expert.rpartition("/")[2], expert)}
    return {task: known[task] for task in tasks if task in known}


def split_tasks(
    rows: Dataset, experts: Sequence[str], task_column: str = "task", expert_column: str = "expert"
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Rows of several tasks, apart.

    Args:
        rows: with a column that names the task of each; without one they are all one task.
        experts: names of the experts, ``owner/name`` or ``name``.
        task_column: names the task.
        expert_column: names the expert that was trained on the task, by ``owner/name`` or ``name``; empty, or missing
            altogether, where there is none.

    Returns:
        Task → its rows, in the order of their first ones; and task → its expert, for the tasks that have one.

    Raises:
        FusionError: rows of one task name several experts.
    """
    if task_column not in rows.column_names:
        rows = rows.add_column(task_column, ["all"] * len(rows))
    tasks = list(rows[task_column])
    places = {task: [i for i, other in enumerate(tasks) if other == task] for task in dict.fromkeys(tasks)}
    suite = {str(task): rows.select(own) for task, own in places.items()}
    if expert_column not in rows.column_names:
        return suite, {}
    owners: dict[str, str] = {}
    for task, own in suite.items():
        named = sorted({name for name in own[expert_column] if name})
        if len(named) > 1:
            raise FusionError(f"rows of the task {task!r} name several experts: {', '.join(named)}")
        found = owners_by_name(named, experts)
        if named and not found:
            logger.warning(
                "%s is the task of %s, which is not among the experts: it counts as held out", task, named[0]
            )
        elif named:
            owners[task] = found[named[0]]
    return suite, owners
