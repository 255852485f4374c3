"""`hf-fusion demo` from end to end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from demo_runs import assert_progress, commits, departures_from_card, printed_lines, run_demo, run_lines
from huggingface_hub import HfApi
from PIL import Image

from hf_fusion.evaluation.results import Results
from hf_fusion.server import HubServer

DEMO = ()  # words behind `hf-fusion demo`
pytestmark = pytest.mark.slow  # what it trains, README's eight lines train in the timed suite


@pytest.fixture(scope="module")
def results(folder, ran) -> Results:
    """What it measured."""
    return Results.load(folder / "demo" / "foe-digits" / "results.json")


def test_foe_beats_the_best_expert_by_ten_points_and_the_mean_ensemble_by_three(results):
    assert results.tasks[0].n >= 1000
    score = {p.name: p.only_score.score for p in results.predictors}
    assert results.best("fused").only_score.score >= results.best("expert").only_score.score + 0.10
    assert score["FoE"] >= score["mean ensemble"] + 0.03
    assert score["FoE"] > score["max confidence"]
    assert score["oracle expert"] >= score["FoE"]
    assert all(s.ci95[0] <= s.score <= s.ci95[1] for s in (p.only_score for p in results.predictors))


def test_results_equal_those_of_the_card(folder, ran):
    assert departures_from_card(folder / "demo" / "foe-digits", "foe") == []


def test_frugal_foe_is_within_a_point_at_half_the_cost(results):
    frugal = results.best("frugal")
    assert frugal.only_score.score >= results.best("fused").only_score.score - 0.01
    assert frugal.cost <= 0.5


def test_experts_are_accepted_and_rejected_each_for_its_reason(ran, results):
    assert sum(p.kind == "expert" for p in results.predictors) >= 6
    summary, said = ran
    kinds = {name.partition("/")[2]: reason.partition(":")[0] for name, reason in summary["rejected"].items()}
    assert kinds == {
        "regnet-closed-loops": "labels",
        "vit-tiny-pickle": "pickle",
        "vit-tiny-voting": "custom code",
        "swin-scans-gated": "gated",
        "convnextv2-digits-wide": "shapes",
    }
    assert "left out: demo/regnet-lookalikes-nan has NaN or Inf in classifier.1.weight" in said


def test_fresh_process_without_hf_fusion_gives_equal_outputs(ran):
    summary, said = ran
    assert summary["identical"] is True
    assert re.findall(r"(Auto\w+)\.from_pretrained: logits +identical", said) == [
        "AutoModel",
        "AutoModelForImageClassification",
    ]
    assert re.search(r"pipeline: labels +identical", said)


def test_only_the_steps_are_printed(ran):
    _, said = ran
    assert_progress(said, steps=7)


def test_published_repo_survives_a_hub_restart(folder, ran):
    summary, _ = ran
    with HubServer(folder / "demo" / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        info = api.model_info(summary["model"])
        assert {"foe", "hf-fusion", "merge", "license:apache-2.0", "base_model:demo/vit-mnist-low"} <= set(info.tags)
        files = {file.rfilename for file in info.siblings}
        assert {"README.md", "fusion.yaml", "results.json", "accuracy-cost.png", "model.safetensors"} <= files
        card = Path(api.hf_hub_download(summary["model"], "README.md")).read_text(encoding="utf-8")
        assert f'"{summary["revision"]}"' in card
        assert re.search(r"1,?597 rows", card)
    with Image.open(summary["plot"]) as picture:
        assert picture.size[0] > 1000


def test_second_run_makes_no_commits_and_gives_equal_results(folder, ran):
    first, _ = ran
    before = commits(folder)
    again, said = run_demo(folder, *DEMO)
    assert commits(folder) == before
    assert again == first
    assert said.count("already there") == len(before) - 1


def test_printed_next_commands_work(folder, ran):
    _, said = ran
    printed = run_lines(printed_lines(said), folder)
    assert "FoE, frugal" in printed  # eval
    assert "demo/vit-tiny-digits" in printed  # discover
    assert "'score': " in printed  # the pipeline


def test_quickstart_commands_work_after_the_demo(folder, ran):
    quickstart = (Path(__file__).parents[2] / "docs/quickstart.md").read_text(encoding="utf-8")
    demo, *lines = re.search(r"^```sh\n(.*?)^```", quickstart, re.MULTILINE | re.DOTALL)[1].splitlines()
    assert demo == "hf-fusion demo"
    printed = run_lines(lines, folder)
    assert "swin-scans-low" in printed
    assert "accuracy on 1597 examples" in printed
    assert "Published" in printed
