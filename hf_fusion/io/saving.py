"""Files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from hf_fusion.errors import writing


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
