"""Pictures of a suite's results: pure functions of what `report.summarise` gives for it.

Every picture has a table beside it with the same numbers. Colours are those that colour-blind people tell apart, and
each has a marker or a name as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.bench.cells import ALL, CLEAN
from hf_fusion.bench.report import CEILING, EXPERT, FLOOR, FUSED, HELD_IN, HELD_OUT
from hf_fusion.bench.suite import LOWER
from hf_fusion.bench.suite_tables import group_of, mean_entry, rows_of, title_of
from hf_fusion.bench.summary import MethodSummary, SuiteSummary
from hf_fusion.bench.tables import file_name
from hf_fusion.evaluation.plots import EXPERTS, GREY, MARKERS, ORANGE, blank_figure, plain_axes, spread_labels
from hf_fusion.io.saving import in_folder, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 8
"""Methods in pictures that show each of them task by task or severity by severity."""
WIDTH = 9.0  # inches
DARK = "#222222"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85}  # behind text that lines cross


def shown_rows(suite: SuiteSummary) -> list[MethodSummary]:
    """One row for each method that has a mean: the tuned variant where there is one, without single experts."""
    group = _group(suite)
    rows = [
        row for row in rows_of(suite) if group in row["means"].get(CLEAN, {}) and not row["method"].startswith(EXPERT)
    ]
    return list({row["method"]: row for row in rows}.values())  # the default comes first, the tuned replaces it


def chosen_rows(suite: SuiteSummary, rows: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Rows, best first: a floor, a ceiling, the best of each family, then the next best, at most `MOST`."""
    ranked = sorted(rows, key=lambda row: _rank(suite, row))
    ends = [row for part in (FLOOR, CEILING) for row in [row for row in ranked if row["part"] == part][:1]]
    fused = [row for row in ranked if row["part"] == FUSED]
    firsts = list({row["family"]: row for row in reversed(fused)}.values())
    firsts.sort(key=lambda row: _rank(suite, row))
    wanted = [*ends, *firsts, *(row for row in fused if row not in firsts)][:MOST]
    return [row for row in ranked if row in wanted]


def draw_accuracy_cost(suite: SuiteSummary) -> Any:
    """Means against cost (logarithmic), with the Pareto front of what is fused; None without means."""
    rows, group = shown_rows(suite), _group(suite)
    if not rows:
        return None
    own_scale = _own_scale(suite)
    points = [(row, row["cost"], row["means"][CLEAN][group]) for row in rows]
    front = _front([(cost, mean["score"]) for row, cost, mean in points if row["part"] == FUSED], own_scale)
    low, high = min(cost for _, cost, _ in points), max(cost for _, cost, _ in points)
    longest = max(len(title_of(row)) for row in rows) + 7
    share = min(0.6, 0.066 * longest / (WIDTH - 0.9))  # of the width, for labels
    decades = max(0.3, math.log10(high / low)) / (1 - share - 0.04)
    columns = _columns(points, 10 ** (decades * share))
    height = max(4.4, 1.6 + 0.152 * max(len(column) for column in columns))
    figure = blank_figure(WIDTH, height, layout=None)
    looks = _looks(suite)
    legend_rows = math.ceil(len(looks) / 4)
    axes = figure.add_axes(
        (0.55 / WIDTH, (0.55 + 0.2 * legend_rows) / height, 1 - 0.65 / WIDTH, 1 - (1.1 + 0.2 * legend_rows) / height)
    )
    axes.set_xscale("log")
    axes.set_xlim(low / 10 ** (0.04 * decades), low * 10 ** (0.96 * decades))
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color=ORANGE, linewidth=1.6, alpha=0.8, zorder=2)
    for section, look in looks.items():
        points_of = [(cost, mean) for row, cost, mean in points if row["section"] == section]
        known = [(cost, *mean["ci95"]) for cost, mean in points_of if mean["ci95"] is not None]
        axes.vlines(*_sides(known), color=look["color"], linewidth=0.9, alpha=0.45, zorder=2)
        places = [cost for cost, _ in points_of], [mean["score"] for _, mean in points_of]
        axes.plot(*places, linestyle="", markersize=6.5, markeredgewidth=0.9, zorder=4, **look)
    bottom, top = axes.get_ylim()
    step = 0.148 / (height * axes.get_position().height) * (top - bottom)
    for column in columns:
        column.sort(key=lambda point: point[2]["score"])
        x = max(cost for _, cost, _ in column) * 10 ** (0.04 * decades)
        wanted = [mean["score"] for _, _, mean in column]
        for (row, cost, mean), y in zip(
            column, spread_labels(wanted, step, bottom + step / 2, top - step / 2), strict=True
        ):
            on_front = row["part"] == FUSED and (cost, mean["score"]) in front
            axes.plot([cost, x * 0.995], [mean["score"], y], color=GREY, linewidth=0.5, alpha=0.6, zorder=1)
            axes.text(
                x, y, f"{title_of(row)}  {_number(mean['score'], own_scale)}", fontsize=7.8, va="center", color=DARK,
                fontweight="bold" if on_front else "normal", zorder=5,
                bbox=PAPER,
            )  # fmt: skip
    axes.set_ylim(bottom, top)
    ticks = [
        tick for tick in (0.1, 0.2, 0.5, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100) if low * 0.9 <= tick <= high * 1.1
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if not own_scale:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    plain_axes(axes, labelsize=8.5)
    axes.set_xlabel(
        "multiplications per forward pass, as a multiple of the base's (logarithmic)", loc="left", fontsize=8.5
    )
    _head(
        figure,
        height,
        f"{suite['title']}: {_what(suite)} against inference cost",
        "bold names and the line: the Pareto front of the fused models",
    )
    _legend(figure, height, looks, columns=4)
    return figure


def draw_tasks(suite: SuiteSummary) -> Any:
    """Bars of a few methods, a panel for each task; None where there is nothing to show."""
    rows = chosen_rows(suite, shown_rows(suite))
    if not rows:
        return None
    tasks = [task for group in (HELD_IN, HELD_OUT) for task in group_of(suite, ALL, group)]
    names, looks = [title_of(row) for row in rows], _looks(suite)
    left = 0.068 * max(map(len, names)) + 0.15
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    panel = 0.19 * len(rows) + 0.12
    height = 0.62 + lines * (panel + 0.34)
    figure = blank_figure(WIDTH, height, layout=None)
    width = (WIDTH - left - 0.1) / columns
    for index, task in enumerate(tasks):
        line, column = divmod(index, columns)
        bottom = height - 0.62 - line * (panel + 0.34) - 0.24 - panel
        axes = figure.add_axes(
            ((left + column * width) / WIDTH, bottom / height, (width - 0.12) / WIDTH, panel / height)
        )
        scores = [row["scores"][CLEAN].get(task["name"], {}) for row in rows]
        values = [score.get("score", 0.0) for score in scores]
        own_scale = task["metric"] in LOWER
        most = max(map(abs, values)) * 1.32 if own_scale else 1.3
        axes.barh(
            range(len(rows)), values, height=0.72, color=[looks[row["section"]]["color"] for row in rows], alpha=0.85
        )
        for y, score in enumerate(scores):
            if "score" not in score:
                axes.text(0.01 * most, y, score.get("status", "not run"), fontsize=7, va="center", color=GREY)
                continue
            end = score["score"]
            if score["ci95"] is not None:
                end = max(end, score["ci95"][1])
            axes.text(
                max(0, end) + 0.02 * most, y, _number(score["score"], own_scale), fontsize=7.2, va="center", color=DARK
            )
        ranges = [(y, *score["ci95"]) for y, score in enumerate(scores) if score.get("ci95") is not None]
        axes.hlines(*_sides(ranges), color=DARK, linewidth=0.9, zorder=3)
        axes.set_xlim(min(0, *values), most)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)) if column == 0 else [], names if column == 0 else [], fontsize=8)
        axes.set_xticks([] if own_scale else [0, 0.5, 1])
        plain_axes(axes, grid="x", labelbottom=False)
        axes.spines["bottom"].set_visible(False)
        held = " (held out)" if task["name"] in suite["groups"].get(ALL, {}).get(HELD_OUT, ()) else ""
        axes.set_title(f"{task['name']}{held}", loc="left", fontsize=8.5, fontweight="bold", pad=3)
    metrics = ", ".join(dict.fromkeys(_metric(task["metric"]) for task in tasks))
    _head(figure, height, f"{suite['title']}: task by task", f"{metrics}; 95 % intervals; at most {MOST} methods")
    return figure


def draw_corruptions(suite: SuiteSummary) -> Any:
    """Means by severity, a panel for each corruption; None where no corruption has severities."""
    kinds: dict[str, list[int]] = {}
    for condition in suite["conditions"]:
        name, _, severity = condition.partition(":")
        if severity.isdecimal():
            kinds.setdefault(name, []).append(int(severity))
    rows = chosen_rows(suite, [row for row in shown_rows(suite) if row["drop"]])
    if not kinds or not rows:
        return None
    own_scale = _own_scale(suite)
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    legend_rows = math.ceil(len(rows) / 3)
    foot, panel = 0.15 + 0.2 * legend_rows, 1.75
    height = 0.62 + lines * (panel + 0.42) + foot
    figure = blank_figure(WIDTH, height, layout=None)
    width = (WIDTH - 0.5) / columns
    looks: dict[str, dict[str, Any]] = {
        row["method"]: {"color": EXPERTS[k % 8], "marker": MARKERS[k % 8]} for k, row in enumerate(rows)
    }
    panels = []
    for index, (name, severities) in enumerate(kinds.items()):
        line, column = divmod(index, columns)
        bottom = height - 0.62 - line * (panel + 0.42) - 0.26 - panel
        axes = figure.add_axes(
            ((0.42 + column * width) / WIDTH, bottom / height, (width - 0.14) / WIDTH, panel / height)
        )
        run = {task for row in rows for task in row["scores"].get(f"{name}:{severities[0]}", {})}
        tasks = [task for task in group_of(suite, ALL, HELD_IN) if task["name"] in run]
        for row in rows:
            clean = mean_entry(row["scores"].get(CLEAN, {}), tasks)
            line_of = [(0, clean["score"])] if clean else []
            means = [(severity, row["means"].get(f"{name}:{severity}", {}).get(HELD_IN)) for severity in severities]
            line_of += [(severity, mean["score"]) for severity, mean in means if mean]
            if line_of:
                axes.plot(
                    *zip(*line_of, strict=True),
                    linewidth=1.3,
                    markersize=4.2,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    **looks[row["method"]],
                )
        axes.set_title(name.replace("_", " "), loc="left", fontsize=9, fontweight="bold", pad=4)
        axes.set_xticks([0, *severities], ["clean", *map(str, severities)])
        axes.set_xlim(-0.35, max(severities) + 0.25)
        plain_axes(axes, labelsize=7.8)
        panels.append((column, axes))
    ends = [axes.get_ylim() for _, axes in panels]
    for column, axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        axes.yaxis.set_major_formatter(
            (lambda value, _: f"{value:g}") if own_scale else (lambda value, _: f"{100 * value:.0f}")
        )
        axes.tick_params(labelleft=column == 0)
    _head(figure, height, f"{suite['title']}: {_what(suite)} under corruption", f"by severity; at most {MOST} methods")
    _legend(figure, height, {title_of(row): looks[row["method"]] for row in rows}, columns=3, line=1.3)
    return figure


def draw_normalised(suite: SuiteSummary) -> Any:
    """Bars of every method's mean as a share of the individual experts', with intervals, best first; None without."""
    group = _group(suite)
    rows = [row for row in shown_rows(suite) if group in row["normalised"].get(CLEAN, {})]
    if not rows:
        return None
    rows.sort(key=lambda row: -row["normalised"][CLEAN][group])
    looks, names = _looks(suite), [title_of(row) for row in rows]
    legend_rows = math.ceil(len(looks) / 4)
    height = 1.07 + 0.185 * len(rows) + 0.2 * legend_rows
    left = 0.068 * max(map(len, names)) + 0.15
    figure = blank_figure(WIDTH, height, layout=None)
    foot = 0.32 + 0.2 * legend_rows
    axes = figure.add_axes((left / WIDTH, foot / height, (WIDTH - left - 0.1) / WIDTH, (height - foot - 0.62) / height))
    right, ranges = 0.0, []
    shares = [row["normalised"][CLEAN][group] for row in rows]
    axes.barh(range(len(rows)), shares, height=0.7, color=[looks[row["section"]]["color"] for row in rows], alpha=0.85)
    for y, row in enumerate(rows):
        share, mean = row["normalised"][CLEAN][group], row["means"][CLEAN][group]
        end = share
        if mean["ci95"] is not None and mean["score"]:
            # a share of the same experts' mean; where less is better it is their mean by this one
            ends = [share * (mean["score"] / e if _own_scale(suite) else e / mean["score"]) for e in mean["ci95"] if e]
            ranges.append((y, min(ends), max(ends)))
            end = max([share, *ends])
        axes.text(end + 0.008, y, f"{100 * share:.1f}", fontsize=7.8, va="center", color=DARK, bbox=PAPER)
        right = max(right, end)
    axes.hlines(*_sides(ranges), color=DARK, linewidth=1, zorder=3)
    axes.axvline(1, color=DARK, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    axes.set_xlim(0, max(1.0, right) + 0.07)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    plain_axes(axes, grid="x")
    axes.tick_params(axis="x", labelsize=8)
    _head(
        figure,
        height,
        f"{suite['title']}: mean as a share of the individual experts' mean",
        "95 % intervals of the mean over tasks",
    )
    _legend(figure, height, looks, columns=4, square=True)
    return figure


# name of its files -> what draws it, and what it shows
PICTURES = {
    "cost": (draw_accuracy_cost, "Means against inference cost, with the Pareto front"),
    "normalised": (draw_normalised, "Means as a share of the individual experts' mean"),
    "tasks": (draw_tasks, "Scores task by task"),
    "corruption": (draw_corruptions, "Means by corruption and severity"),
}


def save_pictures(
    suite: SuiteSummary, folder: str | Path, formats: Sequence[str] = ("png", "svg")
) -> dict[str, list[Path]]:
    """Draws all pictures of a suite that it has numbers for.

    Args:
        suite: of a summary.
        folder: where to, ``SUITE-NAME.FORMAT`` each; created if missing.
        formats: endings that matplotlib knows.

    Returns:
        Name of the picture, a key of `PICTURES` → its files.

    Raises:
        FusionError: matplotlib is not installed.
    """
    blank_figure(1, 1)  # tells first if there is no matplotlib
    from matplotlib import rc_context

    folder = Path(folder)
    made = {}
    # text stays text; the same bytes each time
    with in_folder(folder), rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_fusion"}):
        for name, (draw, _) in PICTURES.items():
            figure = draw(suite)
            if figure is None:
                continue
            made[name] = [folder / file_name(f"{suite['name']}-{name}.{ending}") for ending in formats]
            for path in made[name]:
                undated = {"Date": None} if path.suffix == ".svg" else None
                with replacing(path) as partial:
                    figure.savefig(partial, facecolor="white", metadata=undated)
    return made


# ---------------------------------------------------------------- parts


def _group(suite: SuiteSummary) -> str:
    return HELD_IN if group_of(suite, ALL, HELD_IN) else HELD_OUT


def _own_scale(suite: SuiteSummary) -> bool:
    """Whether the means are no shares; less is better then."""
    return any(task["metric"] in LOWER for task in group_of(suite, ALL, _group(suite)))


def _rank(suite: SuiteSummary, row: MethodSummary) -> float:
    score = row["means"][CLEAN][_group(suite)]["score"]
    return float(score if _own_scale(suite) else -score)


def _number(value: float, own_scale: bool) -> str:
    return f"{value:.2f}" if own_scale else f"{100 * value:.1f}"


def _metric(name: str) -> str:
    return name.replace("_", " ") + ("" if name in LOWER else " in %")


def _what(suite: SuiteSummary) -> str:
    """What the means are of: "mean accuracy in %", or of several metrics "mean score"."""
    metrics = {task["metric"] for task in group_of(suite, ALL, _group(suite))}
    return f"mean {_metric(metrics.pop())}" if len(metrics) == 1 else "mean score in %"


def _looks(suite: SuiteSummary) -> dict[str, dict[str, Any]]:
    """Colour and marker of each section; floors and ceilings are grey."""
    looks: dict[str, dict[str, Any]] = {}
    for row in shown_rows(suite):
        if row["part"] == FUSED:
            used = sum(look["marker"] in MARKERS for look in looks.values())
            looks.setdefault(row["section"], {"color": EXPERTS[used % 8], "marker": MARKERS[(used + used // 8) % 8]})
        else:
            looks.setdefault(row["section"], {"color": GREY, "marker": "<" if row["part"] == FLOOR else ">"})
    return {name: {**look, "markeredgecolor": "white"} for name, look in looks.items()}


def _columns(points: list[Any], factor: float) -> list[list[Any]]:
    """Groups of points by cost with labels above each other: a new group begins where labels of the last have ended."""
    columns: list[list[Any]] = []
    for point in sorted(points, key=lambda point: point[1]):
        if columns and point[1] < columns[-1][-1][1] * factor:
            columns[-1].append(point)
        else:
            columns.append([point])
    return columns


def _front(points: list[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The points that none is both cheaper and better than, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not front or (score < front[-1][1] if lower else score > front[-1][1]):
            front.append((cost, score))
    return front


def _sides(ranges: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float], list[float]]:
    """Place, low end, high end of lines, one list each."""
    return [position for position, _, _ in ranges], [low for _, low, _ in ranges], [high for _, _, high in ranges]


def _head(figure: Figure, height: float, title: str, line: str) -> None:
    figure.text(0.08 / WIDTH, 1 - 0.13 / height, title, fontsize=11, va="top")
    figure.text(0.08 / WIDTH, 1 - 0.36 / height, line, fontsize=8.5, va="top", color="#555555")


def _legend(
    figure: Figure,
    height: float,
    looks: Mapping[str, Mapping[str, Any]],
    columns: int,
    line: float = 0,
    square: bool = False,
) -> None:
    """Names of colours and markers at the bottom."""
    from matplotlib.lines import Line2D

    more: dict[str, Any] = {"linewidth": line, "markersize": 6, "linestyle": "-" if line else ""}
    handles = [Line2D([], [], **{**look, **more, **({"marker": "s"} if square else {})}) for look in looks.values()]
    figure.legend(
        handles, list(looks), loc="lower left", bbox_to_anchor=(0.02 / WIDTH, 0.0), ncols=columns, frameon=False,
        fontsize=8, handletextpad=0.4, columnspacing=1.2, labelspacing=0.35, borderaxespad=0.2,
    )  # fmt: skip
