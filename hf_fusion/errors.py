"""The one exception of the package: it names the thing, the reason and the next command; full disks included."""

from __future__ import annotations

import errno
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
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
    close = get_close_matches(str(word)[:100], known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def shown(value: object) -> str:
    """A value that a stranger wrote, as Python writes it: short, and without characters that a terminal obeys."""
    return _SHORT.repr(value)


def one_line(text: object) -> str:
    """What a parser says, on one line: it may quote what a stranger wrote."""
    return printable(" ".join(str(text)[:10_000].split()), 300)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none; never a URL's query, which may sign it."""
    line = printable((str(error).strip() or type(error).__name__).splitlines()[0], 500)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", line)


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


# ---------------------------------------------------------------- what cannot be written

# what a disk refuses to take -> how it is told, and what to do first
REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some room"),
    errno.EDQUOT: ("the disk quota is used up", "free some room"),
    errno.EFBIG: ("no file may be that large there", "raise the limit"),
    errno.EROFS: ("the disk is read-only", "make it writable"),
}
_FORBIDDEN = ("you may not write there", "look at its permissions")  # or read: the system's word is one for both
# as libraries in Rust, and torch's own writer, tell of the system's errors
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


def refusal(error: BaseException) -> int | None:
    """The system's number of what a disk refused, whichever library says it; None for any other error."""
    if isinstance(error, FusionError):
        return None  # it has its sentence
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in REFUSALS else None
    text = str(error)
    if (match := _IN_TEXT.search(text)) and int(match[1]) in REFUSALS:
        return int(match[1])
    return errno.ENOSPC if any(word in text for word in _TORCH_WRITER) else None


def unwritable(place: str | Path, error: BaseException, instead: str = "choose another folder") -> FusionError:
    """The error to raise where `place` cannot be written."""
    number = refusal(error)
    if number is None and isinstance(error, PermissionError):
        number = error.errno
    if number is None:
        told = isinstance(error, OSError) and error.strerror
        return FusionError(
            f"{one_line(place)} cannot be written ({told or one_line(error)})", f"look there, or {instead}"
        )
    reason, first = REFUSALS.get(number, _FORBIDDEN)
    return FusionError(
        f"{one_line(place)} cannot be written: {reason} ({os.strerror(number)})", f"{first}, or {instead}"
    )


@contextmanager
def writing(place: str | Path, instead: str = "choose another folder") -> Iterator[None]:
    """Turns the errors of a full or read-only disk, and of any other place that cannot be written, into one sentence.

    Args:
        place: what is written, as the user knows it.
        instead: the end of the hint.

    Raises:
        FusionError: naming the place and the reason.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or refusal(error) is not None:
            raise unwritable(place, error, instead) from error
        raise


@contextmanager
def disk_refusals(place: str | Path) -> Iterator[None]:
    """`writing` around work that reads as well: only a full or read-only disk is blamed on the place."""
    try:
        yield
    except Exception as error:
        if refusal(error) is not None:
            raise unwritable(place, error) from error
        raise
