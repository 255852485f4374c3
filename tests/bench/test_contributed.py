"""The suite and the method in CONTRIBUTING, measured by the command that it gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny import make_tokenizer
from tiny_fused import bert_base, fine_tuned

from hf_fusion.bench.cells import read_cells
from hf_fusion.bench.methods import METHODS
from hf_fusion.cli.app import main

SECTION = re.search(
    r"## The benchmark: a data set, a method\n(.*?)\n## ",
    (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(),
    re.S,
)
LABELS = {"mood": ["sad", "glad"], "topic": ["art", "law"]}
WORDS = ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "said", "gate"]


def rows(task: str, count: int, start: int) -> Dataset:
    """Texts of words by number, so that none comes twice."""
    texts = [" ".join(WORDS[(n // 11**k) % 11] for k in range(4)) for n in range(start, start + count)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS[task])})
    return Dataset.from_dict({"text": texts, "label": [n % 2 for n in range(count)]}, features=features)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the two files, the models and the data sets that they name."""
    monkeypatch.chdir(tmp_path)
    text = SECTION[1]
    for language, name in (("yaml", "reviews.yaml"), ("python", "half.py")):
        content = re.search(rf"```{language}\n(# {name}\n.*?)```", text, re.S)[1]
        (tmp_path / name).write_text(content)
    tokenizer = make_tokenizer()
    base = bert_base()
    for name, labels in ({"base": None} | LABELS).items():
        model = base if labels is None else fine_tuned(base, seed=len(name), scale=0.6)
        if labels:
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {label: number for number, label in enumerate(labels)}
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for task in LABELS:
        (tmp_path / "DIR" / task).mkdir(parents=True)
        for part, count, start in (("train", 60, 1000), ("test", 20, 0)):
            rows(task, count, start).to_parquet(tmp_path / "DIR" / task / f"{part}.parquet")
    yield tmp_path
    METHODS.pop("halves", None)


@pytest.mark.long
def test_suite_and_method_are_measured(place, capsys):
    for line in re.findall(r"^    (hf-fusion .*)$", SECTION[1], re.M):
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    cells = {(cell.method, cell.variant, cell.task): cell for cell in read_cells("results") if cell.score is not None}
    assert set(cells) == {
        (method, variant, task)
        for task in LABELS
        for method, variant in [
            ("halves", "default"), ("halves", "tuned"), ("average", "default"), ("individual", "default"),
        ]
    }  # fmt: skip
    assert {cell.metric for cell in cells.values() if cell.task == "topic"} == {"f1"}
    assert (place / "results-report" / "report.md").is_file()
    # two experts: half of each task vector is the average
    for task in LABELS:
        assert cells["halves", "default", task].score == cells["average", "default", task].score
        assert cells["halves", "default", task].parameters == {"scaling": 0.5}
