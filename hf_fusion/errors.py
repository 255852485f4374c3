"""FusionError, the package's exception, with a hint for the next step; and helpers that turn disk errors into it."""

from __future__ import annotations

import errno
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher
from itertools import islice
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


def nearest(word: object, known: Iterable[str], most: int = 3) -> list[str]:
    """The known words that an unknown one may stand for, the closest first; upper and lower case do not differ.

    Args:
        word: unknown; only its first 100 characters count.
        known: words of which the first 5,000 are compared.
        most: maximum number of words.

    Returns:
        Mistyped words, and words that contain the unknown one or are contained in it, as "iso" in "iso_c". Only those
        that are almost as close as the closest.
    """
    wanted = _form(str(word)[:100])
    matcher = SequenceMatcher(None, b=wanted)
    found: dict[str, tuple[float, float]] = {}
    for each in islice(dict.fromkeys(known), 5_000):
        form = _form(each[:200])
        matcher.set_seq1(form)
        contained = (len(wanted) >= 3 and wanted in form) or (len(form) >= 4 and form in wanted)
        ratio = matcher.ratio() if contained or matcher.quick_ratio() >= _CLOSE else 0.0
        if contained or ratio >= _CLOSE:
            found[each] = (max(ratio, _CONTAINED if contained else 0.0), ratio)
    best = sorted(found, key=found.__getitem__, reverse=True)
    return [each for each in best if found[each][0] > found[best[0]][0] - _ALMOST][:most]


_CLOSE, _CONTAINED, _ALMOST = 0.6, 0.7, 0.1
"""Least ratio of a mistyped word, as in `difflib.get_close_matches`; of one that contains it; and what is almost it."""


def _form(word: str) -> str:
    return word.casefold().replace("_", "-")


def suggestion(word: object, known: Iterable[str], listing: str = "") -> str:
    """A hint for an unknown word: the nearest known ones; if none is near, all of a few, or how to list them.

    Args:
        word: unknown.
        known: words that may be meant.
        listing: the command that lists them.
    """
    known = list(dict.fromkeys(known))
    see = f"{listing} lists all" if listing else ""
    if close := nearest(word, known):
        return f"did you mean {_either(close)}? {see}".strip()
    if not known:
        return "there are none"
    return see if see and len(known) > _FEW else f"use one of {listed(known)}"


def path_suggestion(path: str | Path, otherwise: str) -> str:
    """A hint for a path that does not exist: what has almost its name, if anything has, and what else to do.

    Args:
        path: of a file or folder; its folder may not exist either.
        otherwise: hint if nothing has almost its name.
    """
    whole = Path(path)
    with suppress(OSError, ValueError):  # no permission, or not a path
        missing = next(each for each in (whole, *whole.parents) if each.parent.exists())  # the root exists
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, 5_000) if entry.name[0] != "."]
        rest = whole.relative_to(missing)
        close = [missing.with_name(name) for name in nearest(missing.name, names) if _is_like(missing, name)]
        whole_ones = [each / rest for each in close if (each / rest).exists()]
        if found := whole_ones or close:
            return f"did you mean {_either([str(each) for each in found])}?"
    return otherwise


def _is_like(path: Path, name: str) -> bool:
    """Whether a name is near that of a path beyond a suffix that they share."""
    other = Path(name)
    return name != path.name and (other.suffix != path.suffix or bool(nearest(path.stem, [other.stem])))


_FEW = 8  # words that a hint or message lists


def listed(words: Sequence[str]) -> str:
    """Words for a message: all of a few, else the first and how many more there are."""
    more = f" and {len(words) - _FEW} more" if len(words) > _FEW else ""
    return ", ".join(words[:_FEW]) + more


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


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
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("the file is larger than the file system or the limit of this process allows", "raise the limit"),
    errno.EROFS: ("the disk is read-only", "make it writable"),
}
_FORBIDDEN = ("permission was denied", "check its permissions")  # EACCES and EPERM, for reading and writing
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
            f"{one_line(path)} cannot be written ({reason_text or one_line(error)})", f"check the path, or {instead}"
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
