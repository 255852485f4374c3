"""Opens files of untrusted folders, only if they are regular files within the folder.

A model's folder may contain links to other files of this machine, pipes, devices, and files that grow. All files that
this package reads from such folders are opened here; files that other libraries open are checked here first
(`hf_fusion.hub.snapshot_checks`).
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from hf_fusion.errors import FusionError, one_line, path_suggestion

MOST_BYTES = 256 << 20
"""Maximum bytes of a file that is read in full; ten times the largest known tokenizers and index files."""
MOST_SECONDS = 60.0
"""Maximum time for reading such a file."""
_PIECE = 1 << 20
# blobs shared by repos, below ``blobs`` of huggingface_hub's cache
_SHARED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
_KINDS = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))


def own_file(file: Path, root: Path | None = None) -> bool:
    """Whether a file exists in its model's folder, or is a link of the Hub's cache to one of its blobs.

    Args:
        file: path.
        root: the model's folder, if the file is in a subfolder of it.

    Raises:
        FusionError: it is a link out of the model's folder: its target must not be read or published.
    """
    return _target(file, root) is not None


def refuse_special(file: Path) -> None:
    """Raises for a pipe, a socket or a device, or a link to one; not for files, folders or missing paths.

    Raises:
        FusionError: naming the path.
    """
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError, RuntimeError):  # missing, or a broken link
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _not_a_file(file, mode)


def open_file(file: Path, root: Path | None = None) -> BinaryIO:
    """Opens a file of a model's folder; the check applies to the opened file, even if the path is replaced meanwhile.

    Args:
        file: path.
        root: see `own_file`.

    Raises:
        FusionError: the file does not exist, is a link out of the folder, or cannot be read.
    """
    target = _target(file, root)
    if target is None:
        refuse_special(file)
        raise FusionError(
            f"{one_line(file)} cannot be read (no such file)", "check the path, or download the model again"
        )
    stream = open_given(target, called=file)
    try:
        is_same = os.path.samestat(os.fstat(stream.fileno()), target.lstat()) and file.resolve() == target
    except (OSError, RuntimeError):
        is_same = False
    if not is_same:
        stream.close()
        raise FusionError(
            f"{one_line(file)} was replaced while it was opened",
            "run the command again when nothing writes to the file",
        )
    return stream


def open_given(file: Path, called: object = None) -> BinaryIO:
    """Opens a file that the user named, which may be a link; never blocks on pipes and devices.

    Args:
        file: path.
        called: its name in errors.

    Raises:
        FusionError: it cannot be read, or is not a regular file.
    """
    called = file if called is None else called
    refuse_special(file)
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FusionError(
            f"{one_line(called)} cannot be read ({why})", path_suggestion(file, "check the path")
        ) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_a_file(called, mode)
    return os.fdopen(descriptor, "rb")


def read_file(file: Path, root: Path | None = None, most: int = MOST_BYTES) -> bytes:
    """The content of a small file of a model's folder.

    Args:
        file: path.
        root: see `own_file`.
        most: maximum bytes.

    Raises:
        FusionError: see `open_file`; or it is too large, grows while it is read, or takes more than `MOST_SECONDS`.
    """
    return _read_all(open_file(file, root), file, most)


def read_given(file: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a small file that the user named, which may be a link; see `read_file`."""
    return _read_all(open_given(file), file, most)


def _read_all(opened: BinaryIO, file: Path, most: int) -> bytes:
    until = time.monotonic() + MOST_SECONDS
    with opened as stream:
        size, parts, found = os.fstat(stream.fileno()).st_size, [], 0
        if size > most:
            raise FusionError(
                f"{one_line(file)} has {size:,} bytes, more than the limit of {most:,}", "download it again"
            )
        try:
            while piece := os.read(stream.fileno(), _PIECE):
                parts.append(piece)
                found += len(piece)
                if found > size:
                    raise FusionError(
                        f"{one_line(file)} grew while it was read",
                        "run the command again when nothing writes to the file",
                    )
                if time.monotonic() > until:
                    raise FusionError(
                        f"{one_line(file)} takes more than {MOST_SECONDS:.0f} s to read", "copy it to a local disk"
                    )
        except OSError as error:
            raise FusionError(f"{one_line(file)} cannot be read ({error.strerror})", "download it again") from None
    return b"".join(parts)


def read_text(file: Path, root: Path | None = None) -> str:
    """`read_file` as text.

    Raises:
        FusionError: see `read_file`; or it is not UTF-8.
    """
    try:
        return read_file(file, root).decode()
    except UnicodeDecodeError as error:
        raise FusionError(
            f"{one_line(file)} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from None


def is_within(target: Path, root: Path) -> bool:
    """Whether a resolved path is in a model's folder, or is a blob that the Hub's cache links to."""
    root = root.resolve()
    return target.is_relative_to(root) or _is_blob(target, root)


def _target(file: Path, root: Path | None) -> Path | None:
    """The resolved path of a file; None if it does not exist. See `own_file`."""
    try:
        # False for circular links, pipes and devices
        if not file.is_file():
            return None
        home, target = (root or file.parent).resolve(), file.resolve()
    except (OSError, RuntimeError) as error:
        raise FusionError(f"{one_line(file)} cannot be read ({error})", "check its permissions") from None
    if not target.is_relative_to(home) and not _is_blob(target, home):
        what = f"{one_line(file)} is a link to {one_line(target)}, outside the model's folder"
        raise FusionError(what, "replace the link with the file itself")
    return target


def _is_blob(target: Path, home: Path) -> bool:
    """Whether a file is a blob of the Hub's cache for the repo of a snapshot, or one shared by repos.

    Blobs are in ``models--OWNER--NAME/blobs/ETAG``, and in ``blobs/AB/AB…`` beside ``models--…``; snapshots are
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


def _not_a_file(file: object, mode: int) -> FusionError:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
    return FusionError(f"{one_line(file)} is {kind}, not a file", "replace it with a file, or remove it")
