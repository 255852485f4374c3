"""Suites of tiny models for tests of the benchmark's runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from tiny import bert, make_tokenizer, names
from tiny_fused import fine_tuned

from hf_fusion.bench.cells import Cell
from hf_fusion.bench.methods import METHODS
from hf_fusion.bench.run import run_suite

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "experts",
    "are",
    "fused",
    "into",
    "one",
    "model",
    "router",
    "gate",
    "stitch",
    "time",
]
CLASSES = {"mood": ["sad", "glad"], "topic": ["art", "law", "war"], "kind": ["ask", "say"]}
TEST = 24
HEAD = ("classifier", "bert.pooler")  # of every expert its own: they have changed the pooler too


def texts(count: int, seed: int) -> list[str]:
    """Different texts."""
    generator, found = torch.Generator().manual_seed(seed), {}
    while len(found) < count:
        picked = torch.randint(len(WORDS), (5,), generator=generator)
        found[" ".join(WORDS[word] for word in picked)] = None
    return list(found)


def labelled(given: list, said: list[int], classes: list[str], column: str, seed: int) -> Dataset:
    """Rows of which an expert is right on about three quarters."""
    wrong = torch.rand(len(said), generator=torch.Generator().manual_seed(seed)) < 0.25
    labels = [(own + int(off)) % len(classes) for own, off in zip(said, wrong, strict=True)]
    features = Features({column: Value("string") if column == "text" else Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({column: given, "label": labels}, features=features)


def store(folder: Path, task: str, parts: dict[str, Dataset]) -> None:
    (folder / "data" / task).mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        rows.to_parquet(folder / "data" / task / f"{part}.parquet")


def write_suite(folder: Path, kind: str, head: str, tasks: str, more: str = "", name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"title: Tiny\nkind: {kind}\nhead: {head}\nbase: {folder}/base\nexperts: '{folder}/{{task}}'\n{more}"
        f"defaults: {{data: 'data:{{task}}', fitting: {{split: train, share: 0.5}}}}\ntasks:\n{tasks}"
    )
    return path


def save_suite_of_fine_tunes(folder: Path) -> Path:
    """A classifier of texts, three full fine-tunes of it with heads of their own, and what they are about."""
    base = bert(["x", "y"])
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, (task, classes) in enumerate(CLASSES.items()):
        model = fine_tuned(base, seed, scale=0.8)
        torch.manual_seed(seed)
        model.classifier = torch.nn.Linear(32, len(classes))
        model.config.update(names(classes))
        model.num_labels = len(classes)
        model.save_pretrained(folder / task)
        make_tokenizer().save_pretrained(folder / task)
        parts = {}
        for part, count, own in (("train", 80, 100 + seed), ("test", TEST, 200 + seed)):
            given = texts(count, own)
            with torch.no_grad():
                inputs = make_tokenizer()(given, padding=True, return_tensors="pt")
                parts[part] = labelled(given, model(**inputs).logits.argmax(1).tolist(), classes, "text", own)
        store(folder, task, parts)
    unseen = "unseen:\n  last: {fuse: [mood, topic], test: [kind]}\n"
    write_suite(folder, "merging", "sequence-classification", "".join(f"  {task}:\n" for task in CLASSES), unseen)
    return folder


def measure(folder: Path, output: Path, *methods: str, **options) -> dict[tuple[str, str, str, str], Cell]:
    """(method, variant, task, condition) → cell."""
    options = {"limit": TEST, "tuned_on": 16, "data_dir": folder / "data", **options}
    cells = run_suite(folder / "tiny.yaml", methods, output=output, **options)
    return {(cell.method, cell.variant, cell.task, cell.condition): cell for cell in cells}


def scores(cells: dict) -> dict:
    return {key: (cell.status, cell.score, cell.ci95, cell.n) for key, cell in cells.items()}


GOLDEN = Path(__file__).parents[1] / "evaluation" / "golden"


def as_recorded(cells: dict, name: str) -> None:
    """Every cell of a run has the status and the score that were recorded once.

    Args:
        cells: as `measure` returns them.
        name: of the record, a file ``bench-NAME.json`` of `GOLDEN`; to record again, delete it and run the test.
    """
    found = {"/".join(key): [cell.status, cell.n, cell.score, *(cell.ci95 or ())] for key, cell in cells.items()}
    file = GOLDEN / f"bench-{name}.json"
    if not file.exists():
        file.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
        pytest.fail(f"{file} was not there, and is now")
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert list(found) == list(recorded)
    for key, (status, *numbers) in recorded.items():
        assert found[key] == [status, *(number and pytest.approx(number, rel=1e-5) for number in numbers)], key


def check_whole(cells: dict, wanted: list[str], tasks: list[str]) -> None:
    """Every method has a cell for each task and variant, and it is measured or says why not."""
    experts = [f"expert:{task}" for task in tasks if f"expert:{task}" in {key[0] for key in cells}]
    for method in wanted:
        for name in experts if method == "experts" else [method]:
            variants = ("default", "tuned") if METHODS[method].tune else ("default",)
            for variant in variants:
                for task in tasks:
                    cell = cells[name, variant, task, "clean"]
                    assert cell.status != "failed", f"{name}: {cell.reason}"
                    assert (cell.score is None) == (cell.status == "left out") == bool(cell.reason)
                    if cell.score is not None:
                        low, high = cell.ci95
                        assert 0 <= low <= cell.score + 1e-9 and cell.score - 1e-9 <= high <= 1 and cell.n == TEST
                        assert cell.stored >= cell.active > 0 and cell.cost > 0 and cell.seconds > 0
                        if cell.rows is not None:
                            assert len(cell.rows) == cell.n and abs(sum(cell.rows) / cell.n - cell.score) < 1e-9
                        assert cell.shas and cell.versions["hf_fusion"] and cell.machine
    assert {key[0] for key in cells} == {name for m in wanted for name in (experts if m == "experts" else [m])}
