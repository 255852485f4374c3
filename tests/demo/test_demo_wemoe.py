"""Four tasks on the digits, the committed fine-tunes, and `hf-fusion demo wemoe` from end to end."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_runs import assert_progress, commits, departures_from_card, printed_lines, run_demo, run_lines
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_fusion import FusionError
from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.digit_tasks import BASE, CELL, TASKS, task_rows
from hf_fusion.evaluation.results import Results
from hf_fusion.server import HubServer

DEMO = ("wemoe",)  # words behind `hf-fusion demo`
FOLDER = demo_weights("vit_experts")
FINE_TUNES = {task: FOLDER / f"{BASE}-{task}" for task in TASKS}


def pixels(image: Image.Image) -> np.ndarray:
    """(28, 28, 3)."""
    return np.asarray(image)


def test_images_are_deterministic_and_independent_of_the_limit():
    for task in TASKS:
        few, more = task_rows(task, "test", 5), task_rows(task, "test", 8)
        assert [pixels(image).tolist() for image in few["image"]] == [pixels(i).tolist() for i in more["image"][:5]]
        assert few["label"] == more["label"][:5]
        assert few[0]["image"].size == (28, 28)


@pytest.mark.slow
def test_no_image_is_in_two_splits():
    seen = [{image.tobytes() for image in task_rows("digit", split)["image"]} for split in ("train", "adapt", "test")]
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert min(map(len, seen)) > 1_000


def test_every_class_is_as_frequent_as_another():
    for task in TASKS:
        counts = Counter(task_rows(task, "test", 800)["label"])
        assert set(counts) == set(range(len(TASKS[task].labels)))
        assert max(counts.values()) < 2 * min(counts.values()), task


def test_image_matches_its_label():
    plain = [pixels(image)[..., 0] for image, _ in picture_pairs("digit", 30)]
    turned = [(255 - pixels(image)[..., 0], label) for image, label in picture_pairs("turned", 30)]
    assert all((np.rot90(whole, label) == own).all() for whole, (own, label) in zip(plain, turned, strict=True))
    paper = np.array([0, 100, 0])
    for image, label in picture_pairs("count", 30):
        cells = [pixels(image)[r : r + CELL, c : c + CELL] for r in (0, 9, 18) for c in (0, 9, 18)]
        assert sum((abs(cell - paper) > 60).any() for cell in cells) == label + 1


def picture_pairs(task: str, limit: int) -> list[tuple[Image.Image, int]]:
    """Test pictures with their classes."""
    rows = task_rows(task, "test", limit)
    return list(zip(rows["image"], rows["label"], strict=True))


def test_unknown_tasks_and_splits_are_named():
    with pytest.raises(FusionError, match="no task 'weight'"):
        task_rows("weight", "test")
    with pytest.raises(FusionError, match="no split 'validation'"):
        task_rows("digit", "validation")


@pytest.mark.parametrize("task", TASKS)
def test_fine_tune_reaches_the_accuracy_of_its_card(task):
    model = AutoModelForImageClassification.from_pretrained(FINE_TUNES[task]).eval()
    assert tuple(model.config.id2label[i] for i in range(model.config.num_labels)) == TASKS[task].labels
    rows = task_rows(task, "test")
    inputs = AutoImageProcessor.from_pretrained(FINE_TUNES[task])(images=list(rows["image"]), return_tensors="pt")
    with torch.inference_mode():
        right = model(**inputs).logits.argmax(-1) == torch.tensor(rows["label"])
    card = ModelCard.load(FINE_TUNES[task] / "README.md")
    said, count = re.search(r"Right on \*\*([\d.]+)%\*\* of ([\d,]+) test pictures", card.content).groups()
    assert float(right.float().mean()) == pytest.approx(float(said) / 100, abs=0.005)
    assert int(count.replace(",", "")) == len(rows)
    assert card.data.base_model == f"demo/{BASE}"
    assert card.data.license == "apache-2.0"


def test_all_of_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 8e6


@pytest.mark.slow
def test_model_exceeds_every_static_merge(folder, ran):
    results = Results.load(folder / "demo" / "merged" / "results.json")
    assert sum(task.n for task in results.tasks) == 1600
    leads = {predictor.name: predictor.lead["held-in"].ci95 for predictor in results.predictors if predictor.lead}
    statics = ("base", "simple average", "task arithmetic", "AdaMerging by layer", "WEMoE, not adapted")
    assert all(leads[name][0] > 0 for name in statics), leads
    summary, said = ran
    measured = summary["measured"]
    assert measured["WEMoE"] == results["WEMoE"].means["held-in"].score
    assert measured["individual experts"] > measured["task arithmetic"] + 0.08
    assert abs(measured["WEMoE, not adapted"] - measured["task arithmetic"]) < 0.02  # routers that still give λ
    assert "WEMoE's lead with its 95 % interval" in said


@pytest.mark.slow
def test_incompatible_experts_are_rejected_with_a_reason(ran):
    reasons = {name.partition("/")[2]: reason for name, reason in ran[0]["rejected"].items()}
    assert reasons["vit-digits-elsewhere"] == "base: was made from demo/vit-letters, not demo/vit-digits"
    shape = "shapes: vit.embeddings.cls_token has shape [1, 1, 64], but [1, 1, 80] in the base"
    assert reasons["vit-digits-smaller"].startswith(shape)
    assert len(reasons) == 2


@pytest.mark.slow
def test_fresh_process_without_hf_fusion_and_peft_gives_equal_outputs(ran):
    summary, said = ran
    assert summary["identical"] is True
    assert re.findall(r"(logits|answers) +identical", said) == ["logits", "answers"]
    assert len(re.findall(r"\?.*\(correct: ", said)) == len(TASKS)


@pytest.mark.slow
def test_results_equal_those_of_the_card(folder, ran):
    assert departures_from_card(folder / "demo" / "merged", "wemoe") == []


@pytest.mark.slow
def test_only_the_steps_are_printed(ran):
    _, said = ran
    assert_progress(said, steps=9)


@pytest.mark.slow
def test_published_repo_survives_a_hub_restart(folder, ran):
    summary, _ = ran
    with HubServer(folder / "demo" / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        info = api.model_info(summary["model"])
        merged = {f"base_model:merge:demo/{path.name}" for path in FINE_TUNES.values()}
        assert {"wemoe", "hf-fusion", "merge", "license:apache-2.0", *merged} <= set(info.tags)
        files = {file.rfilename for file in info.siblings}
        assert {"README.md", "fusion.yaml", "results.json", "coefficients.json", "coefficients.png"} <= files
        card = Path(api.hf_hub_download(summary["model"], "README.md")).read_text(encoding="utf-8")
        assert f'"{summary["revision"]}"' in card
        assert "](coefficients.png)" in card
    with Image.open(summary["picture"]) as picture:
        assert picture.size[0] > 1000


@pytest.mark.slow
def test_second_run_makes_no_commits_and_gives_equal_results(folder, ran):
    first, _ = ran
    before = commits(folder)
    again, said = run_demo(folder, *DEMO)
    assert commits(folder) == before
    assert again == first
    assert said.count("already there") == len(before) - 1  # all but the merged model


@pytest.mark.slow
def test_printed_next_commands_work(folder, ran):
    _, said = ran
    printed = run_lines(printed_lines(said), folder)
    assert "4 of 5 experts are compatible" in printed  # discover; the copy that says it is of another base is not found
    assert "individual experts" in printed  # eval
    assert "'label': " in printed  # the pipeline
