"""Small real file systems that are full or read-only."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NO_MOUNT = "only root may mount a file system; elsewhere: unshare --map-root-user --mount python -m pytest FILE"


class SmallDisk:
    """A mounted file system of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def full(self, leave: int = 0) -> Iterator[None]:
        """Something else takes all but `leave` bytes."""
        other = self.path / "other"
        with other.open("wb") as file:
            while (size := min(1 << 16, shutil.disk_usage(self.path).free - leave)) > 0:
                file.write(b"\1" * size)
                file.flush()
        try:
            yield
        finally:
            other.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written, whoever has files open: the same disk is mounted over itself."""
        subprocess.run(["mount", "--bind", self.path, self.path], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", self.path], check=True)
            yield
        finally:
            subprocess.run(["umount", "--lazy", self.path], check=True)


@contextmanager
def small_disk(path: Path, megabytes: int = 8) -> Iterator[SmallDisk]:
    """Mounts one at `path`; skips the test where that is not allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(NO_MOUNT)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def contents(folder: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, hidden ones too, with what it holds."""

    def shown(path: Path) -> str:
        if path.is_symlink():
            return f"→ {path.readlink()}"
        return "/" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {path.relative_to(folder).as_posix(): shown(path) for path in sorted(folder.rglob("*"))}
