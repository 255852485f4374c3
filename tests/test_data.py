"""Rows from files, folders and saved datasets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_fusion import FusionError
from hf_fusion.data import load_rows, read_columns, split_tasks

TRAIN = {"text": ["good", "bad"], "label": [1, 0]}
TEST = {"text": ["fine"], "label": [1]}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
def test_a_file_is_read_whole(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    writer = "json" if suffix == "jsonl" else suffix
    getattr(Dataset.from_dict(TRAIN), f"to_{writer}")(path)
    assert load_rows(path, "any").to_dict() == TRAIN


def test_a_folder_with_a_file_per_split(tmp_path):
    Dataset.from_dict(TRAIN).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict(TEST).to_csv(tmp_path / "test.csv")
    assert load_rows(tmp_path).to_dict() == TRAIN
    assert load_rows(str(tmp_path), "test").to_dict() == TEST


def test_folders_saved_by_datasets_are_loaded(tmp_path):
    splits = DatasetDict({"train": Dataset.from_dict(TRAIN), "test": Dataset.from_dict(TEST)})
    splits.save_to_disk(tmp_path / "both")
    splits["test"].save_to_disk(tmp_path / "one")
    assert load_rows(tmp_path / "both", "test").to_dict() == TEST
    assert load_rows(tmp_path / "one").to_dict() == TEST
    with pytest.raises(FusionError, match="has no split 'dev'"):
        load_rows(tmp_path / "both", "dev")


@pytest.mark.parametrize("name", ["gone.parquet", "folder", "notes.txt"])
def test_missing_or_invalid_data_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(FusionError, match=Path(name).stem) as error:
        load_rows(tmp_path / name)
    assert error.value.hint


def test_a_data_set_on_the_hub(hub, fresh_python):
    token = hub.token("rows")
    code = f"""
from datasets import Dataset
from hf_fusion.data import read_columns, load_rows, split_tasks
Dataset.from_dict({TRAIN}).push_to_hub("rows/words", split="train")
print(load_rows("rows/words").to_dict())
from hf_fusion import FusionError
try:
    load_rows("rows/nothing")
except FusionError as error:
    print(error.message)
"""
    done = fresh_python(code, hub, token=token)
    assert done.stdout.splitlines()[-2:] == [
        str(TRAIN),
        "rows/nothing is not a file, a folder with data, or a data set on the Hub",
    ]


def test_rows_are_split_by_task_and_expert(caplog):
    rows = Dataset.from_dict(
        {
            "task": ["sums", "words", "sums", "riddles"],
            "expert": ["me/adder", "speller", "adder", None],
            "prompt": ["1", "2", "3", "4"],
        }
    )
    suite, owners = split_tasks(rows.select([0, 1, 3]), ["me/adder", "me/speller"])
    assert {task: own["prompt"][:] for task, own in suite.items()} == {"sums": ["1"], "words": ["2"], "riddles": ["4"]}
    assert owners == {"sums": "me/adder", "words": "me/speller"}
    with pytest.raises(FusionError, match="'sums' name several experts: adder, me/adder"):
        split_tasks(rows, ["me/adder", "me/speller"])
    assert split_tasks(rows.select([1]), ["me/adder"])[1] == {}  # of somebody who is not here
    assert "the task words belongs to speller, which is not among the experts" in caplog.text
    suite, owners = split_tasks(rows.select_columns("prompt"), ["me/adder"])
    assert (list(suite), len(suite["all"]), owners) == (["all"], 4, {})


@pytest.mark.parametrize("name", ["train.csv", "train.parquet", "rows.jsonl"])
@pytest.mark.parametrize("read", [load_rows, read_columns])
def test_pipe_is_refused_at_once(read, name, tmp_path):
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(FusionError, match=f"{name} is a pipe, not a file"):
            read(source)
