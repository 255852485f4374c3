"""The one exception of the package: it names the thing, the reason and the next command."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 8


class FusionError(Exception):
    """An error a user can act on.

    Args:
        message: what went wrong, naming the thing ("me/bert-irony has no label names").
        hint: the next command or argument to type, if there is one.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


def suggestion(word: object, known: Iterable[str]) -> str:
    """What to write instead of an unknown word: the closest that is known, or all that are."""
    known = list(known)
    close = get_close_matches(str(word), known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def shown(value: object) -> str:
    """A value that a stranger wrote, as Python writes it: short, and without characters that a terminal obeys."""
    return _SHORT.repr(value)


def one_line(text: object) -> str:
    """What a parser says, on one line: it may quote what a stranger wrote."""
    line = " ".join(str(text).split())[:300]
    return "".join(character if character.isprintable() else "?" for character in line)
