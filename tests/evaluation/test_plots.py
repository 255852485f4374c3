"""The plots: accuracy against cost, and routing and coefficient maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.coefficient_map import CoefficientMap
from hf_fusion.evaluation.intervals import Score, wilson
from hf_fusion.evaluation.plots import (
    BLUE,
    EXPERTS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    plot_accuracy_cost,
    plot_coefficients,
    plot_routing,
    spread_labels,
)
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results
from hf_fusion.evaluation.routing_map import RoutingMap


def predictor(name: str, kind: str, score: float, cost: float) -> PredictorScores:
    return PredictorScores(name, kind, {"digits": Score(score, wilson(score, 1000))}, cost=cost)


@pytest.fixture
def results() -> Results:
    predictors = [
        predictor("FoE", "fused", 0.97, 1.0),
        predictor("FoE, frugal", "frugal", 0.96, 0.3),
        *(predictor(f"me/expert-{i}", "expert", 0.4 + i / 100, 0.1 + i / 100) for i in range(6)),
        predictor("mean ensemble", "baseline", 0.9, 1.0),
        predictor("oracle expert", "oracle", 0.99, 1.0),
    ]
    curve = [{"cost_weight": 0.0, "score": 0.97, "cost": 0.6}, {"cost_weight": 1.0, "score": 0.8, "cost": 0.1}]
    return Results([MeasuredTask("digits", "accuracy", 1000, pooled=True)], predictors, curve=curve)


def test_every_kind_of_predictor_is_drawn_in_its_colour(results, tmp_path):
    path = plot_accuracy_cost(results, tmp_path / "plot.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[1] > pixels.shape[0] > 500
    for colour in (BLUE, ORANGE, GREEN, PURPLE, GREY):
        wanted = np.array([round(255 * part) for part in to_rgb(colour)])
        assert (np.abs(pixels - wanted).max(-1) <= 3).sum() > 50, colour


def test_metric_without_relative_scores_is_plotted(results, tmp_path):
    results.tasks[0].metric, results.curve = "mse", []
    assert plot_accuracy_cost(results, tmp_path / "plot.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("wanted", [[0.5] * 6, [0.0, 0.01, 0.5, 0.98, 0.99, 1.0], [0.1, 0.4, 0.7]])
def test_labels_keep_their_order_their_distance_and_the_frame(wanted):
    placed = spread_labels(wanted, height=0.1, bottom=0.05, top=0.95)
    assert all(b - a >= 0.1 - 1e-6 for a, b in zip(placed, placed[1:], strict=False))
    assert min(placed) >= 0.05 - 1e-9
    assert max(placed) <= 0.95 + 1e-9


def test_distant_labels_are_not_moved():
    assert spread_labels([0.2, 0.5, 0.8], height=0.1, bottom=0.0, top=1.0) == [0.2, 0.5, 0.8]


def test_a_map_is_read_as_it_was_saved_and_faults_are_named(tmp_path):
    saved = routing([[0.25, 0.75], [1, 0]])
    saved.save(tmp_path / "routing.json")
    assert RoutingMap.load(tmp_path / "routing.json") == saved
    content = json.loads((tmp_path / "routing.json").read_text())
    (tmp_path / "routing.json").write_text(json.dumps({**content, "n": ["ten"]}))
    with pytest.raises(FusionError, match=r"routing\.json: n\[0\] is 'ten', expected a whole number"):
        RoutingMap.load(tmp_path / "routing.json")


def routing(weights: list[list[float]]) -> RoutingMap:
    experts = [f"me/expert-{i}" for i in range(len(weights[0]))]
    tasks = [f"task {i}" for i in range(len(weights))]
    return RoutingMap(experts, tasks, weights, [10] * len(tasks), {})


def colours(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def amount(pixels: np.ndarray, colour: str) -> int:
    wanted = np.array([round(255 * part) for part in to_rgb(colour)])
    return int((np.abs(pixels - wanted).max(-1) <= 3).sum())


def test_the_cells_are_as_dark_as_their_weights_and_owners_are_framed(tmp_path):
    weights = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]
    plain = colours(plot_routing(routing(weights), tmp_path / "plain.png"))
    owned = routing(weights)
    owned.owners = {"task 0": "me/expert-0", "task 1": "me/expert-2"}
    framed = colours(plot_routing(owned, tmp_path / "framed.png"))
    assert amount(plain, ORANGE) == 0 < amount(framed, ORANGE)
    assert owned.owner_weight() == pytest.approx(0.45)
    assert routing(weights).owner_weight() is None
    darkest = amount(plain, "#003B5C")
    assert darkest > 10_000  # two cells of 0.9
    assert (
        amount(colours(plot_routing(routing([[0.9, 0.1, 0], [0.5, 0.5, 0]]), tmp_path / "1.png")), "#003B5C") < darkest
    )


def test_many_experts_make_a_wide_picture_and_few_one_that_holds_its_title(tmp_path):
    wide = colours(plot_routing(routing([[1 / 16] * 16] * 20), tmp_path / "wide.png"))
    small = colours(plot_routing(routing([[1.0]]), tmp_path / "small.png"))
    assert wide.shape[1] > 1800 > small.shape[1] > 900


def coefficients(tasks: int, experts: int, layers: int = 3, **more) -> CoefficientMap:
    values = np.random.default_rng(0).uniform(0, 1, (tasks, layers, experts)).tolist()
    names = [f"me/expert-{k}" for k in range(experts)]
    layer_names = [f"encoder.layer.{i}" for i in range(layers)]
    given = {"owners": {}, "scaling": None, **more}
    return CoefficientMap(names, layer_names, [f"task {t}" for t in range(tasks)], values, [10] * tasks, **given)


def test_task_expert_has_a_thick_line_and_scaling_is_dashed(tmp_path):
    plain = colours(plot_coefficients(coefficients(1, 2), tmp_path / "plain.png"))
    owned = colours(plot_coefficients(coefficients(1, 2, owners={"task 0": "me/expert-1"}), tmp_path / "owned.png"))
    dashed = colours(plot_coefficients(coefficients(1, 2, scaling=0.3), tmp_path / "dashed.png"))
    assert amount(owned, EXPERTS[1]) > 1.8 * amount(plain, EXPERTS[1])
    assert amount(owned, EXPERTS[0]) < 1.2 * amount(plain, EXPERTS[0])
    assert amount(plain, "#222222") < amount(dashed, "#222222") - 500


def test_eight_experts_have_distinct_colours_and_decoders_a_line(tmp_path):
    path = plot_coefficients(coefficients(8, 8), tmp_path / "8.png")
    pixels = colours(path)
    assert all(amount(pixels, colour) > 500 for colour in EXPERTS)
    assert pixels.shape[1] > pixels.shape[0] > 700
    both = coefficients(1, 2, layers=4)
    before = amount(colours(plot_coefficients(both, tmp_path / "one.png")), GREY)
    both.layers = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert amount(colours(plot_coefficients(both, tmp_path / "two.png")), GREY) > before + 50


def test_nearly_equal_coefficients_look_equal(tmp_path):
    """The axis is never so fine that noise looks like a choice."""
    found = coefficients(1, 2)
    found.coefficients = [[[0.3, 0.301], [0.301, 0.3], [0.3, 0.3]]]
    pixels = colours(plot_coefficients(found, tmp_path / "flat.png"))
    wanted = np.array([round(255 * part) for part in to_rgb(EXPERTS[1])])
    rows = np.flatnonzero((np.abs(pixels - wanted).max(-1) <= 3)[: pixels.shape[0] * 2 // 3].any(1))
    assert np.ptp(rows) < 0.1 * pixels.shape[0]
