"""Files that are written whole or not at all, and what is said where they cannot be written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from hf_fusion.errors import FusionError, one_line

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


@contextmanager
def in_folder(folder: str | Path) -> Iterator[None]:
    """Makes a folder, with those above it that are missing; where the block fails, what is empty of them goes again.

    Raises:
        FusionError: it cannot be made.
    """
    folder = Path(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden file beside `path`, with its suffix: it takes the place of `path` once the block is done.

    Whoever is killed leaves the old file as it was, and the hidden one; whoever fails leaves the old file alone.

    Raises:
        FusionError: the disk is full, or it cannot be written.
    """
    path = Path(path)
    if (path.exists() and not path.is_file()) or path.parent in (Path("/dev"), Path("/dev/fd")):
        with writing(path):  # a device or a pipe: it has no other name
            yield path
        return
    partial = path.with_name(f".{path.stem[:100]}-{uuid4().hex[:8]}{path.suffix}")
    try:
        with writing(path):
            yield partial
            with suppress(FileNotFoundError):  # the mode that the user gave the file stays
                partial.chmod(path.stat().st_mode & 0o777)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes a file, text as UTF-8, all of it or nothing.

    Raises:
        FusionError: the disk is full, or it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)
    return Path(path)
