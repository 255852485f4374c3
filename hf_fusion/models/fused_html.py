"""Objects as HTML for notebooks: plain tables of escaped text, readable in light and dark themes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, TypeVar

MOST = 10  # entries of a list that are shown
MOST_ROWS = 20  # rows of a table that are shown
MOST_COLUMNS = 10  # experts that a table has columns for
LONGEST = 500  # characters of a line

T = TypeVar("T")
Row = Sequence[Any]


class Shaded(NamedTuple):
    """A number whose cell is faintly shaded by its size.

    Attributes:
        value: shown with two decimals.
        share: 0 for no shading to 1 for the strongest.
    """

    value: float
    share: float


def lines_of(value: Any) -> list[str]:
    """A value as lines of text: one for each entry of a list or mapping, cut with a count; none if it is empty."""
    if value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value):
        return []
    if isinstance(value, Mapping):
        width = max(len(str(name)) for name in value)
        shown = [f"{name!s:{width}}  {first[0] if (first := lines_of(entry)) else ''}" for name, entry in value.items()]
    elif isinstance(value, (list, tuple)):
        shown = [str(entry) for entry in value]
    elif isinstance(value, bool):
        shown = ["yes" if value else "no"]
    elif isinstance(value, (int, float)):
        shown = [f"{value:,}" if isinstance(value, int) else f"{value:.4g}"]
    else:
        shown = [str(value)]
    return shown if len(shown) <= MOST else [*shown[: MOST - 1], f"… and {len(shown) - MOST + 1} more"]


def facts_table(values: Mapping[str, Any], caption: str = "") -> str:
    """A table with one row for each value that is not empty.

    Args:
        values: name -> value, shown as `lines_of` gives it.
        caption: title of the table.
    """
    rows = [(name.replace("_", " "), shown) for name, value in values.items() if (shown := lines_of(value))]
    return table((), rows, caption)


def table(columns: Sequence[str], rows: Sequence[Row | str], caption: str = "", *, right: bool = False) -> str:
    """A table, whose first column names its rows.

    Args:
        columns: headings; empty for none.
        rows: cells: text, lists of lines, numbers or `Shaded`; or a note across all columns.
        caption: title of the table.
        right: whether text is aligned to the right, as numbers are, but for the first column.
    """
    width = max([len(columns), *(len(row) for row in rows if not isinstance(row, str))])
    body = [
        f'<td colspan="{width}" style="text-align:left">{_escaped(row)}</td>'
        if isinstance(row, str)
        else "".join(_cell(cell, "td" if i else "th", right and i > 0) for i, cell in enumerate(row))
        for row in rows
    ]
    head = "".join(
        f'<th scope="col" style="text-align:{"right" if right and i else "left"}">{_escaped(name)}</th>'
        for i, name in enumerate(columns)
    )
    return (
        "<table>"
        + (f'<caption style="text-align:left">{_escaped(caption)}</caption>' if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if columns else "")
        + "<tbody>"
        + "".join(f"<tr>{row}</tr>" for row in body)
        + "</tbody></table>"
    )


def first_of(rows: Sequence[T], rest: str, count: int | None = None) -> list[T | str]:
    """The rows that a table shows, with a note on how many it does not.

    Args:
        rows: all rows, or only the first.
        rest: what they are, in the plural.
        count: how many there are in all; default is the length of `rows`.
    """
    count = len(rows) if count is None else count
    if count <= MOST_ROWS:
        return list(rows)
    return [*rows[: MOST_ROWS - 1], f"… and {count - MOST_ROWS + 1:,} more {rest}"]


def table_of_rows(rows: Sequence[Mapping[str, Any] | str], caption: str = "", *, right: bool = False) -> str:
    """A table of dicts, without the columns that are empty; see `table`."""
    filled = [row for row in rows if not isinstance(row, str)]
    names = dict.fromkeys(name for row in filled for name in row)
    columns = [name for name in names if any(row.get(name) not in ("", [], None) for row in filled)]
    cells = [row if isinstance(row, str) else [row.get(name, "–") for name in columns] for row in rows]
    return table(columns, cells, caption, right=right)


def _cell(value: Any, tag: str, right: bool) -> str:
    style = "vertical-align:top;"
    if isinstance(value, Shaded):
        # a translucent colour: the theme's background and text stay visible
        style += f"background-color:rgba(66,133,244,{0.5 * min(max(value.share, 0.0), 1.0):.2f});"
        text, right = f"{value.value:.2f}", True
    elif isinstance(value, (list, tuple)):
        text = "<br>".join(map(_escaped, value))
    else:
        text = _escaped(value)
        right = right or isinstance(value, (int, float))
    scope = ' scope="row"' if tag == "th" else ""
    return f'<{tag}{scope} style="{style}text-align:{"right" if right else "left"}">{text}</{tag}>'


def _escaped(value: Any) -> str:
    text = str(value)
    return escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def heat_table(
    experts: Sequence[str],
    rows: Sequence[tuple[Any, Sequence[float]]],
    caption: str,
    *,
    first: str,
    order: Sequence[float],
    rest: str,
) -> str:
    """A table of each expert's weight, one row for each layer, token or input.

    Args:
        experts: names.
        rows: name of the row, and a number for each expert.
        caption: title of the table.
        first: heading of the rows' names.
        order: a number for each expert; if there are more than `MOST_COLUMNS`, those with the largest are shown.
        rest: what the rows are, in the plural.
    """
    kept = sorted(sorted(range(len(experts)), key=lambda i: -order[i])[:MOST_COLUMNS])
    hidden = len(experts) - len(kept)
    columns = [first, *(experts[i] for i in kept), *([f"{hidden:,} others"] if hidden else [])]
    most = max((abs(weights[i]) for _, weights in rows[:MOST_ROWS] for i in kept), default=0.0) or 1.0

    def cells(weights: Sequence[float]) -> list[Any]:
        others = [f"{sum(weights) - sum(weights[i] for i in kept):.2f}"] if hidden else []
        return [*(Shaded(weights[i], abs(weights[i]) / most) for i in kept), *others]

    return table(columns, first_of([[name, *cells(weights)] for name, weights in rows], rest), caption, right=True)


__all__ = ["MOST", "MOST_ROWS", "Shaded", "facts_table", "first_of", "heat_table", "lines_of", "table", "table_of_rows"]
