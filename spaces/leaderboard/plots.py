"""Accuracy against cost, and scores under corruptions, as SVG: pure functions of a table and its suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data import CEILING, CLEAN, FLOOR, FUSED, HELD_IN, Row, Suite
from markupsafe import Markup
from shared.page import join
from shared.plots import spread
from tables import Line, Table, corruptions_of, scale, score_cell
from view import View, condition_title

# (class, width, height, most labels): one picture for wide and one for narrow pages, so that letters keep their size
SIZES = (("wide", 960, 480, 18), ("narrow", 350, 400, 8))
LETTER, LINE = 6.6, 15  # pixels that a letter and a line of a label take
MARK = 7  # half a mark's size
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 44  # around the area of a plot
LOG_FROM = 3  # times: costs further apart have a logarithmic axis
MOST_LINES = 6  # of a picture of corruptions
# family → its colour in style.css and its mark, a path about the origin; colours repeat where marks differ enough
MARKS = {
    "ensemble": (5, "M-6-6H6V6H-6Z"),
    "merge": (0, "M6 0A6 6 0 1 1-6 0A6 6 0 1 1 6 0Z"),
    "data": (4, "M0-7.5 7 5.5H-7Z"),
    "learned": (2, "M0-8 8 0 0 8-8 0Z"),
    "routing": (7, "M0 7.5 7-5.5H-7Z"),
    "fusion": (6, "M-2.5-7H2.5V-2.5H7V2.5H2.5V7H-2.5V2.5H-7V-2.5H-2.5Z"),
    "mixture": (1, "M0-8 2-2.6 7.6-2.5 3.2 1 4.7 6.5 0 3.3-4.7 6.5-3.2 1-7.6-2.5-2-2.6Z"),
}
OTHER = (3, "M-5-7H5L7 0 5 7H-5L-7 0Z")
PARTS = {FLOOR: "M-6-2H6V2H-6Z", CEILING: "M-6-2H6V2H-6Z"}


def axis(low: float, high: float, most: int = 7) -> list[float]:
    """Round ticks that cover all values."""
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * step for step in (1, 2, 5, 10) if span / (power * step) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of 2, or of 10 for a wide range, that cover all values."""
    base = 2 if high / low <= 200 else 10
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [float(base) ** power for power in range(first, max(last, first + 1) + 1)]


# ---------------------------------------------------------------- accuracy and cost


@dataclass(frozen=True)
class Point:
    """A model in the plot of accuracy and cost."""

    cost: float
    score: float
    line: Line

    @property
    def is_fused(self) -> bool:
        """Whether it is neither floor nor ceiling."""
        return self.line.row.part == FUSED


def points_of(table: Table) -> list[Point]:
    """The lines that have a mean and a cost."""
    keys = [column.key for column in table.columns]
    mean, cost = next(k for k, key in enumerate(keys) if key.startswith("mean")), keys.index("cost")
    pairs = [(line, line.cells[mean].value, line.cells[cost].value) for line in table.lines]
    return [Point(c, s, line) for line, s, c in pairs if s is not None and c is not None and c > 0]


def front(points: Sequence[Point], lower: bool) -> list[Point]:
    """The Pareto front, by cost: fused models that no other one at the same or lower cost beats in score."""
    sign = 1 if lower else -1
    best: list[Point] = []
    for point in sorted((p for p in points if p.is_fused), key=lambda p: (p.cost, sign * p.score)):
        if not best or sign * point.score < sign * best[-1].score:
            best.append(point)
    return best


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


SHIFTS = (0, 1, -1, 2, -2, 3, -3, 4, 5, 6)  # in lines: a column of labels is moved by the one that places most labels
ANCHORS = {"start": 0.0, "middle": 0.5, "end": 1.0}
Label = tuple[float, float, str, Box]  # x, y of its middle line, its anchor, and its box


def place_labels(
    names: Sequence[str], places: Sequence[tuple[float, float]], order: Sequence[int], area: Box, most: int
) -> dict[int, Label]:
    """Places labels that overlap neither each other nor a mark; a label without room is left out.

    Marks above each other have their labels beside them in the same order, moved apart, so that their leader lines do
    not cross.

    Args:
        names: texts of the labels of all marks.
        places: positions (x, y) of all marks.
        order: indices of the marks, by priority.
        area: where labels may be.
        most: maximum number of labels.

    Returns:
        Index of a mark → its label.
    """
    labels: dict[int, Label] = {}
    columns: list[list[int]] = []
    for k in sorted(order[:most], key=lambda k: places[k][1]):
        near = [column for column in columns if abs(places[column[-1]][0] - places[k][0]) < 4 * MARK]
        if near and places[k][1] - places[near[-1][-1]][1] < 2.5 * LINE:
            near[-1].append(k)
        else:
            columns.append([k])
    columns.sort(key=lambda column: min(map(order.index, column)))
    taken = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in places]
    for column in columns:
        tries = [_labels_of(column, names, places, order, area, taken, shift * LINE) for shift in SHIFTS]
        most_placed = max(tries, key=lambda placed: sum(len(order) - order.index(k) for k in placed))
        labels |= most_placed
        taken += [label[3] for label in most_placed.values()]
    return labels


def _labels_of(
    column: Sequence[int],
    names: Sequence[str],
    places: Sequence[tuple[float, float]],
    order: Sequence[int],
    area: Box,
    taken: Sequence[Box],
    shift: float,
) -> dict[int, Label]:
    """Labels of a column of marks: to its right, moved apart and by `shift`, or else to the left, above or below."""
    edge = max(places[k][0] for k in column)
    heights = [places[k][1] for k in column]
    moved = spread([y + shift for y in heights], LINE, area[1] + LINE / 2, area[3] - LINE / 2)
    gap = 11 if all(abs(a - b) < 6 for a, b in zip(moved, heights, strict=True)) else 30
    labels: dict[int, Label] = {}
    for k, right in sorted(zip(column, moved, strict=True), key=lambda pair: order.index(pair[0])):
        width, (x, y) = LETTER * len(names[k]), places[k]
        for left, middle, anchor in (
            (edge + gap, right, "start"),
            (x - 11 - width, y, "end"),
            (x - width / 2, y - 17, "middle"),
            (x - width / 2, y + 17, "middle"),
        ):
            box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
            inside = area[0] <= box[0] and box[2] <= area[2] and area[1] <= box[1] and box[3] <= area[3]
            if inside and not any(_touch(box, other) for other in [*taken, *(label[3] for label in labels.values())]):
                labels[k] = (left + width * ANCHORS[anchor], middle, anchor, box)
                break
    return labels


FIGURE = Markup(
    '<figure class="ui-card lb-figure"><div class="lb-plot">{}<div class="lb-tip" hidden></div></div>{}</figure>'
)
SVG = Markup('<svg class="{size}" viewBox="0 0 {width} {height}" role="group" aria-label="{label}">{body}</svg>')
GRID = Markup('<path class="grid" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
TEXT = Markup('<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>')
MARK_AT = Markup(
    '<a href="{href}" class="point {kind}" data-tip="{tip}" data-key="{key}" aria-label="{tip}">'
    '<circle class="reach" r="12" cx="{x:.1f}" cy="{y:.1f}"/>'
    '<path class="mark" style="--c:var(--e{colour})" transform="translate({x:.1f} {y:.1f})" d="{d}"/></a>'
)
LEADER = Markup('<path class="leader" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
FRONT = Markup('<polyline class="front" points="{}"/>')
WHISKER = Markup('<path class="whisker" d="M{x:.1f} {y1:.1f}V{y2:.1f}"/>')
LEGEND = Markup('<figcaption class="lb-legend"><ul>{}</ul><p class="ui-note">{}</p></figcaption>')
LEGEND_ITEM = Markup(
    '<li><svg viewBox="-9 -9 18 18" aria-hidden="true"><path class="mark {}" style="--c:var(--e{})" d="{}"/>'
    "</svg>{}</li>"
)


def mark_of(row: Row) -> tuple[int, str]:
    """Colour and path of a row's mark."""
    colour, path = MARKS.get(row.family, OTHER)
    return colour, PARTS.get(row.part, path)


def cost_plot(table: Table, view: View, size: tuple[str, int, int, int]) -> Markup:
    """The plot of accuracy against cost in one size."""
    name, width, height, most = size
    points = points_of(table)
    mean = next(column for column in table.columns if column.key.startswith("mean"))
    place = table.columns.index(mean)
    best = front(points, mean.lower)
    ys = axis(min(p.score for p in points), max(p.score for p in points))
    low, high = min(p.cost for p in points), max(p.cost for p in points)
    is_log = high / low > LOG_FROM
    xs = (
        log_ticks(low, high)
        if is_log
        else axis(min(low, 1.0) - 0.05, max(high, 1.0) + 0.05, 6 if name == "wide" else 4)
    )
    right, bottom = width - RIGHT, height - BOTTOM
    measure: Callable[[float], float] = math.log if is_log else float

    def at(point: Point) -> tuple[float, float]:
        return x_of(point.cost), y_of(point.score)

    def x_of(cost: float) -> float:
        share = (measure(cost) - measure(xs[0])) / (measure(xs[-1]) - measure(xs[0]))
        return LEFT + 16 + (right - LEFT - 32) * share

    def y_of(score: float) -> float:
        share = (score - ys[0]) / (ys[-1] - ys[0])
        return TOP + 8 + (bottom - TOP - 16) * (share if mean.lower else 1 - share)  # better is up

    parts = [GRID.format(x1=LEFT, x2=right, y1=y_of(y), y2=y_of(y)) for y in ys]
    parts += [TEXT.format(kind="tick", x=LEFT - 8, y=y_of(y), anchor="end", text=f"{y:g}") for y in ys]
    parts += [GRID.format(x1=x_of(x), x2=x_of(x), y1=bottom, y2=bottom + 5) for x in xs]
    parts += [TEXT.format(kind="tick", x=x_of(x), y=bottom + 15, anchor="middle", text=f"{x:g}×") for x in xs]
    title = "Cost: multiplications per forward pass, base = 1"
    parts.append(TEXT.format(kind="title", x=(LEFT + right) / 2, y=height - 8, anchor="middle", text=title))
    if best:
        corners = [at(best[0])]
        for point in best[1:]:
            corners += [(at(point)[0], corners[-1][1]), at(point)]
        corners.append((right, corners[-1][1]))
        parts.append(FRONT.format(" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)))
    for point in best:
        if ends := point.line.cells[place].ci95:
            y1, y2 = (min(max(y_of(end), TOP), bottom) for end in ends)
            parts.append(WHISKER.format(x=at(point)[0], y1=y1, y2=y2))
    places = [at(point) for point in points]
    names = [point.line.row.full_title for point in points]
    sign = 1 if mean.lower else -1
    order = sorted(
        range(len(points)), key=lambda k: (points[k] not in best, points[k].is_fused, sign * points[k].score)
    )
    labels = place_labels(names, places, order, (LEFT + 4, TOP, right, bottom), most)
    for k, (x, y, anchor, _) in labels.items():
        if anchor == "start" and x - places[k][0] > 20:
            parts.append(LEADER.format(x1=places[k][0] + MARK, y1=places[k][1], x2=x - 3, y2=y))
    for k, point in enumerate(points):
        row, cell = point.line.row, point.line.cells[place]
        interval = f" ({cell.interval})" if cell.interval else ""
        ahead = ", on the Pareto front" if point in best else ""
        tip = f"{row.full_title}\n{row.section}{ahead}\nmean {cell.text}{interval}\ncost {point.cost:.2f}"
        colour, path = mark_of(row)
        link = view.to_query(row="" if view.row == row.key else row.key)
        kind = row.part + (" ahead" if point in best else "") + (" open" if view.row == row.key else "")
        parts.append(
            MARK_AT.format(
                href=link,
                kind=kind,
                tip=tip,
                key=f"{name} {row.key}",
                x=places[k][0],
                y=places[k][1],
                colour=colour,
                d=path,
            )
        )
    for k, (x, y, anchor, _) in labels.items():
        kind = "label ahead" if points[k] in best else "label"
        parts.append(TEXT.format(kind=kind, x=x, y=y, anchor=anchor, text=names[k]))
    label = f"Accuracy against cost: {len(points)} models, {len(best)} of them on the Pareto front"
    return SVG.format(size=name, width=width, height=height, label=label, body=join(parts))


def cost_figure(table: Table, view: View) -> Markup:
    """Accuracy against cost for wide and narrow pages, with a legend."""
    points = points_of(table)
    rows = {(p.line.row.family if p.is_fused else p.line.row.part): p.line.row for p in points}
    items = [LEGEND_ITEM.format(row.part, *mark_of(row), row.section) for row in rows.values()]
    note = (
        "The line is the Pareto front: no other fused model scores better at the same or a lower cost. Vertical bars: "
        "95 % intervals of the models on it. Hover over a mark to see its numbers; select it to see its recipe."
    )
    return FIGURE.format(join(cost_plot(table, view, size) for size in SIZES), LEGEND.format(join(items), note))


# ---------------------------------------------------------------- corruptions

PANEL_WIDTH, PANEL_HEIGHT = 330, 230
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
PANELS = Markup('<div class="lb-panels">{}</div>')
PANEL = Markup('<article class="ui-card lb-panel"><h3>{}</h3>{}{}</article>')
CURVE = Markup(
    '<polyline class="curve {kind}" style="--c:var(--e{colour});stroke-dasharray:{dash}" points="{points}"/>'
)
NUMBERS = Markup(
    '<details class="lb-numbers"><summary>Numbers</summary><div class="lb-scroll" tabindex="0"><table>'
    '<thead><tr><th scope="col">Method</th>{}</tr></thead><tbody>{}</tbody></table></div></details>'
)
HEAD_CELL, BODY_CELL = Markup('<th scope="col">{}</th>'), Markup("<td>{}</td>")
BODY_ROW = Markup('<tr><th scope="row">{}</th>{}</tr>')
KEY = Markup('<li><svg viewBox="0 0 26 10" aria-hidden="true">{}</svg>{}</li>')
KEYS = Markup('<ul class="lb-keys">{}</ul>')


def drawn(table: Table) -> list[Line]:
    """The lines that the panels show: numbered ones, and base and individual experts for comparison."""
    return [line for line in table.lines if line.number is not None or line.row.method in ("pretrained", "individual")]


def look(line: Line) -> dict[str, object]:
    """Colour and dashes of a line."""
    if line.number is None:
        return {"kind": "reference", "colour": 7, "dash": "2 4" if line.row.part == FLOOR else "8 4"}
    return {
        "kind": "numbered",
        "colour": (0, 1, 2, 3, 4, 5)[line.number - 1],
        "dash": DASHES[line.number - 1] or "none",
    }


def _curve(row: Row, conditions: Sequence[str], metric: str) -> list[tuple[int, float]]:
    """Pairs of severity (0 is clean) and mean score, if measured."""
    means = [row.means.get(condition, {}).get(HELD_IN) for condition in (CLEAN, *conditions)]
    cells = [score_cell(mean, metric).value for mean in means]
    return [(k, value) for k, value in enumerate(cells) if value is not None]


def corruption_panels(table: Table, suite: Suite, split: str) -> Markup:
    """A panel per corruption with the mean score by severity, on a common scale."""
    metric, lines = scale(suite.tasks_of(split, HELD_IN)), drawn(table)
    kinds = corruptions_of(suite)
    curves = {
        name: [(line, _curve(line.row, conditions, metric)) for line in lines] for name, conditions in kinds.items()
    }
    values = [value for pairs in curves.values() for _, curve in pairs for _, value in curve]
    if not values:
        return Markup("")
    ticks = axis(min(values), max(values), 5)
    keys = join(KEY.format(CURVE.format(points="0,5 26,5", **look(line)), _name(line)) for line in lines)
    panels = [
        PANEL.format(
            name.replace("_", " ").capitalize(),
            _panel(curves[name], conditions, ticks, bool(metric), name),
            _numbers(lines, conditions, metric),
        )
        for name, conditions in kinds.items()
    ]
    return KEYS.format(keys) + PANELS.format(join(panels))


def _name(line: Line) -> str:
    return line.row.full_title if line.number is None else f"{line.number} {line.row.full_title}"


def _panel(
    curves: Sequence[tuple[Line, list[tuple[int, float]]]],
    conditions: Sequence[str],
    ticks: Sequence[float],
    lower: bool,
    name: str,
) -> Markup:
    left, right, top, bottom = 36, PANEL_WIDTH - 34, 10, PANEL_HEIGHT - 26
    words = ["clean", *(condition.partition(":")[2] or "1" for condition in conditions)]

    def x_of(place: int) -> float:
        return left + 14 + (right - left - 18) * place / max(1, len(words) - 1)

    def y_of(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return top + (bottom - top) * (share if lower else 1 - share)

    parts = [GRID.format(x1=left, x2=right, y1=y_of(tick), y2=y_of(tick)) for tick in ticks]
    parts += [TEXT.format(kind="tick", x=left - 6, y=y_of(t), anchor="end", text=f"{t:g}") for t in ticks]
    parts += [
        TEXT.format(kind="tick", x=x_of(k), y=PANEL_HEIGHT - 10, anchor="middle", text=word)
        for k, word in enumerate(words)
    ]
    for line, curve in curves:
        points = " ".join(f"{x_of(k):.1f},{y_of(value):.1f}" for k, value in curve)
        parts.append(CURVE.format(points=points, **look(line)))
    ended = [(line, curve[-1]) for line, curve in curves if curve and line.number is not None]
    ended.sort(key=lambda pair: y_of(pair[1][1]))
    heights = spread([y_of(value) for _, (_, value) in ended], 13, top, bottom)
    for (line, (k, value)), y in zip(ended, heights, strict=True):
        parts.append(LEADER.format(x1=x_of(k), y1=y_of(value), x2=right + 14, y2=y))
        parts.append(TEXT.format(kind="end", x=right + 17, y=y, anchor="start", text=str(line.number)))
    label = f"Mean score under {name.replace('_', ' ')} by severity; the table below has the numbers"
    return SVG.format(size="panel", width=PANEL_WIDTH, height=PANEL_HEIGHT, label=label, body=join(parts))


def _numbers(lines: Sequence[Line], conditions: Sequence[str], metric: str) -> Markup:
    """A panel's numbers as a table."""
    columns = (CLEAN, *conditions)
    words = [condition_title(condition).rpartition(" ")[2] for condition in columns]

    def read(row: Row, condition: str) -> str:
        return score_cell(row.means.get(condition, {}).get(HELD_IN), metric).text or "–"

    rows = [BODY_ROW.format(_name(line), join(BODY_CELL.format(read(line.row, c)) for c in columns)) for line in lines]
    return NUMBERS.format(join(map(HEAD_CELL.format, words)), join(rows))
