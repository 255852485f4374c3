"""The commands on tiny full fine-tunes: fused, routers adapted, measured, and what is wrong said in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import TEXTS, make_tokenizer
from tiny_fused import bert_base, fine_tuned

from hf_fusion.errors import FusionError
from hf_fusion.suite_results import SuiteResults


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, two fine-tunes of it, and rows of their tasks."""
    folder = tmp_path_factory.mktemp("fine-tunes")
    base = bert_base()
    for name, model in [("base", base), ("foxes", fine_tuned(base, 0)), ("dogs", fine_tuned(base, 1))]:
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [
        {"task": ("foxes", "dogs")[i % 2], "text": f"{text} {i}", "label": i % 2} for i in range(8) for text in TEXTS
    ]
    (folder / "rows").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "rows" / "test.parquet")
    Dataset.from_list([{k: v for k, v in row.items() if k != "label"} for row in rows]).to_parquet(
        folder / "rows" / "train.parquet"
    )
    return folder


def fused(here, folders) -> None:
    experts = [str(folders / name) for name in ("foxes", "dogs")]
    here("fuse", "--method", "wemoe", "--experts", *experts, "--base", str(folders / "base"), "--output", "fused")


def test_fuse_fit_and_eval_leave_all_that_a_card_shows(here, folders, tmp_path):
    fused(here, folders)
    words = ("--steps", "4", "--batch-size", "4", "--least-classes", "0", "--diversity", "0.5")
    said = here("fit", "routers", "fused", "--data", str(folders / "rows"), *words)
    assert "effective classes" in said
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["adaptation"] == {
        "loss": "entropy", "diversity": 0.5, "learning_rate": 0.001, "batch_size": 4, "steps": 4,
        "rows": {"foxes": 12, "dogs": 12}, "stopped": None,
    }  # fmt: skip
    assert not list(tmp_path.glob("*checkpoints*"))
    assert not list(tmp_path.glob(".*checkpoints*"))
    here("eval", "fused", "--data", str(folders / "rows"))
    results = SuiteResults.load(tmp_path / "fused" / "results.json")
    assert [(task.name, task.n, task.owner) for task in results.tasks] == [("foxes", 16, "foxes"), ("dogs", 16, "dogs")]
    names = [system.name for system in results.systems]
    assert names == ["WEMoE", "base", "simple average", "task arithmetic", "individual experts"]
    assert results.settings["adaptation"]["steps"] == 4
    found = json.loads((tmp_path / "fused" / "coefficients.json").read_text())
    assert (found["tasks"], found["experts"]) == (["foxes", "dogs"], ["foxes", "dogs"])
    assert (tmp_path / "fused" / "coefficients.png").stat().st_size > 5_000
    assert "deviates" not in said
    labelled = here(
        "fit", "routers", "fused", "--data", str(folders / "rows" / "test.parquet"), "--labels", "--steps", "2",
        "--format", "json",
    )  # fmt: skip
    assert json.loads(labelled)["loss"] == "labels"
    assert not (tmp_path / "fused" / "results.json").exists()  # of other routers


def test_mistakes_are_named(here, folders, tmp_path):
    fused(here, folders)
    data = ("--data", str(folders / "rows" / "test.parquet"))
    for words, message in [
        (("fused", *data, "--labels", "--diversity", "1"), "--labels needs neither"),
        (("fused", *data, "--task-column", "expert"), "no expert"),
        (("fused", *data, "--task-column", "text"), "there is no expert"),
        (("fused", *data, "--steps", "0"), "steps=0 trains nothing"),
    ]:
        with pytest.raises(FusionError, match=message):
            here("fit", "routers", *words)
