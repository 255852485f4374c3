"""The plots: what they show, that labels do not overlap, and when no plot is made."""

from __future__ import annotations

import pytest
from made_cells import METHODS, cell, made_cells
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_fusion.bench.plots import (
    PICTURES,
    _front,
    chosen_rows,
    draw_accuracy_cost,
    draw_corruptions,
    draw_normalised,
    draw_tasks,
    save_pictures,
    shown_rows,
)
from hf_fusion.bench.report import summarise


@pytest.fixture(scope="module")
def suite() -> dict:
    """25 methods more than half of which cost the same."""
    more = {f"merge-{k}": ("merge", 0.6 + k / 1000, 1.0) for k in range(13)}
    return summarise(made_cells(seeds=1, corruptions=("jpeg",), severities=2, methods={**METHODS, **more}))["suites"][0]


def boxes(figure, texts) -> list:
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


def overlaps(found) -> int:
    return sum(a.overlaps(b) for k, a in enumerate(found) for b in found[k + 1 :])


def test_no_label_covers_another_at_25_methods(suite):
    assert len(shown_rows(suite)) > 25
    figure = draw_accuracy_cost(suite)
    found = boxes(figure, figure.axes[0].texts)
    assert len(found) == len(shown_rows(suite))
    assert overlaps(found) == 0
    edge = figure.axes[0].get_window_extent(FigureCanvasAgg(figure).get_renderer()).x1
    assert all(box.x1 <= edge for box in found)
    normalised = draw_normalised(suite)
    assert overlaps(boxes(normalised, normalised.axes[0].get_yticklabels())) == 0
    assert overlaps(boxes(normalised, normalised.axes[0].texts)) == 0


@pytest.mark.parametrize(
    ("points", "lower", "front"),
    [
        ([(1, 0.5), (1, 0.6), (2, 0.55), (3, 0.9), (8, 0.9)], False, [(1, 0.6), (3, 0.9)]),
        ([(1, 9.0), (2, 8.0), (2, 7.0), (3, 7.5)], True, [(1, 9.0), (2, 7.0)]),
    ],
)
def test_pareto_front_has_undominated_methods(points, lower, front):
    assert _front(points, lower) == front


def test_chosen_rows_represent_every_family(suite):
    chosen = [row["method"] for row in chosen_rows(suite, shown_rows(suite))]
    assert len(chosen) == 8
    assert chosen[0] == "individual"
    assert chosen[-1] == "pretrained"
    assert {"wemoe", "tsv_m", "simple_ensemble", "regmean", "adamerging_layer"} <= set(chosen)
    assert {row["variant"] for row in shown_rows(suite) if row["method"] == "ties"} == {"tuned"}


def test_bars_are_as_long_as_the_shares_and_sorted(suite):
    rows = {row["method"]: row for row in shown_rows(suite)}
    widths = [bar.get_width() for bar in draw_normalised(suite).axes[0].patches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(1)
    assert rows["wemoe"]["normalised"]["clean"]["held-in"] in widths


def test_panel_per_corruption_with_a_line_per_method(suite):
    figure = draw_corruptions(suite)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["jpeg"]
    best = figure.axes[0].lines[0]
    row = next(row for row in suite["rows"] if row["method"] == "individual")
    assert list(best.get_xdata()) == [0, 1, 2]
    means = [row["means"][c]["held-in"]["score"] for c in ("clean", "jpeg:1", "jpeg:2")]
    assert list(best.get_ydata()) == pytest.approx(means)


def test_missing_score_is_noted_in_its_panel():
    cells = [
        cell("ties", "a", 0.7),
        cell("ties", "b", None, group="held-out"),
        cell("wemoe", "a", 0.8),
        cell("wemoe", "b", 0.6, group="held-out"),
    ]
    first, second = draw_tasks(summarise(cells)["suites"][0]).axes
    assert [text.get_text() for text in first.texts] == ["80.0", "70.0"]
    assert [text.get_text() for text in second.texts] == ["60.0", "failed"]
    assert second.get_title(loc="left") == "b (held out)"


def test_method_with_score_zero_is_plotted():
    cells = [cell("individual", "a", 0.8), cell("ties", "a", 0.0, ci95=(0.0, 0.01))]
    axes = draw_normalised(summarise(cells)["suites"][0]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1, 0]


def test_no_plot_without_means():
    suite = summarise([cell("ties", "a", 0.7), cell("ties", "b", None)])["suites"][0]
    assert shown_rows(suite) == []
    assert [draw(suite) for draw, _ in PICTURES.values()] == [None] * 4


def test_plots_are_saved_and_empty_ones_left_out(tmp_path):
    cells = [cell("ties", "a", 12.0, metric="perplexity"), cell("wemoe", "a", 9.0, metric="perplexity", cost=2.0)]
    made = save_pictures(summarise(cells)["suites"][0], tmp_path)
    assert list(made) == ["cost", "tasks"]
    assert set(made) < set(PICTURES)
    assert made["cost"][0].read_bytes()[:4] == b"\x89PNG"
    before = made["cost"][1].read_bytes()
    assert b"WEMoE  9.00" in before
    assert save_pictures(summarise(cells)["suites"][0], tmp_path)["cost"][1].read_bytes() == before
