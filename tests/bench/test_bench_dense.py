"""Dense prediction in the benchmark: tiny encoders with BatchNorm, merged, with a separate decoder per task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from standin_data import DATA, rows
from standins import dense
from tiny_suites import store
from transformers import AutoImageProcessor, UperNetForSemanticSegmentation

from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.run import run_suite
from hf_fusion.bench.setups.merging import MergingSetup
from hf_fusion.bench.suite import load_suite
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.task_metrics import score
from hf_fusion.training.adamerging import CoefficientMerge
from hf_fusion.training.fisher import measure_fisher

pytestmark = pytest.mark.long  # each runs whole benchmarks

METRIC = {"segmentation": "mean_iou", "depth": "absolute_error", "normal": "angle"}
TASKS = tuple(METRIC)
LEARNED = "learning without labels needs class predictions; depths and normals are not classes"
ENSEMBLE = "an ensemble combines class logits; depths and normals are not classes"
LEFT = {
    "simple_ensemble": ENSEMBLE,
    "weighted_ensemble": ENSEMBLE,
    "slerp": "SLERP merges exactly 2 models; here there are 3",
    "iso_c": "Iso-C decomposes matrices and averages all other weights; these models have no matrices",
    "tsv_m": "TSV-Merge decomposes matrices and averages all other weights; these models have no matrices",
    "fisher": "Fisher information is measured for one prediction per row; here there is one per pixel",
    "regmean": "RegMean solves for the weights of linear layers; these models have none",
    "regmean_pp": "RegMean solves for the weights of linear layers; these models have none",
    "adamerging_layer": LEARNED,
    "concrete": LEARNED,
    "smile": "WEMoE up-scales MLPs, and found none that it supports in these models",
    "wemoe": "WEMoE up-scales MLPs, and found none that it supports in these models",
}
MEASURED = ["pretrained", "experts", "individual", "average", "weighted_average", "task_arithmetic", "ties", "emr"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """The suite of NYUv2 with folders in the place of its sources."""
    folder = tmp_path_factory.mktemp("nyuv2")
    for number, name in enumerate(("base", *TASKS)):
        dense(f"me/{name}", 40 + number, [], folder / name)
    stored = DATA["tanganke/nyuv2"]["default"]
    store(folder, "nyuv2", {"train": rows(stored, "train"), "test": rows(stored, "val")})
    (folder / "dense.yaml").write_text(
        f"extends: resnet50-nyuv2\nbase: {folder}/base\nexperts: '{folder}/{{task}}'\n"
        "defaults: {data: 'data:nyuv2', fitting: {split: test, share: 0.25}}\n"
    )
    return folder / "dense.yaml"


@pytest.fixture(scope="module")
def cells(suite, tmp_path_factory) -> dict:
    """(method, variant, task, condition) -> cell."""
    options = {"data_dir": suite.parent / "data", "corruptions": ["contrast:5"], "tuned_on": 8}
    found = run_suite(suite, [*MEASURED, *LEFT], output=tmp_path_factory.mktemp("cells"), **options)
    return {(cell.method, cell.variant, cell.task, cell.condition): cell for cell in found}


def test_applicable_methods_are_measured_and_others_give_a_reason(cells):
    assert {key[0]: cell.reason for key, cell in cells.items() if cell.status != "measured"} == LEFT
    measured = {(*key[:2],) for key, cell in cells.items() if cell.status == "measured"}
    names = [name for name in MEASURED if name != "experts"] + [f"expert:{task}" for task in TASKS]
    assert measured == {(name, "default") for name in names} | {("task_arithmetic", "tuned"), ("ties", "tuned")}
    assert all(cell.n == 30 and np.isfinite(cell.score) for cell in cells.values() if cell.status == "measured")
    for task in TASKS:
        clean, corrupted = (cells["average", "default", task, condition].score for condition in ("clean", "contrast:5"))
        assert clean != corrupted


def test_scores_equal_those_of_encoders_averaged_with_batchnorm_statistics(suite, cells):
    """BatchNorm's means and variances are averaged as weights are; what it counts is the base's."""
    folder, own = suite.parent, load_suite(suite)
    models = {name: UperNetForSemanticSegmentation.from_pretrained(folder / name) for name in ("base", *TASKS)}
    encoders = [models[task].backbone.state_dict() for task in TASKS]
    assert not encoders[0]["embedder.embedder.normalization.running_var"].equal(
        encoders[1]["embedder.embedder.normalization.running_var"]
    )
    mean = {
        name: torch.stack([encoder[name] for encoder in encoders]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in models["base"].backbone.state_dict().items()
    }
    processor = AutoImageProcessor.from_pretrained(folder / "base")
    for task in TASKS:
        model, tested = models[task].eval(), task_rows(own, task, folder / "data").test
        model.backbone.load_state_dict(mean)
        with torch.no_grad():
            maps = model(**processor(list(tested["image"]), return_tensors="pt")).logits.movedim(1, -1).numpy()
        labels = np.array(tested["label"])
        if task == "segmentation":
            seen = labels >= 0
            right, given = labels[seen], maps.argmax(-1)[seen]
            want = jaccard_score(right, given, labels=np.union1d(right, given), average="macro")
        else:
            labels = np.moveaxis(labels, 1, -1)
            seen = labels.any(-1)
            if task == "depth":
                errors = np.abs(maps - labels)[..., 0]
            else:
                cosines = (maps * labels).sum(-1) / np.linalg.norm(maps, axis=-1)
                errors = np.degrees(np.arccos(cosines.clip(-1, 1)))
            want = np.mean([row[kept].mean() for row, kept in zip(errors, seen, strict=True)])
        assert cells["average", "default", task, "clean"].score == pytest.approx(want, rel=1e-4)


def test_ensemble_weights_are_relative_to_the_best_score(suite, cells):
    setup = MergingSetup(load_suite(suite), suite.parent / "data", limit=4, tuned_on=8)
    found = {
        task: [score(setup.expert_predictions(own, task, "clean", "fit"), METRIC[task]).score for own in range(3)]
        for task in TASKS
    }
    shares = [[value / max(found["segmentation"]) for value in found["segmentation"]]]
    shares += [[min(found[task]) / value for value in found[task]] for task in ("depth", "normal")]
    weights = cells["weighted_average", "default", "depth", "clean"].parameters["weights"]
    assert list(weights.values()) == pytest.approx(np.mean(shares, axis=0).tolist())


def test_each_expert_keeps_its_decoder(suite):
    folder = suite.parent
    merge = CoefficientMerge([folder / task for task in TASKS], folder / "base", "task")
    pixels = torch.rand(2, 3, 32, 48)
    for task, outputs in zip(TASKS, (13, 1, 3), strict=True):
        own = UperNetForSemanticSegmentation.from_pretrained(folder / task).eval()
        with torch.no_grad(), merge.using(task):
            given, want = merge.dense(task)(pixel_values=pixels).logits, own(pixels).logits
            torch.testing.assert_close(given, want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(merge(task, pixel_values=pixels).logits, want, rtol=1e-4, atol=1e-5)
        assert want.shape[1] == outputs == merge.dense(task).config.num_labels


def test_fisher_refuses_models_of_pixels(suite):
    found = task_rows(load_suite(suite), "segmentation", suite.parent / "data").fit
    with pytest.raises(FusionError, match="SemanticSegmenterOutput has no class logits: only classifiers"):
        measure_fisher(suite.parent / "segmentation", found)


def test_negative_variances_count_as_zero(suite):
    setup = MergingSetup(load_suite(suite), suite.parent / "data", limit=4, tuned_on=4)
    state = {name: tensor - 9 if name.endswith("running_var") else tensor for name, tensor in setup.base.items()}
    assert any(name.endswith("running_var") for name in state)
    assert not any(name.endswith("num_batches_tracked") for name in state)
    answered = setup.predict(setup.dense(state).prepare("depth", "clean", "test"))
    assert np.isfinite(answered.predictions).all()


def test_arrays_become_images(suite):
    found = task_rows(load_suite(suite), "segmentation", suite.parent / "data")
    stored = rows(DATA["tanganke/nyuv2"]["default"], "val")
    arrays = np.array(stored["image"], dtype="float32")
    levels = {(image * 255).round().astype("uint8").transpose(1, 2, 0).tobytes() for image in arrays}
    assert isinstance(found.test[0]["image"], Image.Image)
    own = [{np.asarray(image).tobytes() for image in part["image"]} for part in (found.test, found.fit)]
    assert own[0] | own[1] == levels and not own[0] & own[1]
    label = np.array(found.test[0]["label"])
    assert label.shape == (32, 48) and set(np.unique(label)) == {-1, 2, 7}
    assert found.train is not None and len(found.train) == 40
