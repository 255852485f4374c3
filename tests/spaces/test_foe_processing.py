"""The FoE Space's data: images in MNIST's format, a model's trace and results as plain data."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def processing(space_modules):
    return space_modules("foe", "processing")[0]


def drawing(ground: int, ink: int, shift: int = 0, size: int = 200, mode: str = "L") -> Image.Image:
    """A seven of straight lines."""
    picture = Image.new("L", (size, size), ground)
    points = [(60 + shift, 50 + shift), (130 + shift, 50 + shift), (80 + shift, 150 + shift)]
    ImageDraw.Draw(picture).line(points, fill=ink, width=14)
    return picture.convert(mode)


def centre(picture: Image.Image) -> tuple[float, float]:
    ink = np.asarray(picture, dtype=float)
    steps = np.arange(28) + 0.5
    return float(ink.sum(1) @ steps / ink.sum()), float(ink.sum(0) @ steps / ink.sum())


def test_drawings_take_the_form_of_mnist(processing):
    digit = processing.to_mnist(drawing(0, 255))
    rows, columns = np.nonzero(np.asarray(digit) > 32)
    assert digit.size == (28, 28) and digit.mode == "L"
    assert 18 <= np.ptp(rows) + 1 <= 20 and np.ptp(columns) + 1 <= 20
    assert centre(digit) == pytest.approx((14, 14), abs=0.7)


def test_position_size_and_ground_do_not_matter(processing):
    expected = np.asarray(processing.to_mnist(drawing(0, 255)), dtype=float)
    for other in (drawing(0, 255, shift=30), drawing(255, 0), drawing(255, 0, mode="RGB"), drawing(230, 40, shift=-20)):
        assert np.abs(np.asarray(processing.to_mnist(other)) - expected).mean() < 2


@pytest.mark.parametrize("ink", [0, 255])
def test_ink_on_a_transparent_ground_is_found(processing, ink):
    picture = Image.new("RGBA", (200, 200), (ink, ink, ink, 0))
    picture.putalpha(drawing(0, 255))
    expected = np.asarray(processing.to_mnist(drawing(0, 255)), dtype=float)
    assert np.abs(np.asarray(processing.to_mnist(picture)) - expected).mean() < 2


def test_mnist_digit_is_unchanged(processing):
    digit = processing.to_mnist(drawing(0, 255))
    assert processing.to_mnist(digit).tobytes() == digit.tobytes()
    assert processing.to_mnist(digit.convert("RGB")).tobytes() == digit.tobytes()


@pytest.mark.parametrize("level", [0, 255, 130])
def test_blank_pictures_are_refused(processing, level):
    with pytest.raises(processing.InputError, match="is blank"):
        processing.to_mnist(Image.new("L", (50, 50), level))


@pytest.mark.parametrize(
    "url",
    ["", "hello", __file__, "data:text/html;base64,aGk=", "data:image/png;base64,aGk=", "data:image/png;base64,?"],
)
def test_invalid_images_are_refused(processing, url):
    with pytest.raises(processing.InputError, match="picture"):
        processing.read_picture(url)


def test_data_urls_round_trip(space_modules):
    processing, uploads = space_modules("foe", "processing", "shared.uploads")
    digit = processing.to_mnist(drawing(0, 255))
    assert processing.read_picture(uploads.to_data_url(digit)).tobytes() == digit.tobytes()


def test_digits_are_known_by_their_names(processing):
    assert processing.are_digits(["zero", "One", " two "]) and processing.are_digits(["7", "8"])
    assert not processing.are_digits(["zero", "cat"]) and not processing.are_digits([])


# ---------------------------------------------------------------- routing

CONFIG = SimpleNamespace(
    problem_type=None,
    mode="output",
    features_from=None,
    id2label={0: "cat", 1: "dog", 2: "owl"},
    experts=[
        {"name": "me/pets", "revision": "abc", "label_map": [1, 0]},
        {"name": "me/birds", "label_map": [2, -1]},
        {"name": "me/broken", "label_map": [0, 1, 2]},
    ],
)
SHARES = [0.5, 0.25, 0.25]


def trace(order, outputs=None, scores=None):
    values = {"experts": [e["name"] for e in CONFIG.experts], "cost_shares": SHARES, "order": torch.tensor([order])}
    values |= {} if outputs is None else {"outputs": torch.tensor([outputs])}
    return values | ({} if scores is None else {"scores": torch.tensor([scores])})


def test_routing_lists_queried_experts_and_their_labels(processing):
    outputs = [[0.2, 0.8, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    routing = processing.read_routing(CONFIG, trace([2, 0, 1], outputs), torch.tensor([0.0, 2.0, 0.0]), 0.8)
    pets, birds, broken = routing["experts"]
    assert routing["answer"] == "dog" and routing["confidence"] == pytest.approx(0.787, abs=1e-3)
    assert routing["cost"] == 0.75 and routing["budget"] == 0.8
    assert pets["probabilities"] == pytest.approx([0.2, 0.8, None]) and pets["labels"] == ["cat", "dog"]
    assert birds["order"] == 0 and birds["probabilities"] is None and birds["labels"] == ["owl"]
    assert broken["order"] == 1 and broken["probabilities"] is None  # asked, but its logits were not finite


def test_routing_of_a_selection_scores_the_experts(processing):
    config = SimpleNamespace(**{**vars(CONFIG), "mode": "selection"})
    logits = torch.tensor([0.3, 0.7, 1e-8]).log()
    routing = processing.read_routing(config, trace([1, 0, 0], scores=[2.0, 0.0, 0.0]), logits, None)
    assert routing["answer"] == "dog" and routing["cost"] == 1.0
    assert sum(expert["score"] for expert in routing["experts"]) == pytest.approx(1)
    assert routing["experts"][0]["probabilities"][2] is None and routing["experts"][1]["probabilities"] is None
    assert processing.shown_labels(routing) == ([0, 1], 0)
    config.features_from = 1
    assert processing.read_routing(config, trace([1, 0, 0], scores=[2.0, 0.0, 0.0]), logits, None)["cost"] == 0.75


def test_routing_of_a_regression_has_a_score_and_no_confidence(processing):
    experts = [{"name": "me/judge", "label_map": [0]}, {"name": "me/critic", "label_map": [0]}]
    config = SimpleNamespace(
        **{**vars(CONFIG), "problem_type": "regression", "experts": experts, "id2label": {0: "score"}}
    )
    values = {"cost_shares": [0.5, 0.5], "order": torch.tensor([[1, 2]]), "outputs": torch.tensor([[[3.0], [4.5]]])}
    routing = processing.read_routing(config, values, torch.tensor([3.75]), None)
    assert (routing["answer"], routing["confidence"], routing["axis"]) == ("3.75", None, [0, 5])


def test_routing_among_language_models_has_no_labels(processing):
    config = SimpleNamespace(**{**vars(CONFIG), "mode": "selection", "experts": [{"name": "me/a"}, {"name": "me/b"}]})
    values = {"cost_shares": [0.5, 0.5], "order": torch.tensor([[0, 1]]), "scores": torch.tensor([[0.0, 3.0]])}
    routing = processing.read_routing(config, values, None, None)
    assert (routing["answer"], routing["labels"], routing["probabilities"]) == (None, [], [])
    assert [expert["order"] for expert in routing["experts"]] == [0, 1]
    assert routing["experts"][1]["score"] == pytest.approx(0.9526, abs=1e-4)


def test_only_the_most_probable_labels_are_shown(processing):
    labels = [f"label {index}" for index in range(40)]
    fused, expert = [0.0] * 40, [0.0] * 40
    fused[30], expert[3] = 0.9, 0.8
    routing = {
        "mode": "output",
        "labels": labels,
        "probabilities": fused,
        "experts": [{"order": 1, "labels": labels, "probabilities": expert}],
    }
    shown, others = processing.shown_labels(routing)
    assert {3, 30} <= set(shown) and shown == sorted(shown) and (len(shown), others) == (10, 30)


# ---------------------------------------------------------------- results


def test_valid_results_are_kept(processing):
    good = {"name": "FoE", "kind": "foe", "score": 0.9, "ci95": [0.88, 0.92], "cost": 1.0}
    bad = [{**good, "score": "high"}, {**good, "cost": float("nan")}, {**good, "ci95": [1]}, "FoE", {"name": "x"}]
    curve = [{"score": 0.8, "cost": 0.6}, {"score": 0.7, "cost": 0.2}, {"score": None, "cost": 0.1}]
    results = processing.read_results({"systems": [good, *bad], "curve": curve, "n": 10, "dataset": {"name": "digits"}})
    assert [system["name"] for system in results["systems"]] == ["FoE"]
    assert [point["cost"] for point in results["curve"]] == [0.2, 0.6]
    assert (results["n"], results["dataset"], results["metric"]) == (10, "digits", "accuracy")


def test_results_of_today_and_of_before_show_the_same(processing):
    score = {"score": 0.9, "ci95": [0.88, 0.92]}
    before = {"systems": [{"name": "FoE", "kind": "foe", **score, "cost": 1.0}], "metric": "mse", "n": 10}
    tasks = [{"name": "digits", "metric": "mse", "n": 10, "owner": None, "pooled": True}]
    today = {"tasks": tasks, "predictors": [{"name": "FoE", "kind": "fused", "scores": {"digits": score}, "cost": 1.0}]}
    assert processing.read_results(today) == processing.read_results({**before, "dataset": {"name": "digits"}})
    today["predictors"][0]["scores"] = {"other": score}
    assert processing.read_results(today) is None


@pytest.mark.parametrize("values", [None, [], "results", {}, {"systems": {}}, {"systems": [{"score": None}]}])
def test_results_that_hold_nothing_are_none(processing, values):
    assert processing.read_results(values) is None
