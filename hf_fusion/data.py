"""Labelled examples from wherever they lie: a file, a folder, or a data set on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

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
