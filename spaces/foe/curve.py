"""Measured results as HTML: accuracy against cost, with a table beside the plot. Pure functions, as in page.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from page import short
from processing import Routing
from shared.page import join, message, percent
from shared.plots import spread

Results = dict[str, Any]

PLOT_HEIGHT = 340  # pixels, as in style.css
LABEL_GAP = 17 / PLOT_HEIGHT  # share of the plot's height that a line of text needs
AT_FULL_COST = 0.85  # predictors with a higher cost have their names in the plot's right margin
MOST_TICKS = 5
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)  # between ticks
SHARES = ("accuracy", "exact_match")  # metrics shown in percent
GROUPS = (("foe", "frugal"), ("baseline", "oracle"), ("expert",))  # of the table, in order

PANEL = Markup(
    '<section class="ui-section"><div class="ui-split"><h2>{title}</h2><p class="ui-note">{data}</p></div>{verdict}'
    '<div class="foe-results"><div class="ui-card">{plot}</div><div class="ui-card">{table}{points}</div></div>'
    "</section>"
)


def results_panel(results: Results | None, routing: Routing | None = None) -> Markup:
    """The accuracy–cost curve, with a table of the results beside it.

    Args:
        results: from `processing.read_results`; None if the model's repo has none.
        routing: of the current input, whose cost and budget are marked.
    """
    if results is None:
        return message("No results", "This model's repo has no results.json, so there is no curve to draw.")
    data = f"{results['n']:,} held-out examples" + (f" of {results['dataset']}" if results["dataset"] else "")
    return PANEL.format(
        title=f"{results['metric'].capitalize().replace('_', ' ')} against cost",
        data=f"{data}, with 95 % intervals",
        verdict=_verdict(results),
        plot=_plot(results, routing),
        table=_table(results),
        points=_points(results),
    )


def score_text(score: float, metric: str, digits: int = 1) -> str:
    """Shares as percentages without the sign, errors unchanged."""
    return f"{100 * score:.{digits}f}" if metric in SHARES else f"{score:.{digits + 2}f}"


def _verdict(results: Results) -> Markup:
    """Cost and accuracy of the frugal variant, in one sentence."""
    by_kind = {system["kind"]: system for system in results["systems"]}
    if not {"foe", "frugal"} <= by_kind.keys() or results["metric"] != "accuracy":
        return Markup("")
    points = round(100 * (by_kind["frugal"]["score"] - by_kind["foe"]["score"]), 1)
    gap = f"{abs(points):.1f} points {'below' if points < 0 else 'above'}" if points else "as accurate as"
    return Markup(
        '<p class="foe-lead">Frugal inference costs <b>{}</b> and is <b>{} querying every expert</b>.</p>'
    ).format(percent(by_kind["frugal"]["cost"]), gap)


# ---------------------------------------------------------------- tables

TABLE = Markup(
    '<table class="foe-table"><thead><tr><th scope="col">Predictor</th><th scope="col" colspan="2">{}</th>'
    '<th scope="col">cost</th></tr></thead>{}</table>'
)
SYSTEM = Markup(
    '<tr class="{kind}"><th scope="row" title="{name}"><i></i>{short}</th><td>{score}</td><td>± {half}</td>'
    "<td>{cost}</td></tr>"
)
POINTS = Markup(
    '<details><summary>The curve\'s {} points</summary><table class="foe-table"><thead><tr><th scope="col">cost</th>'
    '<th scope="col">{}</th></tr></thead><tbody>{}</tbody></table></details>'
)


def _unit(metric: str) -> str:
    return metric.replace("_", " ") + (" %" if metric in SHARES else "")


def _table(results: Results) -> Markup:
    metric, bodies = results["metric"], []
    for kinds in GROUPS:
        group = sorted((s for s in results["systems"] if s["kind"] in kinds), key=lambda s: s["score"])
        rows = join(
            SYSTEM.format(
                kind=system["kind"],
                name=system["name"],
                short=short(system["name"]),
                score=score_text(system["score"], metric),
                half=score_text((system["ci95"][1] - system["ci95"][0]) / 2, metric),
                cost=percent(system["cost"]),
            )
            for system in (group if metric == "mse" else reversed(group))
        )
        bodies.append(Markup("<tbody>{}</tbody>").format(rows) if rows else "")
    return TABLE.format(_unit(metric), join(bodies))


def _points(results: Results) -> Markup:
    row = Markup("<tr><td>{}</td><td>{}</td></tr>")
    rows = [row.format(percent(p["cost"]), score_text(p["score"], results["metric"])) for p in results["curve"]]
    return POINTS.format(len(rows), _unit(results["metric"]), join(rows)) if rows else Markup("")


# ---------------------------------------------------------------- plot

PLOT = Markup(
    '<div class="foe-plot" role="img" aria-label="Score against cost; the table has the numbers">'
    '<div class="scores">{ticks}</div><div class="area">{inside}</div>'
    '<div class="costs"><span>0</span><span>25</span><span>50</span><span>75</span><span>100 %</span></div></div>'
    '<p class="ui-note">Cost: share of the cost of querying every expert. {note}</p>'
)
GRID = Markup('<i class="grid" style="top:{:.2f}%"></i>')
TICK = Markup('<span class="tick" style="top:{:.2f}%">{}</span>')
MARK = Markup('<i class="mark {}" style="{}" title="{}: {} at {} of the cost"></i>')
NAME = Markup('<span class="name {}" style="{}">{}</span>')
ASIDE = Markup('<span class="aside {}" style="top:{:.2f}%">{}</span>')
LINES = Markup(
    '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"><polygon points="{}"/>'
    '<polyline points="{}"/></svg>'
)
RULER = Markup('<i class="{}" style="left:{:.1f}%"><span>{} {}</span></i>')


def _plot(results: Results, routing: Routing | None) -> Markup:
    """Cost to the right, score upwards. Lines are SVG stretched to the box; points and texts are HTML to stay sharp."""
    metric = results["metric"]
    low, high, ticks = score_axis(results)

    def y(score: float) -> float:
        return 100 * min(max((high - score) / (high - low), 0.0), 1.0)

    hidden = sum(not low <= system["score"] <= high for system in results["systems"])
    note = f"{hidden} weaker predictor{'s are' if hidden > 1 else ' is'} outside the axis; see the table."
    return PLOT.format(
        ticks=join(TICK.format(y(tick), score_text(tick, metric, 0 if metric in SHARES else 1)) for tick in ticks),
        inside=join([*(GRID.format(y(tick)) for tick in ticks), *_rulers(routing), _lines(results["curve"], y)])
        + _marks([system for system in results["systems"] if low <= system["score"] <= high], metric, y),
        note=note if hidden else "",
    )


def _rulers(routing: Routing | None) -> list[Markup]:
    """Vertical lines at the budget and at the cost of this input."""
    if routing is None or routing["budget"] is None:
        return []
    places = (("budget", "budget", routing["budget"]), ("spent", "this input", min(routing["cost"], 1.0)))
    return [RULER.format(kind, 100 * place, name, percent(place)) for kind, name, place in places]


def _lines(curve: Sequence[Mapping[str, Any]], y: Callable[[float], float]) -> Markup:
    """The curve and the band of its intervals."""
    if len(curve) < 2:
        return Markup("")

    def path(scores: Sequence[float]) -> list[str]:
        return [f"{100 * point['cost']:.2f},{y(score):.2f}" for point, score in zip(curve, scores, strict=True)]

    below, above = (path([point["ci95"][side] for point in curve]) for side in (0, 1))
    return LINES.format(" ".join(above + below[::-1]), " ".join(path([point["score"] for point in curve])))


def _marks(systems: Sequence[Mapping[str, Any]], metric: str, y: Callable[[float], float]) -> Markup:
    """A point per predictor; the name is in the margin for those at full cost, else beside the point."""
    ranked = sorted((s for s in systems if s["kind"] == "expert"), key=lambda s: s["score"])
    best = (ranked[0] if metric == "mse" else ranked[-1]) if ranked else None
    parts, margin = [], []
    for system in sorted(systems, key=lambda s: s["kind"] == "foe"):  # the fusion on top
        kind, where = system["kind"], f"left:{100 * system['cost']:.2f}%;top:{y(system['score']):.2f}%"
        if kind == "oracle":
            parts.append(Markup('<i class="oracle" style="top:{:.2f}%"></i>').format(y(system["score"])))
        else:
            score = score_text(system["score"], metric)
            parts.append(MARK.format(kind, where, system["name"], score, percent(system["cost"])))
        if kind == "oracle" or (kind != "expert" and system["cost"] > AT_FULL_COST):
            margin.append((y(system["score"]) / 100, kind, system["name"]))
        elif kind == "frugal" or system is best:
            parts.append(NAME.format(kind, where, "best expert" if kind == "expert" else system["name"]))
    margin.sort()
    places = spread([place for place, *_ in margin], LABEL_GAP)
    return join([*parts, *(ASIDE.format(kind, 100 * p, name) for p, (_, kind, name) in zip(places, margin))])


def score_axis(results: Results) -> tuple[float, float, list[float]]:
    """Lowest and highest score of the axis, and its ticks; it includes the best expert and everything better."""
    experts = [s["score"] for s in results["systems"] if s["kind"] == "expert"]
    scores = [s["score"] for s in results["systems"] if s["kind"] != "expert"] + [p["score"] for p in results["curve"]]
    scores += [min(experts) if results["metric"] == "mse" else max(experts)] if experts else []
    span = max(scores) - min(scores) or 0.1
    step = next((step for step in STEPS if span / step <= MOST_TICKS), span / MOST_TICKS)
    low = math.floor(min(scores) / step - 0.2) * step
    high = math.ceil(max(scores) / step + 0.2) * step
    low = max(low, 0.0) if min(scores) >= 0 else low
    high = min(high, 1.0) if results["metric"] in SHARES and max(scores) <= 1 else high
    return low, high, [low + index * step for index in range(math.floor((high - low) / step + 1e-6) + 1)]
