"""FusionError, the package's exception, with a hint for the next step; and helpers that turn disk errors into it."""

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
    """An error that the user can act on. Message and hint are made `printable`, since they may quote untrusted text.

    Args:
        message: what is wrong with what ("me/bert-irony has no label names").
        hint: the next command or argument, or None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = "\n".join(map(printable, message.split("\n")))  # may contain a table
        self.hint = hint and printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


def is_fault(error: BaseException) -> bool:
    """Whether an exception is an error, including Rust's panics, and not an interrupt or exit."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def suggestion(word: object, known: Iterable[str]) -> str:
    """A hint for an unknown word: the closest known one, or a list of all."""
    known = list(known)
    close = get_close_matches(str(word)[:100], known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def shown(value: object) -> str:
    """An untrusted value as its Python representation, shortened and without control characters."""
    return _SHORT.repr(value)


def one_line(text: object) -> str:
    """Untrusted text, such as a parser's message, on one printable line of at most 300 characters."""
    return printable(" ".join(str(text)[:10_000].split()), 300)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type; without the queries of URLs, which may contain signatures."""
    line = printable((str(error).strip() or type(error).__name__).splitlines()[0], 500)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", line)


def printable(text: object, most: int = 4_000) -> str:
    """Text on one line, safe for terminals, pages and files; printable text is unchanged.

    Control characters, direction marks, invisible characters and surrogates are written as Python escapes.

    Args:
        text: may be untrusted.
        most: maximum characters; longer text is truncated.
    """
    line = str(text)
    if len(line) > most:
        line = f"{line[: most - 1]}…"
    return line if line.isprintable() else "".join(map(_visible, line))


def _visible(character: str) -> str:
    if character.isprintable() or category(character) == "Zs":
        return character
    return " " if character in "\n\t" else repr(character)[1:-1]


# ---------------------------------------------------------------- disk errors

# errno -> reason and hint
REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some room"),
    errno.EDQUOT: ("the disk quota is used up", "free some room"),
    errno.EFBIG: ("no file may be that large there", "raise the limit"),
    errno.EROFS: ("the disk is read-only", "make it writable"),
}
_FORBIDDEN = ("you may not write there", "look at its permissions")  # EACCES and EPERM, for reading and writing
# how libraries in Rust, and torch's writer, report errors of the system
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


def refusal(error: BaseException) -> int | None:
    """The errno of a disk error (full, read-only …), whichever library raised it; None for other errors."""
    if isinstance(error, FusionError):
        return None  # explained already
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in REFUSALS else None
    text = str(error)
    if (match := _IN_TEXT.search(text)) and int(match[1]) in REFUSALS:
        return int(match[1])
    return errno.ENOSPC if any(word in text for word in _TORCH_WRITER) else None


def unwritable(path: str | Path, error: BaseException, instead: str = "choose another folder") -> FusionError:
    """The error for a path that cannot be written."""
    number = refusal(error)
    if number is None and isinstance(error, PermissionError):
        number = error.errno
    if number is None:
        reason_text = isinstance(error, OSError) and error.strerror
        return FusionError(
            f"{one_line(path)} cannot be written ({reason_text or one_line(error)})", f"check it, or {instead}"
        )
    reason, first = REFUSALS.get(number, _FORBIDDEN)
    return FusionError(
        f"{one_line(path)} cannot be written: {reason} ({os.strerror(number)})", f"{first}, or {instead}"
    )


@contextmanager
def writing(path: str | Path, instead: str = "choose another folder") -> Iterator[None]:
    """Turns errors in writing (full or read-only disk, permissions …) into a FusionError.

    Args:
        path: of the output, as the user named it.
        instead: end of the hint.

    Raises:
        FusionError: naming the path and the reason.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or refusal(error) is not None:
            raise unwritable(path, error, instead) from error
        raise


@contextmanager
def disk_refusals(path: str | Path) -> Iterator[None]:
    """`writing` for work that also reads: converts only errors of a full or read-only disk."""
    try:
        yield
    except Exception as error:
        if refusal(error) is not None:
            raise unwritable(path, error) from error
        raise
