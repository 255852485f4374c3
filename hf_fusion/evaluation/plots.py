"""Pictures of results: pure functions from what was measured to a file."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_fusion.extras import refuse_missing
from hf_fusion.io.saving import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_fusion.evaluation.coefficient_map import CoefficientMap
    from hf_fusion.evaluation.results import PredictorScores, Results
    from hf_fusion.evaluation.routing_map import RoutingMap

# Okabe and Ito's colours, which colour-blind people can distinguish; each kind also has its own marker.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#7A7A7A"
KINDS = {  # kind of a predictor -> colour, marker, size
    "fused": (BLUE, "D", 9),
    "frugal": (ORANGE, "o", 9),
    "expert": (GREY, "o", 6),
    "baseline": (GREEN, "s", 7),
    "oracle": (PURPLE, "^", 8),
}
# Experts by colour and marker: Okabe and Ito's eight, yellow darkened, black last; beyond them again with
# other markers.
EXPERTS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#222222"]
MARKERS = "osD^vPX*"
CONSTANT: dict[str, Any] = {"color": "#222222", "linewidth": 1.1, "linestyle": (0, (5, 3))}
LEAST_SPAN = 0.2  # of the axis of coefficients
METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "mse": "mean squared error"}
TOKENS = {"answers": "tokens of the answers", "all": "all tokens"}
LINE_HEIGHT = 0.042  # of a label, as a share of the plot's height: labels closer than that are moved apart


def plot_accuracy_cost(results: Results, path: str | Path) -> Path:
    """Draws the score of every predictor against what it costs, with 95 % intervals and the frugal curve.

    Args:
        results: of a Fusion of Experts.
        path: the picture; the ending decides the format.

    Raises:
        FusionError: matplotlib is not installed.
    """
    share = results.tasks[0].metric != "mse"
    figure, axes = _figure(9, 5.2)
    if results.curve:
        points = sorted((point["cost"], point["score"]) for point in results.curve)
        axes.plot(*zip(*points, strict=True), color=ORANGE, linewidth=1.6, alpha=0.7, zorder=2)
        axes.plot(*zip(*points, strict=True), ".", color=ORANGE, markersize=5, alpha=0.7, zorder=2)
    for predictor in results.predictors:
        colour, marker, size = KINDS[predictor.kind]
        assert predictor.cost is not None  # a FoE's is counted
        score, (low, high) = predictor.only_score.score, predictor.only_score.ci95
        axes.errorbar(
            predictor.cost,
            score,
            yerr=[[max(0.0, score - low)], [max(0.0, high - score)]],
            fmt=marker,
            color=colour,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.2,
            capsize=2.5,
            zorder=4 if predictor.kind in ("fused", "frugal") else 3,
        )
    axes.set_xlim(-0.02, 1.42)  # room for the labels on the right
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(top=min(1.03, axes.get_ylim()[1] + 0.03))
    _label(axes, results.predictors, share)
    axes.set_xlabel("cost per example, as a share of querying every expert", loc="left")
    axes.set_title(_title(results), loc="left", fontsize=11, pad=12)
    plain_axes(axes)
    return save_figure(figure, path)


def plot_routing(routing: RoutingMap, path: str | Path) -> Path:
    """Draws how much of the routing each expert gets on each task, as a heat map with numbers.

    Args:
        routing: as measured; the cells of tasks' own experts are framed.
        path: the picture; the ending decides the format.

    Raises:
        FusionError: matplotlib is not installed.
    """
    experts = [name.rpartition("/")[2] for name in routing.experts]
    figure, axes = _figure(max(6.4, 2.6 + 0.62 * len(experts)), 1.9 + 0.36 * len(routing.tasks))
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    indices = {name: index for index, name in enumerate(routing.experts)}
    order = sorted(  # each task in the row of its expert, then tasks without one
        range(len(routing.tasks)), key=lambda row: indices.get(routing.owners.get(routing.tasks[row], ""), len(indices))
    )
    tasks, weights = [routing.tasks[row] for row in order], [routing.weights[row] for row in order]
    most = max(map(max, weights))
    colours = LinearSegmentedColormap.from_list("weight", ["#FFFFFF", "#9CCBE6", BLUE, "#003B5C"])
    axes.imshow(weights, cmap=colours, vmin=0, vmax=most, aspect="auto")
    for y, (task, row) in enumerate(zip(tasks, weights, strict=True)):
        for x, weight in enumerate(row):
            colour = "white" if weight > 0.55 * most else "#222222"
            axes.text(x, y, f"{100 * weight:.0f}", color=colour, fontsize=8.5, ha="center", va="center")
            if routing.owners.get(task) == routing.experts[x]:
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2, clip_on=False)
                axes.add_patch(frame)
    axes.set_xticks(range(len(experts)), experts, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(tasks)), [task.rpartition("/")[2] for task in tasks], fontsize=8.5)
    framed = "; framed: the task's own expert" if routing.owners else ""
    figure.suptitle(
        f"Routing weight of each expert, in % per task{framed}\n"
        f"{sum(routing.n):,} examples, {TOKENS[routing.tokens]}, all linear layers; "
        f"uniform routing would give {100 / len(experts):.0f}",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return save_figure(figure, path)


def plot_coefficients(found: CoefficientMap, path: str | Path) -> Path:
    """Draws the coefficients of each expert by depth, one panel for each task.

    Args:
        found: as measured; the task's own expert has a thick line with filled markers. Where the map has a λ, a dashed
            line marks it.
        path: the picture; the ending decides the format.

    Raises:
        FusionError: matplotlib is not installed.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    columns = min(4, len(found.tasks))
    rows, legend_rows = math.ceil(len(found.tasks) / columns), math.ceil(len(found.experts) / 4)
    figure = blank_figure(max(6.4, 0.6 + 2.7 * columns), 1.3 + 2.0 * rows + 0.22 * legend_rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    looks: list[dict[str, Any]] = [
        {"color": EXPERTS[k % 8], "marker": MARKERS[(k + k // 8) % 8]} for k in range(len(found.experts))
    ]
    depth = range(1, len(found.layers) + 1)
    starts = [number for number in depth[1:] if _stack(found.layers[number - 1]) != _stack(found.layers[number - 2])]
    for axes, task, table in zip(panels.flat, found.tasks, found.coefficients, strict=False):
        for expert, look, line in zip(found.experts, looks, zip(*table, strict=True), strict=True):
            is_owner = found.owners.get(task) == expert
            more = {"linewidth": 2.6, "markersize": 6.5, "zorder": 4} if is_owner else {"linewidth": 1, "markersize": 4}
            axes.plot(depth, line, **look, **more, markerfacecolor=look["color"] if is_owner else "white")
        if found.scaling is not None:
            axes.axhline(found.scaling, **CONSTANT, zorder=2)
        for start in starts:  # a decoder's layers follow an encoder's
            axes.axvline(start - 0.5, color=GREY, linewidth=1.3, linestyle=":", zorder=1)
        axes.set_title(task.rpartition("/")[2], loc="left", fontsize=9.5, fontweight="bold", pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        plain_axes(axes, labelsize=8)
    for axes in panels.flat[len(found.tasks) :]:
        axes.set_visible(False)
    low, high = panels[0, 0].get_ylim()
    least = LEAST_SPAN - (high - low)  # or a mere 0.001 would look like a choice
    panels[0, 0].set_ylim(low - max(0, least) / 2, high + max(0, least) / 2)
    handles = [Line2D([], [], **look, markerfacecolor="white", linewidth=1, markersize=5) for look in looks]
    names = [name.rpartition("/")[2] for name in found.experts]
    if found.scaling is not None:
        handles.append(Line2D([], [], **CONSTANT))
        names.append(f"task arithmetic, {found.scaling:g}")
    figure.legend(handles, names, loc="outside lower left", ncols=max(3, columns + 1), frameon=False, fontsize=8.5)
    notes = ["thick: the expert of this task"] * bool(found.owners) + ["dotted: the decoder begins"] * bool(starts)
    figure.suptitle(
        "Mean coefficient of each expert by task, layer after layer\n" + "; ".join([f"{sum(found.n):,} rows", *notes]),
        x=0.01,
        ha="left",
        fontsize=9.5,
    )
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a picture, all of it or nothing."""
    with replacing(path) as partial:
        figure.savefig(partial, facecolor="white")
    return Path(path)


def _stack(layer: str) -> str:
    """The part of a layer's name before its number: "encoder.block"."""
    return re.split(r"\.\d+", layer)[0]


def blank_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure, its size in inches.

    Raises:
        FusionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        refuse_missing(error, "a picture", extra="plots")
        raise
    return Figure(figsize=(width, height), dpi=160, layout=layout)


def plain_axes(axes: Axes, grid: Literal["both", "x", "y"] = "y", **ticks: Any) -> None:
    """Axes with a light grid behind what is drawn, and without frame and tick marks."""
    axes.grid(axis=grid, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, **ticks)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, its size in inches, and its axes."""
    figure = blank_figure(width, height)
    return figure, figure.add_subplot()


def _title(results: Results) -> str:
    task = results.tasks[0]
    return f"{METRICS[task.metric].capitalize()} against cost on {task.name}, {task.n:,} examples, 95 % intervals"


def _label(axes: Axes, predictors: list[PredictorScores], share: bool) -> None:
    """Names beside the points; those that would cover each other are moved apart, with a line to their point."""
    bottom, top = axes.get_ylim()
    height = (top - bottom) * LINE_HEIGHT
    for column in _columns(predictors):
        # Right of the frugal point runs its curve: the name goes below.
        wanted = [p.only_score.score - (1.2 * height if p.kind == "frugal" else 0) for p in column]
        x = max(map(_cost, column)) + 0.025
        for predictor, y in zip(
            column, spread_labels(wanted, height, bottom + height / 2, top - height / 2), strict=True
        ):
            cost, score, colour = _cost(predictor), predictor.only_score.score, KINDS[predictor.kind][0]
            if predictor.kind != "frugal" and (abs(y - score) > height / 4 or x - cost > 0.04):
                axes.plot([cost, x - 0.004], [score, y], color=colour, linewidth=0.6, alpha=0.6, zorder=1)
            weight = "bold" if predictor.kind in ("fused", "frugal") else "normal"
            axes.text(
                x,
                y,
                f"{predictor.name.rpartition('/')[2]}  {f'{score:.1%}' if share else f'{score:.3g}'}",
                color=colour if predictor.kind != "expert" else "#555555",
                fontsize=8.5,
                fontweight=weight,
                verticalalignment="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                zorder=5,
            )


def _columns(predictors: list[PredictorScores]) -> list[list[PredictorScores]]:
    """Groups of predictors of similar cost, whose labels are above each other, lowest first."""
    columns: list[list[PredictorScores]] = []
    for predictor in sorted(predictors, key=_cost):
        if columns and _cost(predictor) - _cost(columns[-1][0]) < 0.2:
            columns[-1].append(predictor)
        else:
            columns.append([predictor])
    return [sorted(column, key=lambda p: p.only_score.score) for column in columns]


def _cost(predictor: PredictorScores) -> float:
    return predictor.cost or 0.0


def spread_labels(wanted: list[float], height: float, bottom: float, top: float) -> list[float]:
    """Positions near those wanted (ascending), at least `height` apart, between `bottom` and `top` if they fit."""
    placed = list(wanted)
    for _ in range(200):
        for i in range(len(placed) - 1):
            overlap = height - (placed[i + 1] - placed[i])
            if overlap > 0:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
        placed = [min(max(y, bottom + i * height), top - (len(placed) - 1 - i) * height) for i, y in enumerate(placed)]
    return placed
