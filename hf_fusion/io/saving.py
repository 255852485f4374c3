"""Writes files atomically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from hf_fusion.errors import writing


@contextmanager
def in_folder(folder: str | Path) -> Iterator[None]:
    """Creates a folder and its parents; if the block fails, removes those that are empty again.

    Raises:
        FusionError: the folder cannot be created.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a hidden file beside `path`, with the same suffix, which replaces `path` after the block.

    After an error the old file is unchanged; after a kill the hidden file remains beside it.

    Raises:
        FusionError: the disk is full, or it cannot be written.
    """
    path = Path(path)
    if (path.exists() and not path.is_file()) or path.parent in (Path("/dev"), Path("/dev/fd")):
        with writing(path):  # a device or a pipe is written directly
            yield path
        return
    partial = path.with_name(f".{path.stem[:100]}-{uuid4().hex[:8]}{path.suffix}")
    try:
        with writing(path):
            yield partial
            with suppress(FileNotFoundError):  # keeps the mode of the old file
                partial.chmod(path.stat().st_mode & 0o777)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes a file atomically, text as UTF-8.

    Raises:
        FusionError: the disk is full, or it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)
    return Path(path)
