"""`Results` of all families: saving, loading, also of both earlier formats, comparing and printing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_fusion import FusionError
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results

ROOT = Path(__file__).parents[2]
CELL = {"score": 0.5, "ci95": [0.25, 0.75]}
POOLED = {
    "dataset": {"name": "digits", "type": "digits", "split": "validation"},
    "n": 9,
    "metric": "mse",
    "systems": [
        {"name": "FoE", "kind": "foe", **CELL, "cost": 1.0},
        {"name": "FoE, frugal", "kind": "frugal", **CELL, "cost": 0.5},
        {"name": "me/a", "kind": "expert", "score": 2, "ci95": [1, 3], "cost": 0.25},
        {"name": "me/b", "kind": "expert", "score": 1.5, "ci95": [1, 3], "cost": 0.25},
    ],
    "selection_accuracy": 0.75,
    "curve": [{"cost_weight": 0.1, **CELL, "cost": 0.5}],
    "command": "hf-fusion eval fused --data digits",
    "machine": "x86_64",
}
SUITE = {
    "tasks": [
        {"name": "a", "metric": "exact", "n": 9, "owner": "me/a"},
        {"name": "b", "metric": "tokens", "n": 5, "owner": None},
    ],
    "systems": [
        {"name": "WEMoE", "kind": "router", "scores": {"a": CELL, "b": CELL}, "means": {"held-in": CELL}, "lead": {}},
        {"name": "merged", "kind": "merged", "scores": {"a": CELL}, "means": {}, "lead": {"held-in": CELL}},
    ],
    "settings": {"top_k": 2},
    "command": "pytest",
    "machine": "x86_64",
}


def test_results_of_a_fusion_of_experts_in_their_earlier_form_are_read():
    results = Results.from_dict(POOLED)
    assert results.tasks == [MeasuredTask("digits", "mse", 9, split="validation", pooled=True)]
    assert results.predictors[:2] == [
        PredictorScores("FoE", "fused", {"digits": Score(0.5, (0.25, 0.75))}, cost=1.0),
        PredictorScores("FoE, frugal", "frugal", {"digits": Score(0.5, (0.25, 0.75))}, cost=0.5),
    ]
    assert (results.selection_accuracy, results.curve) == (0.75, POOLED["curve"])
    assert (results.command, results.machine) == (POOLED["command"], "x86_64")
    assert results.best("expert").name == "me/b"  # of errors the smallest is the best
    assert results.table()[2] == {"predictor": "me/a", "mse": "    2", "95 % interval": "1 – 3", "cost": " 25%"}


def test_results_of_a_suite_in_their_earlier_form_are_read():
    results = Results.from_dict(SUITE)
    score = Score(0.5, (0.25, 0.75))
    assert results.tasks == [MeasuredTask("a", "exact", 9, "me/a"), MeasuredTask("b", "tokens", 5)]
    assert results.predictors == [
        PredictorScores("WEMoE", "fused", {"a": score, "b": score}, {"held-in": score}),
        PredictorScores("merged", "fused", {"a": score}, {}, {"held-in": score}),
    ]
    assert results.settings == {"top_k": 2} and results.command == "pytest"
    assert [(task.name, task.group) for task in results.tasks] == [("a", "held-in"), ("b", "held-out")]


@pytest.mark.parametrize("content", [POOLED, SUITE], ids=["pooled", "suite"])
def test_results_round_trip_through_a_file(content, tmp_path):
    results = Results.from_dict(content)
    results.save(tmp_path / "results.json")
    assert "systems" not in json.loads((tmp_path / "results.json").read_text())
    assert Results.load(tmp_path / "results.json") == results


def committed() -> list[Path]:
    files = [ROOT / "docs" / "results.json", *(ROOT / "model_cards").glob("*.json")]
    return files + sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.json"))


def test_every_committed_measurement_is_read():
    """All that has the fields of results, whatever else the file holds, with the scores that stand in it."""
    found = 0
    for file in committed():
        content = json.loads(file.read_text(encoding="utf-8"))
        for one in content.get("runs", [content.get("results") or content]):
            rows = one.get("systems") or one.get("predictors")
            if not rows:
                continue
            results = Results.from_dict(one, str(file))
            found += 1
            for row, predictor in zip(rows, results.predictors, strict=True):
                cells = row.get("scores", {results.tasks[0].name: row})
                assert predictor.cost == row.get("cost") and cells.keys() == predictor.scores.keys()
                for task, score in predictor.scores.items():
                    assert [score.score, *score.ci95] == [cells[task]["score"], *cells[task]["ci95"]]
    assert found >= 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "x.json: tasks is missing"),
        ({"tasks": [{"name": "a"}], "predictors": []}, r"tasks\[0\].metric is missing"),
        ({"tasks": [], "predictors": [{"name": "a", "kind": "fused", "scores": {"t": 1}}]}, r"scores.t is 1, expected"),
        ({**POOLED, "n": None}, r"tasks\[0\].n is None, expected a whole number"),
        ({**POOLED, "dataset": {}}, r"tasks\[0\].name is None, expected a string"),
        ({**POOLED, "systems": [{"name": "FoE"}]}, r"predictors\[0\].kind is None, expected a string"),
        ({**POOLED, "systems": [7]}, "x.json cannot be read"),
        ({**SUITE, "systems": None}, "x.json cannot be read"),
        ({**SUITE, "systems": [{**SUITE["systems"][0], "means": {"held-in": {"score": "high"}}}]}, "score is 'high'"),
    ],
)
def test_missing_or_mistyped_fields_are_named(content, message):
    with pytest.raises(FusionError, match=message) as error:
        Results.from_dict(content, "x.json")
    assert error.value.hint or "expected" in str(error.value)


def test_a_file_that_holds_no_results_is_named(tmp_path):
    (tmp_path / "results.json").write_text("[1")
    with pytest.raises(FusionError, match="results.json cannot be read"):
        Results.load(tmp_path / "results.json")


def test_only_a_single_task_has_an_only_score():
    with pytest.raises(ValueError, match="too many"):
        _ = Results.from_dict(SUITE)["WEMoE"].only_score
