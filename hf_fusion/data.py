"""Loads data sets from files, folders or the Hub, and splits them by task."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError, listed, one_line, path_suggestion, suggestion
from hf_fusion.io.files import refuse_special
from hf_fusion.progress import phase

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

# suffix -> the builder of `datasets.load_dataset`
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_SAVED = ("dataset_dict.json", "state.json")  # files written by save_to_disk for several splits, and for one
_LARGE = 5_000_000  # bytes


def load_rows(source: str | Path, split: str = "train") -> Dataset:
    """One split of a data set.

    Args:
        source: a Parquet, CSV or JSON file (read in full), a folder with one file per split (``train.parquet``,
            ``test.parquet``) or anything else that `datasets` reads, or the id of a data set on the Hub.
        split: which split of a folder or of a data set on the Hub.

    Returns:
        The rows. Reading a row whose image is invalid or too large raises a FusionError.

    Raises:
        FusionError: the file, folder, data set or split does not exist.
    """
    path = _find_local(source, split)
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
            f"{source} is not a file, a folder with data, or a data set on the Hub",
            path_suggestion(
                source, "--data FILE.parquet, or a folder with train.parquet and test.parquet, or owner/name"
            ),
        ) from None


def _find_local(source: str | Path, split: str) -> Path | None:
    """The file or folder that contains a split; None for a data set on the Hub.

    Raises:
        FusionError: a local file or folder cannot be read.
    """
    path = Path(source)
    for file in (path, *path.iterdir()) if path.is_dir() else (path,):
        refuse_special(file)  # reading a pipe would block
    if path.is_file():
        if path.suffix not in READERS:
            raise FusionError(
                f"{path} ends in {path.suffix!r}, which cannot be read", f"convert it: {listed([*READERS])} can be read"
            )
        return path
    if path.is_dir():
        found = next((file for suffix in READERS if (file := path / f"{split}{suffix}").is_file()), None)
        others = sorted(file.stem for file in path.iterdir() if file.suffix in READERS and file.is_file())
        if found is None and {"train", "test", "validation"} & {*others}:
            raise FusionError(f"{path} has no split {split!r}", suggestion(split, others))
        return found or path
    if path.suffix in READERS or path.is_absolute():
        raise FusionError(
            f"{path} does not exist", path_suggestion(path, "--data FILE, FOLDER or the id of a data set on the Hub")
        )
    return None


def read_columns(source: str | Path, split: str = "train") -> list[str] | None:
    """The columns of a data set, without reading all of it or importing `datasets`, which takes seconds.

    Returns:
        Their names; None if only reading everything would show them: for data sets on the Hub and large JSON files.

    Raises:
        FusionError: see `load_rows`; or the file cannot be read.
    """
    path = _find_local(source, split)
    if path is not None and path.is_file():
        try:
            return _COLUMNS[READERS[path.suffix]](path)
        except (OSError, ValueError, StopIteration) as error:  # pyarrow's errors are ValueErrors too
            what = f"{path} cannot be read as {READERS[path.suffix]} ({one_line(error)})"
            raise FusionError(what, "check its content") from None
    if path is None:
        return None
    if (path / _SAVED[0]).is_file():
        path = path / split
        if not path.is_dir():
            folders = [each.name for each in Path(source).iterdir() if each.is_dir()]
            raise FusionError(f"{source} has no split {split!r}", suggestion(split, folders))
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
    """The keys of all rows, which may differ; None for a large file."""
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
        raise FusionError(f"{source} has no split {split!r}", suggestion(split, map(str, splits)))
    return splits[split]


def row_contents(rows: Dataset) -> list[Hashable]:
    """What is read of every row: the image's file, its texts, or its prompt; equal for rows that only differ elsewhere.

    Args:
        rows: with the columns ``image``, or ``text``, ``text_pair``, ``prompt`` and ``choices``, as far as it has them.
    """
    from datasets import Image

    if "image" in rows.column_names:
        return [image["bytes"] or image["path"] for image in rows.cast_column("image", Image(decode=False))["image"]]
    read = ("text", "text_pair", "prompt", "choices")  # some prompts ask for nothing but the choice
    columns = [rows[name] for name in read if name in rows.column_names]
    return [
        tuple(tuple(value) if isinstance(value, list) else value for value in row) for row in zip(*columns, strict=True)
    ]


def match_experts_by_name(tasks: Iterable[str], experts: Sequence[str]) -> dict[str, str]:
    """Task → expert, for tasks that have the name of an expert, with or without its owner."""
    known = {name: expert for expert in experts for name in (expert.rpartition("/")[2], expert)}
    return {task: known[task] for task in tasks if task in known}


def split_tasks(
    rows: Dataset, experts: Sequence[str], task_column: str = "task", expert_column: str = "expert"
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Splits rows by task.

    Args:
        rows: with a column that names the task; without it, all rows are one task.
        experts: names of the experts, ``owner/name`` or ``name``; empty if it does not matter whose the tasks are.
        task_column: column with the task of each row.
        expert_column: column with the expert that was trained on the task, ``owner/name`` or ``name``; may be empty or
            missing.

    Returns:
        Task → its rows, in order of first occurrence; and task → its expert, for tasks that have one.

    Raises:
        FusionError: rows of one task name several experts.
    """
    if task_column not in rows.column_names:
        rows = rows.add_column(task_column, ["all"] * len(rows))
    tasks = list(rows[task_column])
    indices = {task: [i for i, other in enumerate(tasks) if other == task] for task in dict.fromkeys(tasks)}
    suite = {str(task): rows.select(selected) for task, selected in indices.items()}
    if expert_column not in rows.column_names:
        return suite, {}
    owners: dict[str, str] = {}
    for task, task_rows in suite.items():
        named = sorted({name for name in task_rows[expert_column] if name})
        if len(named) > 1:
            what = f"rows of the task {task!r} name several experts: {', '.join(named)}"
            raise FusionError(what, f"name one expert per task in the column {expert_column}")
        found = match_experts_by_name(named, experts)
        if found:
            owners[task] = found[named[0]]
        elif named and experts:
            logger.warning(
                "the task %s belongs to %s, which is not among the experts, so it counts as held out", task, named[0]
            )
    return suite, owners
