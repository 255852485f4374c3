"""Coefficients as HTML: a heat map with numbers, and lines by depth. Pure functions, as in page.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coefficients import Coefficients
from markupsafe import Markup
from shared.experts import COLOURS, MOST_COLOURED, badge, head_cell
from shared.page import join
from shared.plots import axis_labels, spread

PLOT_HEIGHT = 320  # pixels, as in style.css
LABEL_GAP = 24 / PLOT_HEIGHT  # share of the plot's height that a badge needs
LEAST_SPAN = 0.2  # of the axis, so that noise is not magnified
MOST_TICKS = 6
STEPS = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 100.0)

# ---------------------------------------------------------------- heat map

MAP = Markup(
    '<div class="ui-card"><h3>Layer by layer</h3><p class="ui-note"><i class="we-key more"></i>more than {constant:.3g}'
    '<i class="we-key less"></i>less; {what}</p><div class="ui-scroll" tabindex="0" role="region" '
    'aria-label="Coefficients"><table class="ui-heat"><thead><tr><th scope="col">layer</th>{head}</tr></thead>'
    "<tbody>{rows}</tbody><tfoot>{foot}</tfoot></table></div></div>"
)
ROW = Markup('<tr><th scope="row">{}</th>{}</tr>')
FOOT = Markup('<tr class="mean"><th scope="row">mean</th>{}</tr>')
CELL = Markup('<td class="{side}" style="--a:{strength:.2f}">{number}</td>')


def heat_map(coefficients: Coefficients, smile: bool) -> Markup:
    """Layers × experts with numbers, coloured by their distance from the constant."""
    *rows, mean = heat_cells([*coefficients.values, coefficients.means()], coefficients.constant)
    return MAP.format(
        constant=coefficients.constant,
        what="equal coefficients" if smile else "the constant of task arithmetic",
        head=join(head_cell(expert, name) for expert, name in enumerate(coefficients.experts)),
        rows=join(ROW.format(name, row) for name, row in zip(coefficients.layers, rows, strict=True)),
        foot=FOOT.format(mean),
    )


def heat_cells(rows: Sequence[Sequence[float]], constant: float) -> list[Markup]:
    """Cells of each row, all on one scale: full colour is the largest distance from the constant."""
    most = max([abs(w - constant) for row in rows for w in row], default=0.0)
    most = max(most, LEAST_SPAN / 2)
    return [
        join(
            CELL.format(
                side="more" if w >= constant else "less",
                strength=abs(w - constant) / most,
                number=f"{round(w, 2) + 0.0:.2f}",
            )
            for w in row
        )
        for row in rows
    ]


# ---------------------------------------------------------------- by depth

DEPTH = Markup(
    '<div class="ui-card"><h3>By depth</h3><p class="ui-note"><i class="we-key dash"></i>{constant:.3g}, {what}'
    '{thick}</p><div class="we-plot" role="img" aria-label="Coefficients by layer; the table has the numbers">'
    '<div class="scores">{ticks}</div><div class="area">{grid}<i class="constant" style="top:{where:.2f}%"></i>'
    '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{lines}</svg>{points}</div>'
    '<div class="ends">{ends}</div><div class="layers">{layers}</div></div></div>'
)
TICK = Markup('<span style="top:{:.2f}%">{}</span>')
GRID = Markup('<i class="grid" style="top:{:.2f}%"></i>')
LINE = Markup('<polyline class="{kind}" style="--c:var(--e{colour})" points="{points}"/>')
POINT = Markup('<i class="point{own}" style="left:{x:.2f}%;top:{y:.2f}%;--c:var(--e{colour})" title="{title}"></i>')
END = Markup('<span style="top:{:.2f}%" class="{}">{}<em title="{}">{}</em></span>')
LAYER = Markup('<span style="left:{:.2f}%">{}</span>')


def depth_plot(coefficients: Coefficients, task: int | None, smile: bool) -> Markup:
    """A line for each expert over the layers, with its number at the end, and the constant as a dashed line.

    Args:
        task: index of the task's expert, whose line is thick.
    """
    low, high, ticks = axis([w for row in coefficients.values for w in row] + [coefficients.constant])

    def y(w: float) -> float:
        return 100 * (high - w) / (high - low)

    depth = len(coefficients.layers)
    xs = [100 * (layer + 0.5) / depth for layer in range(depth)]
    lines, points, last = [], [], []
    order = sorted(range(len(coefficients.experts)), key=lambda expert: expert == task)  # the task's expert on top
    for expert in order:
        ws = [row[expert] for row in coefficients.values]
        colour = str(expert % COLOURS) if expert < MOST_COLOURED else "-rest"
        kind = " ".join(["own"] * (expert == task) + ["dashed"] * (COLOURS <= expert < MOST_COLOURED))
        path = [(0.0, ws[0]), *zip(xs, ws, strict=True), (100.0, ws[-1])] if depth == 1 else zip(xs, ws, strict=True)
        lines.append(LINE.format(kind=kind, colour=colour, points=" ".join(f"{x:.2f},{y(w):.2f}" for x, w in path)))
        points += [
            POINT.format(
                own=" own" if expert == task else "",
                x=x,
                y=y(w),
                colour=colour,
                title=f"layer {layer}: {expert + 1} {coefficients.experts[expert]} {w:.2f}",
            )
            for x, w, layer in zip(xs, ws, coefficients.layers, strict=True)
        ]
        last.append((y(ws[-1]) / 100, expert))
    last.sort()
    places = spread([place for place, _ in last], min(LABEL_GAP, 1 / len(last)))
    return DEPTH.format(
        constant=coefficients.constant,
        what="equal coefficients" if smile else "task arithmetic",
        thick=f"; thick: {coefficients.experts[task]}, the expert of this task" if task is not None else "",
        ticks=join(TICK.format(y(tick), f"{tick:.4g}") for tick in ticks),
        grid=join(GRID.format(y(tick)) for tick in ticks),
        where=y(coefficients.constant),
        lines=join(lines),
        points=join(points),
        ends=join(
            END.format(
                100 * place,
                "own" if expert == task else "",
                badge(expert),
                coefficients.experts[expert],
                coefficients.experts[expert],
            )
            for place, (_, expert) in zip(places, last, strict=True)
        ),
        layers=join(LAYER.format(x, name) for x, name in zip(xs, axis_labels(coefficients.layers), strict=True)),
    )


def axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Lowest and highest coefficient drawn, and the ticks."""
    low, high = min(values), max(values)
    more = max(0.0, LEAST_SPAN - (high - low)) / 2
    low, high = low - more, high + more
    step = next((step for step in STEPS if (high - low) / step <= MOST_TICKS), (high - low) / MOST_TICKS)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [round(index * step, 6) for index in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


SECTION = Markup(
    '<section class="ui-section"><div class="ui-split"><h2>Merging coefficients</h2><p class="ui-note">{}</p></div>'
    '<div class="ui-pair">{}{}</div></section>'
)


def coefficients_panel(coefficients: Coefficients, task: int | None, smile: bool) -> Markup:
    """The heat map beside the lines by depth."""
    means = coefficients.means()
    most = max(range(len(means)), key=means.__getitem__)
    least = min(range(len(means)), key=means.__getitem__)
    ends = (
        f"{what} mean: {coefficients.experts[k]} {means[k]:.2f}" for what, k in (("largest", most), ("smallest", least))
    )
    return SECTION.format(", ".join(ends), heat_map(coefficients, smile), depth_plot(coefficients, task, smile))
