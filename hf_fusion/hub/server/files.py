"""Writing to disk so that a crash at any point leaves the old state or the new one, never something between."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from .errors import HubError

COPY_BYTES = 1 << 20


def publish(temporary: Path, final: Path) -> None:
    """Moves a finished, fsynced file to its name in one step and makes the name itself durable."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes, scratch: Path) -> None:
    """Writes ``data`` to ``path``: temporary file in ``scratch`` (same file system), fsync, rename."""
    with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(Path(file.name), path)


def write_json(path: Path, value: Any, scratch: Path) -> None:
    """``write_atomic`` for JSON."""
    write_atomic(path, json.dumps(value, indent=1).encode(), scratch)


class IncomingFile:
    """A large file on its way in: hashed while it is written, published under its sha256 only if that is right.

    Use as a context manager; what was not published is gone at the end.
    """

    def __init__(self, scratch: Path) -> None:
        self._file: IO[bytes] = tempfile.NamedTemporaryFile(dir=scratch, delete=False)  # noqa: SIM115 - closed in __exit__
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

    def publish(self, final: Path, sha256: str, size: int | None = None) -> None:
        """Moves the file to ``final``.

        Raises:
            HubError: 400 if content or size are not what was announced.
        """
        if self.sha256 != sha256 or size not in (None, self.size):
            raise HubError(
                400,
                f"the upload does not match its name: got sha256 {self.sha256} of {self.size} bytes, "
                f"announced {sha256} of {size} bytes",
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        publish(Path(self._file.name), final)

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)
