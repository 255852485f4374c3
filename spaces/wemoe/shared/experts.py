"""How experts are named and coloured on a page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

COLOURS = 8  # in style.css; further experts reuse them with dashed lines
MOST_COLOURED = 16  # experts that look different from all others
LOOK = Markup('class="ui-expert{dashed}" style="--c:var(--e{colour});--a:{share:.2f}"')
BADGE = Markup("<b {look}>{number}</b>")
HEAD_CELL = Markup('<th scope="col" title="{name}">{badge}<span>{name}</span></th>')


def look(expert: int | None, share: float = 1.0) -> Markup:
    """The attributes that colour an element: an expert's colour, the stronger the larger its share."""
    if expert is None:
        return Markup('class="ui-expert none"')
    coloured = expert < MOST_COLOURED
    colour = str(expert % COLOURS) if coloured else "-rest"
    return LOOK.format(dashed=" dashed" if coloured and expert >= COLOURS else "", colour=colour, share=share)


def badge(expert: int) -> Markup:
    """An expert's number in its colour."""
    return BADGE.format(look=look(expert), number=expert + 1)


def head_cell(expert: int, name: str) -> Markup:
    """The head of an expert's column in a table."""
    return HEAD_CELL.format(name=name, badge=badge(expert))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without their common prefix: the owner, a project's prefix."""
    start = ""
    if len(names) > 1:
        letters = zip(*names, strict=False)
        same = next((i for i, column in enumerate(letters) if len(set(column)) > 1), min(map(len, names)))
        start = re.match(r"(.*[/_-])?", names[0][:same]).group(0)  # type: ignore[union-attr]
    shorter = [name[len(start) :].rpartition("/")[2] for name in names]
    unique = all(shorter) and len(set(shorter)) == len(names)
    return shorter if unique else list(names)
