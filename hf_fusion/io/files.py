"""Files of folders that anybody may have written: opened only where they are regular files of their own folder.

A model's folder from the Hub, or from a stranger, may hold links to whatever else lies on this machine, pipes that
never end, devices and files that grow. All that this package reads of such a folder is opened here, and what another
library will open by itself is looked at here before (`hf_fusion.hub.snapshot`).
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from hf_fusion.errors import FusionError, one_line

MOST_BYTES = 256 << 20
"""Bytes of a file that is read whole; the largest tokenizers and index files that are known have a tenth of it."""
MOST_SECONDS = 60.0
"""Time that reading such a file may take."""
_PIECE = 1 << 20
# content that repos share, below ``blobs`` of huggingface_hub's cache
_SHARED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
_KINDS = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))


def own_file(file: Path, root: Path | None = None) -> bool:
    """Whether a file is there, in its model's folder or in the blobs of the Hub's cache, which keeps links to them.

    Args:
        file: where it should be.
        root: the model's folder, where the file lies in one within it and may be a link to one outside of that.

    Raises:
        FusionError: it is a link to somewhere else: what lies there is not the model's to read, nor to publish.
    """
    return _target(file, root) is not None


def refuse_special(file: Path) -> None:
    """Refuses what is there and is not a file: a pipe, a socket or a device, or a link to one; folders may be there.

    Raises:
        FusionError: naming it.
    """
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError, RuntimeError):  # nothing is there, or a link that leads nowhere
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _no_file(file, mode)


def open_file(file: Path, root: Path | None = None) -> BinaryIO:
    """Opens a file that is its model's own: what is checked is what is opened, even if it is replaced meanwhile.

    Args:
        file: which.
        root: as in `own_file`.

    Raises:
        FusionError: there is no such file, it is a link to somewhere else, or it cannot be read.
    """
    target = _target(file, root)
    if target is None:
        refuse_special(file)
        raise FusionError(f"{one_line(file)} cannot be read (No such file)", "fetch it again, or check the path")
    stream = open_given(target, called=file)
    try:
        is_same = os.path.samestat(os.fstat(stream.fileno()), target.lstat()) and file.resolve() == target
    except (OSError, RuntimeError):
        is_same = False
    if not is_same:
        stream.close()
        raise FusionError(
            f"{one_line(file)} was replaced while it was opened", "run it again once nothing writes to it"
        )
    return stream


def open_given(file: Path, called: object = None) -> BinaryIO:
    """Opens a file that the user has named, which may be a link; pipes and devices are not waited for.

    Args:
        file: which.
        called: what errors call it.

    Raises:
        FusionError: it cannot be read, or is not a regular file.
    """
    called = file if called is None else called
    refuse_special(file)
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FusionError(f"{one_line(called)} cannot be read ({why})", "check the path") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _no_file(called, mode)
    return os.fdopen(descriptor, "rb")


def read_file(file: Path, root: Path | None = None, most: int = MOST_BYTES) -> bytes:
    """All of a small file that is its model's own.

    Args:
        file: which.
        root: as in `own_file`.
        most: bytes that it may have.

    Raises:
        FusionError: as `open_file`; it is larger, grows while it is read, or takes more than `MOST_SECONDS`.
    """
    return _all_of(open_file(file, root), file, most)


def read_given(file: Path, most: int = MOST_BYTES) -> bytes:
    """All of a small file that the user has named, which may be a link; see `read_file`."""
    return _all_of(open_given(file), file, most)


def _all_of(opened: BinaryIO, file: Path, most: int) -> bytes:
    until = time.monotonic() + MOST_SECONDS
    with opened as stream:
        size, parts, found = os.fstat(stream.fileno()).st_size, [], 0
        if size > most:
            raise FusionError(
                f"{one_line(file)} has {size:,} bytes: no such file is larger than {most:,}", "fetch it again"
            )
        try:
            while piece := os.read(stream.fileno(), _PIECE):
                parts.append(piece)
                found += len(piece)
                if found > size:
                    raise FusionError(
                        f"{one_line(file)} grows while it is read", "run it again once nothing writes to it"
                    )
                if time.monotonic() > until:
                    raise FusionError(
                        f"{one_line(file)} takes more than {MOST_SECONDS:.0f} s to read", "copy it to a local disk"
                    )
        except OSError as error:
            raise FusionError(f"{one_line(file)} cannot be read ({error.strerror})", "fetch it again") from None
    return b"".join(parts)


def read_text(file: Path, root: Path | None = None) -> str:
    """`read_file` as text.

    Raises:
        FusionError: as `read_file`, or it is not UTF-8.
    """
    try:
        return read_file(file, root).decode()
    except UnicodeDecodeError as error:
        raise FusionError(
            f"{one_line(file)} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from None


def is_within(target: Path, root: Path) -> bool:
    """Whether a path without links is that of something in a model's folder, or of a blob that its cache links to."""
    root = root.resolve()
    return target.is_relative_to(root) or _is_blob(target, root)


def _target(file: Path, root: Path | None) -> Path | None:
    """Where a file is, without links; None where none is. See `own_file`."""
    try:
        # a link in a circle is no file; a pipe or a device would be waited for
        if not file.is_file():
            return None
        home, target = (root or file.parent).resolve(), file.resolve()
    except (OSError, RuntimeError) as error:
        raise FusionError(f"{one_line(file)} cannot be read ({error})", "check who may read it") from None
    if not target.is_relative_to(home) and not _is_blob(target, home):
        what = f"{one_line(file)} is a link to {one_line(target)}, outside its model"
        raise FusionError(what, "copy the file itself there")
    return target


def _is_blob(target: Path, home: Path) -> bool:
    """Whether a file is one that the Hub's cache links to from a snapshot: of its repo, or shared by repos.

    They lie in ``models--OWNER--NAME/blobs/ETAG``, and in ``blobs/AB/AB…`` beside all ``models--…``; the snapshot is
    ``models--OWNER--NAME/snapshots/SHA``.
    """
    snapshot = next((path for path in (home, *home.parents) if path.parent.name == "snapshots"), None)
    if snapshot is None:
        return False
    repo = snapshot.parent.parent
    if target.parent == repo / "blobs":
        return True
    shared = repo.parent / "blobs"
    is_cache = repo.name.startswith("models--") and target.is_relative_to(shared)
    return is_cache and _SHARED.fullmatch(target.relative_to(shared).as_posix()) is not None


def _no_file(file: object, mode: int) -> FusionError:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
    return FusionError(f"{one_line(file)} is {kind}, not a file", "put a file there, or take it away")
