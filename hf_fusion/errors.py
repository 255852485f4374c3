"""The one exception of the package: it names the thing, the reason and the next command."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from unicodedata import category

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 8


class FusionError(Exception):
    """An error a user can act on. What it quotes is made `printable`: it may be a stranger's.

    Args:
        message: what went wrong, naming the thing ("me/bert-irony has no label names").
        hint: the next command or argument to type, if there is one.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = "\n".join(map(printable, message.split("\n")))  # some tell a table
        self.hint = hint and printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


def is_fault(error: BaseException) -> bool:
    """Whether something failed, rather than that somebody wants to stop: Rust's panics are no `Exception` either."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


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
    return printable(" ".join(str(text)[:10_000].split()), 300)


def printable(text: object, most: int = 4_000) -> str:
    """Text on one line that any terminal, page or file can show, as far as it is such already unchanged.

    Whatever a terminal obeys, turns text around, cannot be seen or cannot be encoded is written as Python writes it.

    Args:
        text: which may hold what a stranger wrote.
        most: characters; longer text is cut.
    """
    line = str(text)
    if len(line) > most:
        line = f"{line[: most - 1]}…"
    return line if line.isprintable() else "".join(map(_visible, line))


def _visible(character: str) -> str:
    if character.isprintable() or category(character) == "Zs":
        return character
    return " " if character in "\n\t" else repr(character)[1:-1]
