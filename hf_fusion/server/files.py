"""Atomic and durable writes: a crash at any point leaves the old state or the new one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from hf_fusion.server.errors import HubError


def publish(temporary: Path, final: Path, root: Path) -> None:
    """Moves a finished, fsynced file to its name in one step.

    The name itself reaches the disk with the next `sync_folder`: file systems keep the order of renames. A commit
    therefore pays for it once, after its branch moved.

    Args:
        temporary: on the same file system as ``final``.
        final: where it goes; missing folders between ``root`` and it are made.
        root: must exist, so that nothing is written into a repo that was deleted meanwhile.

    Raises:
        FileNotFoundError: ``root`` is gone.
    """
    for folder in reversed(final.relative_to(root).parents[:-1]):
        with suppress(FileExistsError):  # exist_ok=True looks again, and fails if it has been deleted in between
            (root / folder).mkdir()
    temporary.replace(final)


def size_of(path: Path) -> int | None:
    """Bytes of a file, None if there is none (any more)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def files_below(folder: Path, depth: int) -> Iterator[str]:
    """Files below a folder, by their paths from it; not those deeper than `depth`, and without recursion."""
    todo = [(folder, "", 0)]
    while todo:
        directory, prefix, level = todo.pop()
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    yield f"{prefix}{entry.name}"
                elif level < depth and entry.is_dir(follow_symlinks=False):
                    todo.append((Path(entry.path), f"{prefix}{entry.name}/", level + 1))


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it, however deep; what cannot be removed stays."""
    todo, emptied = [str(folder)], []
    while todo:
        directory = todo.pop()
        emptied.append(directory)
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                else:
                    with suppress(OSError):
                        Path(entry.path).unlink()
    for directory in reversed(emptied):
        with suppress(OSError):
            Path(directory).rmdir()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder, and everything renamed before, durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def temporary_file(scratch: Path) -> Iterator[IO[bytes]]:
    """A file in ``scratch`` that is removed at the end, also if a full disk fails its last write."""
    file = tempfile.NamedTemporaryFile(dir=scratch, delete=False)  # noqa: SIM115 - closed below
    try:
        yield file
    finally:
        try:
            file.close()
        finally:
            Path(file.name).unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, scratch: Path, root: Path) -> None:
    """Writes ``data`` to ``path`` below ``root``: temporary file in ``scratch`` (same file system), fsync, rename."""
    with temporary_file(scratch) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        publish(Path(file.name), path, root)


def write_json(path: Path, value: object, scratch: Path, root: Path) -> None:
    """`write_atomic` for JSON, durable at once."""
    write_atomic(path, json.dumps(value, indent=1).encode(), scratch, root)
    sync_folder(path.parent)


class IncomingFile:
    """An upload of a large file: hashed while it is written, and published only if the sha256 is right.

    Use as a context manager; an unpublished file is removed at the end.
    """

    def __init__(self, scratch: Path) -> None:
        self._held = ExitStack()
        self._file = self._held.enter_context(temporary_file(scratch))
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> IncomingFile:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Appends."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._hash.hexdigest()

    def publish(self, final: Path, root: Path, sha256: str, size: int | None = None) -> None:
        """Moves the file to ``final``, somewhere below ``root``.

        Raises:
            HubError: 400 if content or size are not what was announced.
        """
        if self.sha256 != sha256 or size not in (None, self.size):
            raise HubError(
                400,
                f"the upload differs from what was announced: received sha256 {self.sha256} of {self.size} bytes "
                f"instead of {sha256} of {size} bytes",
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        publish(Path(self._file.name), final, root)

    def __exit__(self, *exc: object) -> None:
        self._held.close()
