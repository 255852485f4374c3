"""Tables as lines of text: as wide as their cells, or fitted to the width of a terminal without losing a character.

In a narrow terminal, cells are wrapped, after "/", "@", "," or "-" where a word is too long, so that ids stay whole. If
the columns would become too narrow, each row is printed as a block with one line for each column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from unicodedata import combining, east_asian_width

GAP = "  "
NARROW = 14  # columns of text are not made narrower than this, if their cells are longer
TALL = 8  # lines of the tallest row; with more, rows are printed as blocks
_PIECE = re.compile(r"\s+|[^\s/@,-]+[/@,-]*|[/@,-]+")


class Column(NamedTuple):
    """The cells of a column, as text on one line each; numbers are aligned to the right and never wrapped."""

    name: str
    cells: list[str]
    is_number: bool = False


def table_lines(columns: Sequence[Column], width: int | None = None) -> tuple[list[str], list[str]]:
    """The lines of a table.

    Args:
        columns: with the same number of cells.
        width: of the terminal, in characters; None for no limit.

    Returns:
        The lines of the head, and those of the body; the head of blocks is empty.
    """
    natural = [max(map(text_width, (column.name, *column.cells))) for column in columns]
    widths = natural if width is None else _fitted(columns, natural, width)
    if widths is None:
        return [], _blocks(columns, width or 0)
    head, *body = [
        _row(columns, [column.name for column in columns], widths),
        *(_row(columns, [column.cells[i] for column in columns], widths) for i in range(len(columns[0].cells))),
    ]
    return [*head, GAP.join("-" * each for each in widths)], [line for row in body for line in row]


def text_width(text: str) -> int:
    """How many characters of a terminal a text takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(each) else 2 if east_asian_width(each) in "WF" else 1 for each in text)


def wrap(text: str, width: int) -> list[str]:
    """A text in lines of at most a width (at least 2); only spaces at their ends are dropped."""
    lines = [""]
    for piece in _PIECE.findall(text):
        if text_width(lines[-1] + piece.rstrip()) > width and lines[-1]:
            lines.append("")
        if not lines[-1]:
            piece = piece.lstrip()
        for character in piece:
            if text_width(lines[-1] + character) > width and not character.isspace():
                lines.append("")
            lines[-1] += character
    return [line.rstrip() for line in lines]


def _fitted(columns: Sequence[Column], natural: list[int], width: int) -> list[int] | None:
    """The widths of columns that fit; None if they would be too narrow to read."""
    room = width - len(GAP) * (len(columns) - 1)
    if sum(natural) <= room:
        return natural
    widths = [each if column.is_number else min(each, NARROW) for column, each in zip(columns, natural, strict=True)]
    if sum(widths) > room:
        return None
    for _ in range(room - sum(widths)):  # each character goes where the cells are cut the most
        widest = max(range(len(columns)), key=lambda i: natural[i] / widths[i])
        widths[widest] += 1
    tallest = max(len(wrap(cell, each)) for column, each in zip(columns, widths, strict=True) for cell in column.cells)
    return widths if tallest <= TALL else None


def _row(columns: Sequence[Column], cells: list[str], widths: list[int]) -> list[str]:
    wrapped = [wrap(cell, max(width, 2)) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, wrapped))):
        padded = []
        for column, parts, width in zip(columns, wrapped, widths, strict=True):
            part = parts[number] if number < len(parts) else ""
            space = " " * (width - text_width(part))
            padded.append(space + part if column.is_number else part + space)
        lines.append(GAP.join(padded).rstrip())
    return lines


def _blocks(columns: Sequence[Column], width: int) -> list[str]:
    """The rows one below the other, without their empty cells."""
    label = max(text_width(column.name) for column in columns) + len(GAP)
    is_beside = width - label >= NARROW
    lines: list[str] = []
    for number in range(len(columns[0].cells)):
        lines += [""] * bool(lines)
        for column in columns:
            if not (cell := column.cells[number]):
                continue
            if is_beside:
                first, *rest = wrap(cell, width - label)
                lines.append(column.name + " " * (label - text_width(column.name)) + first)
                lines += [" " * label + line for line in rest]
            else:
                lines += [*wrap(column.name, max(width, 2)), *(GAP + line for line in wrap(cell, max(width - 2, 2)))]
    return lines
