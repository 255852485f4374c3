"""The splits of a task's rows, and errors about missing data or experts."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from hf_fusion.demo.merging_suites import SUITES, experts_folder, trained_experts
from hf_fusion.errors import FusionError

TEXT, VISION = SUITES["minilm-8"], SUITES["vision-6"]
SHARED = 3  # rows that are both train and test rows


def grey(number: int) -> Pillow.Image:
    return Pillow.fromarray(np.full((4, 4), number, np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets of 43 train and 10 test rows; the last three train rows are test rows as well."""
    folder = tmp_path_factory.mktemp("data")
    columns = {
        "mnist": ("image", Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])}), grey),
        "trec": ("text", Features({"text": Value("string"), "label": ClassLabel(names=["even", "odd"])}), str),
    }
    for task, (column, features, make) in columns.items():
        (folder / task).mkdir()
        for part, numbers in (("train", range(43)), ("test", range(43 - SHARED, 53 - SHARED))):
            rows = {column: [make(number) for number in numbers], "label": [number % 2 for number in numbers]}
            Dataset.from_dict(rows, features=features).to_parquet(folder / task / f"{part}.parquet")
    return folder


def numbers(rows: Dataset) -> list[int]:
    if "text" in rows.column_names:
        return [int(text) for text in rows["text"]]
    return [image.getpixel((0, 0)) for image in rows["image"]]


@pytest.mark.parametrize(("suite", "task"), [(TEXT, "trec"), (VISION, "mnist")], ids=lambda own: str(own)[:4])
def test_train_adapt_and_test_rows_are_disjoint(suite, task, data):
    parts = suite.rows(data, task)
    train, adapt, test = map(numbers, parts)
    assert (len(train), len(adapt)) == (34, 6)
    assert set(train + adapt) == set(range(40))  # each once, but for those that are tested
    assert test == list(range(40, 50))
    for rows, own in zip(parts, (train, adapt, test), strict=True):
        assert rows["label"] == [number % 2 for number in own]
        assert rows.features["label"].names == ["even", "odd"]
    assert numbers(suite.rows(data, task)[0]) == train != sorted(train)


def test_the_digits_come_with_scikit_learn(tmp_path):
    train, adapt, test = VISION.rows(tmp_path, "digits")
    assert len(train) + len(adapt) <= 1797 - len(test)  # scans that are also tested are dropped
    assert len(test) == 449
    pixels = [{np.asarray(image).tobytes() for image in rows["image"]} for rows in (train, adapt, test)]
    assert not pixels[2] & (pixels[0] | pixels[1])
    assert set(test["label"]) == set(range(10))
    image = test[0]["image"]
    assert (image.mode, image.size, np.asarray(image).max()) == ("L", (8, 8), 255)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_missing_tasks_and_data_are_reported(suite, tmp_path):
    with pytest.raises(FusionError, match=f"(?s){suite.name} has no task 'chess'.*{suite.tasks[0]}"):
        suite.rows(tmp_path, "chess")
    with pytest.raises(FusionError, match=f"(?s)no data set '{suite.tasks[0]}'.*train.parquet is missing.*--data DIR"):
        suite.rows(tmp_path, suite.tasks[0])


def test_experts_are_found_or_the_command_that_trains_them_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path))
    assert experts_folder(VISION) == tmp_path / "merging" / "vision-6"
    folder = tmp_path / VISION.name
    for name in ("base", *VISION.tasks[:-1]):
        (folder / name).mkdir(parents=True)
    command = f"examples/train_experts.py --data DIR --suite vision-6 --output {tmp_path}"
    with pytest.raises(FusionError, match=f"(?s)lacks {VISION.tasks[-1]}\n.*{command}"):
        trained_experts(VISION, folder)
    (folder / VISION.tasks[-1]).mkdir()
    base, experts = trained_experts(VISION, folder)
    assert base == folder / "base"
    assert experts == {task: folder / task for task in VISION.tasks}
