"""Labelled examples from wherever they lie: a file, a folder, or a data set on the Hub."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError, one_line
from hf_fusion.io.files import refuse_special
from hf_fusion.progress import phase

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

# end of a file's name -> the reader of `datasets.load_dataset`
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves of several splits, and of one
_LARGE = 5_000_000  # bytes


def load_rows(source: str | Path, split: str = "train") -> Dataset:
    """One split of a data set.

    Args:
        source: a parquet, csv or json file (all of it is read), a folder with one file per split
            (``train.parquet``, ``test.parquet``) or anything else that `datasets` reads, or a data set's id.
        split: which part of a folder or of a Hub data set.

    Returns:
        The rows; a picture that cannot be opened, or is too large, is a FusionError where its row is read.

    Raises:
        FusionError: there is no such file, folder, data set or split.
    """
    path = _located(source, split)
    with phase(f"Reading {source}"):
        from hf_fusion.io.picture_rows import with_pictures

        return with_pictures(_load(source, split, path))


def _load(source: str | Path, split: str, path: Path | None) -> Dataset:
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    if path is not None and path.is_file():
        return load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    if path is not None and any((path / file).is_file() for file in _SAVED):
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, Dataset) else _split(saved, split, str(source))
    try:
        return _split(load_dataset(str(source)), split, str(source))
    except (DatasetNotFoundError, FileNotFoundError):
        raise FusionError(
            f"{source} is no file, no folder with data, and no data set on the Hub",
            "--data FILE.parquet, or a folder with train.parquet and test.parquet, or owner/name",
        ) from None


def _located(source: str | Path, split: str) -> Path | None:
    """The file that holds a split, or the folder that does; None of what only the Hub can tell.

    Raises:
        FusionError: it is on this machine, and cannot be read.
    """
    path = Path(source)
    for file in (path, *path.iterdir()) if path.is_dir() else (path,):
        refuse_special(file)  # nobody waits for a pipe
    if path.is_file():
        if path.suffix not in READERS:
            raise FusionError(f"{path} ends in {path.suffix!r}", f"convert it to one of {', '.join(READERS)}")
        return path
    if path.is_dir():
        found = next((file for suffix in READERS if (file := path / f"{split}{suffix}").is_file()), None)
        others = sorted(file.stem for file in path.iterdir() if file.suffix in READERS and file.is_file())
        if found is None and {"train", "test", "validation"} & {*others}:
            raise FusionError(f"{path} has no split {split!r}", f"--split {others[0]}")
        return found or path
    if path.suffix in READERS or path.is_absolute():
        raise FusionError(f"{path} does not exist", "--data FILE, FOLDER or a data set's id on the Hub")
    return None


def read_columns(source: str | Path, split: str = "train") -> list[str] | None:
    """The columns of what `load_rows` would read, from a file's beginning and without `datasets`, which takes seconds.

    Returns:
        Their names; None where only reading all of it would tell: the Hub's data sets, large files of JSON.

    Raises:
        FusionError: see `load_rows`; or the file cannot be read.
    """
    path = _located(source, split)
    if path is not None and path.is_file():
        try:
            return _COLUMNS[READERS[path.suffix]](path)
        except (OSError, ValueError, StopIteration) as error:  # pyarrow's errors are ValueErrors too
            raise FusionError(f"{path} cannot be read as {READERS[path.suffix]} ({one_line(error)})") from None
    if path is None:
        return None
    if (path / _SAVED[0]).is_file():
        path = path / split
        if not path.is_dir():
            raise FusionError(f"{source} has no split {split!r}", "--split with the name of one of its folders")
    if (path / _SAVED[1]).is_file() and (path / "dataset_info.json").is_file():
        return list(json.loads((path / "dataset_info.json").read_text(encoding="utf-8")).get("features") or ()) or None
    return None


def _parquet_columns(path: Path) -> list[str]:
    from pyarrow import parquet

    return list(parquet.read_schema(path).names)


def _csv_columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file))


def _json_columns(path: Path) -> list[str] | None:
    """Rows need not have the same keys: all are read, of a file that is not large."""
    if path.stat().st_size > _LARGE:
        return None
    text = path.read_text(encoding="utf-8").strip()
    lines = [text] if text.startswith("[") else filter(str.strip, text.splitlines())
    rows = [row for line in lines for row in (json.loads(line) if text.startswith("[") else [json.loads(line)])]
    if not all(isinstance(row, dict) for row in rows):
        return None
    return list(dict.fromkeys(key for row in rows for key in row))


_COLUMNS: dict[str, Callable[[Path], list[str] | None]] = {
    "parquet": _parquet_columns,
    "csv": _csv_columns,
    "json": _json_columns,
}


def _split(splits: DatasetDict, split: str, source: str) -> Dataset:
    if split not in splits:
        raise FusionError(f"{source} has no split {split!r}", f"--split {next(iter(splits), 'train')}")
    return splits[split]


def match_experts_by_name(tasks: Iterable[str], experts: Sequence[str]) -> dict[str, str]:
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
        found = match_experts_by_name(named, experts)
        if named and not found:
            logger.warning(
                "%s is the task of %s, which is not among the experts: it counts as held out", task, named[0]
            )
        elif named:
            owners[task] = found[named[0]]
    return suite, owners
