"""Pooled rows of a tiny suite: the runner's scores equal those of the ensembles and FoE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import make_tokenizer
from tiny_suites import (
    CLASSES,
    TEST,
    as_recorded,
    check_whole,
    measure,
    save_suite_of_fine_tunes,
    write_suite,
)

from hf_fusion import FoEModel, load_experts
from hf_fusion.bench import run
from hf_fusion.bench.methods import chosen
from hf_fusion.bench.setups.fusion import HIDDEN, FusionSetup
from hf_fusion.bench.suite import load_suite
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble
from hf_fusion.training.fuser import fit_fuser

pytestmark = pytest.mark.long  # each runs whole benchmarks


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory) -> Path:
    """A suite of three full fine-tunes."""
    return save_suite_of_fine_tunes(tmp_path_factory.mktemp("fine_tunes"))


@pytest.fixture(scope="module")
def pooled(fine_tunes, tmp_path_factory) -> Path:
    """The same experts and rows, the task not told."""
    folder = tmp_path_factory.mktemp("pooled")
    tasks = "".join(f"  {task}:\n" for task in CLASSES)
    path = write_suite(folder, "fusion", "sequence-classification", tasks)
    path.write_text(path.read_text().replace(str(folder), str(fine_tunes)))
    return folder


FUSED = ("experts", "individual", "ensemble", "fusion", "uniform")


@pytest.fixture(scope="module")
def fused(pooled, fine_tunes, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("fused")
    return output, measure(pooled, output, *FUSED, data_dir=fine_tunes / "data")


def test_cells_are_as_recorded(fused):
    as_recorded(fused[1], "fusion")


def test_every_fusion_method_has_a_cell_per_task(fused):
    _, cells = fused
    check_whole(cells, chosen(FUSED, "fusion"), list(CLASSES))
    uniform = {cells.pop(("uniform", "default", task, "clean")).reason for task in CLASSES}
    assert uniform == {"routes among adapters of one base; these experts are independent models"}
    assert {cell.status for cell in cells.values()} == {"measured"}
    assert cells["foe", "default", "mood", "clean"].cost == pytest.approx(3, abs=0.1)
    assert 0 < cells["foe_frugal", "default", "mood", "clean"].parameters["asked"] <= 1


def test_ensemble_scores_equal_those_computed_by_hand(fine_tunes, fused):
    _, cells = fused
    experts = load_experts([fine_tunes / task for task in CLASSES])
    union = [label for classes in CLASSES.values() for label in classes]
    for task, classes in CLASSES.items():
        rows = Dataset.from_parquet(str(fine_tunes / "data" / task / "test.parquet"))
        inputs = make_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")
        outputs, start = torch.zeros(len(rows), 3, len(union)), 0
        with torch.no_grad():
            for number, expert in enumerate(experts):
                probabilities = expert.model(**inputs).logits.softmax(-1)
                outputs[:, number, start : start + probabilities.shape[1]] = probabilities
                start += probabilities.shape[1]
        right = torch.tensor([union.index(classes[label]) for label in rows["label"]])
        wanted = {"simple_ensemble": mean_ensemble(outputs), "max_ensemble": max_confidence(outputs)}
        wanted |= {f"expert:{name}": outputs[:, number] for number, name in enumerate(CLASSES)}
        wanted["individual"] = wanted[f"expert:{task}"]
        for method, said in wanted.items():
            value = float((said.argmax(1) == right).float().mean())
            assert cells[method, "default", task, "clean"].score == pytest.approx(value), (method, task)


def test_fuser_scores_equal_the_published_model(fine_tunes, pooled, fused):
    _, cells = fused
    suite = load_suite(pooled / "tiny.yaml")
    fitted_on = FusionSetup(suite, fine_tunes / "data", TEST, 16).fitting(run.everything(suite))
    assert sorted(fitted_on.column_names) == ["expert", "label", "text"] and len(fitted_on) == 3 * 40
    assert len(set(fitted_on["text"])) == len(fitted_on)
    experts = [replace(own, name=task) for task, own in zip(CLASSES, load_experts([fine_tunes / t for t in CLASSES]))]
    ways = {
        "foe": ("output", {}, {}),
        "foe_frugal": ("output", {"frugal": True}, {"budget": 1.0}),
        "foe_selection": ("selection", {}, {}),
    }
    for method, (mode, fit, options) in ways.items():
        model = FoEModel.from_experts(experts, mode=mode, fuser_hidden=HIDDEN[mode])
        fit_fuser(model, fitted_on, seed=0, **fit)
        for task, classes in CLASSES.items():
            rows = Dataset.from_parquet(str(fine_tunes / "data" / task / "test.parquet"))
            with torch.no_grad():
                said = model(**model.processor(text=list(rows["text"])), **options).logits.argmax(1).tolist()
            right = [
                model.config.id2label[own] == classes[label] for own, label in zip(said, rows["label"], strict=True)
            ]
            score = cells[method, "default", task, "clean"].score
            assert score == pytest.approx(sum(right) / len(right)), (method, task)
