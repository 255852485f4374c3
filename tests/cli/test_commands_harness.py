"""`hf-fusion eval --harness`: results, card and leaderboard of a merge, on tasks with local rows."""

from __future__ import annotations

import json

import pytest
import yaml
from harness_world import save_models, save_tasks

from hf_fusion import Recipe, RecipeExpert, merge
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.long


def test_scores_go_into_results_card_and_leaderboard(here, tmp_path):
    save_tasks(tmp_path / "tasks", 6)
    save_models(tmp_path)
    pair = tuple(RecipeExpert(str(tmp_path / name)) for name in ("foxes", "dogs"))
    merge(Recipe("ties", pair, str(tmp_path / "base")), tmp_path / "merged")
    scored = [PredictorScores("merged", "fused", {"mood": Score(0.5, (0.4, 0.6))})]
    Results([MeasuredTask("mood", "exact", 90)], scored, command="of rows").save(tmp_path / "merged/results.json")
    words = ("eval", "merged", "--harness", "tasks/which.yaml,tasks/says.yaml", "--limit", "5", "--compare")
    shown = here(*words)
    assert all(word in shown for word in ("which", "says", "acc_norm", "exact_match", "foxes", "dogs", "base", "±"))
    results = Results.load(tmp_path / "merged/results.json")
    assert (results.command, results["merged"].only_score.score) == ("of rows", 0.5)  # still there
    [run] = results.harness
    assert run.command == (
        "hf-fusion eval merged --harness tasks/which.yaml --harness tasks/says.yaml --limit 5 --compare"
    )

    card = (tmp_path / "merged/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    rows = {
        (row["dataset"]["name"], metric["type"]): (row, metric)
        for row in metadata["model-index"][0]["results"]
        for metric in row["metrics"]
    }
    acc = next(score for score in run.scores if (score.predictor, score.metric) == ("merged", "acc"))
    row, metric = rows["which", "acc"]
    assert metric["value"] == round(acc.score, 4)
    assert metric["args"] == {"stderr": round(acc.stderr, 4)}
    assert row["dataset"]["args"] == {"num_few_shot": 0, "n": 5}
    assert row["source"]["url"].endswith("lm-evaluation-harness")
    assert {("which", "acc_norm"), ("says", "exact_match"), ("mood", "exact_match")} <= rows.keys()
    assert f"| which | acc | 0 | 5 | {acc} |" in card
    assert "| task | metric | shots | n | this model | foxes | dogs | base |" in card

    here("bench", "report", "merged", "--output", "report")
    [suite] = json.loads((tmp_path / "report/leaderboard.json").read_text())["suites"]
    assert suite["name"] == "lm-eval, first 5"
    by_method = {row["method"]: row for row in suite["rows"]}
    assert by_method.keys() == {"ties", "expert:foxes", "expert:dogs", "pretrained"}
    cell = by_method["ties"]["scores"]["clean"]["which, acc"]
    assert (cell["score"], cell["n"]) == (acc.score, 5)
    assert cell["ci95"] == pytest.approx([acc.score - 1.96 * acc.stderr, acc.score + 1.96 * acc.stderr], abs=1e-4)

    again = json.loads(here("eval", "merged", "--harness", "tasks/says.yaml", "--format", "json"))
    assert [score["task"] for score in again["harness"][0]["scores"]] == ["says"]
    kept = Results.load(tmp_path / "merged/results.json").harness
    assert [{score.task for score in run.scores} for run in kept] == [{"which"}, {"says"}]
