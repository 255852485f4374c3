"""The files of a merged model: sizes are known before the first value, so shards are laid out first, then filled.

Everything is written into a hidden folder beside the output and moved there when all of it is on the disk. A run that
was killed leaves that folder; the next run of the same merge keeps its finished shards, any other begins anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_fusion.errors import FusionError
from hf_fusion.merging.checkpoint import DTYPES, INDEX, SINGLE, Entry

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Spec:
    """A tensor that is to be written.

    Attributes:
        name: as the model calls it.
        dtype: safetensors' name of its type.
        shape: its sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype][1]


def shards_of(specs: Sequence[Spec], most: int = SHARD_BYTES) -> list[list[Spec]]:
    """Tensors by the file they go to, in order; no file holds more bytes, but for a tensor that alone does."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    """The name of one of so many files, as transformers looks for it."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class Shard:
    """One file in the making.

    Args:
        file: where it will lie; until it is whole it has another name.
        specs: what it holds.
    """

    def __init__(self, file: Path, specs: Sequence[Spec]) -> None:
        self.file, self._part = file, file.with_name(f"{file.name}.part")
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        starts, end = [], 0
        for spec in specs:
            span = [end, end + spec.nbytes]
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
            starts.append(end)
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self.entries = {
            spec.name: Entry(spec.name, spec.dtype, spec.shape, file, data + start)
            for spec, start in zip(specs, starts, strict=True)
        }
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        with disk_full_named(file.parent):
            self._reserve(8 + len(text) + end)
            os.pwrite(self._file, len(text).to_bytes(8, "little") + text, 0)

    def _reserve(self, size: int) -> None:
        """Asks for all of the disk that is needed before any of it is filled."""
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._file, size)

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Puts a tensor's elements from `start` on, as bytes, in their place."""
        entry = self.entries[name]
        offset, view = entry.start + start * entry.itemsize, values.data
        with disk_full_named(self.file.parent):
            while view:
                put = os.pwrite(self._file, view, offset)
                offset, view = offset + put, view[put:]

    def finish(self) -> None:
        """The file is whole: it gets its name once its bytes are on the disk."""
        with disk_full_named(self.file.parent):
            os.fsync(self._file)
            os.close(self._file)
            self._part.rename(self.file)


def write_index(folder: Path, shards: Sequence[Sequence[Spec]]) -> None:
    """Which file holds which tensor, where there is more than one."""
    if len(shards) == 1:
        return
    places = {spec.name: shard_name(number, len(shards)) for number, shard in enumerate(shards) for spec in shard}
    total = sum(spec.nbytes for shard in shards for spec in shard)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staging(folder: Path, digest: str, needed: int) -> Iterator[Path]:
    """The hidden folder that a merge is written to, its own until it is done.

    Args:
        folder: where the merged model will lie.
        digest: of all that decides the bytes: a folder that another merge left is cleared.
        needed: bytes that will be written.

    Raises:
        FusionError: another process writes there now; or there is too little room on the disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f".{folder.name}.merging")
    lock = folder.with_name(f".{folder.name}.lock")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FusionError(f"{folder} is being written by another process", "wait for it") from None
        try:
            mark = place / "digest"
            if place.exists() and (not mark.exists() or mark.read_text() != digest):
                shutil.rmtree(place)
            done = sum(file.stat().st_size for file in place.glob("*.safetensors")) if place.exists() else 0
            free = shutil.disk_usage(folder.parent).free
            if needed - done > free:
                raise FusionError(
                    f"{folder} needs {(needed - done) / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left",
                    "free some, or choose another --output",
                )
            place.mkdir(exist_ok=True)
            mark.write_text(digest)
            yield place
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def disk_full_named(folder: Path) -> Iterator[None]:
    """Turns the system's word for a full disk into an error that names the place and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise FusionError(
            f"{folder}: no room left on the disk ({error.strerror})", "free some, or choose another --output"
        ) from None


def as_bytes(values: torch.Tensor, dtype: str, buffer: torch.Tensor) -> np.ndarray:
    """Values (n,) as the bytes of another type, in a buffer that has room for them."""
    wanted = getattr(torch, DTYPES[dtype][0])
    if values.dtype is wanted:
        return values.contiguous().numpy().view(np.uint8)
    raw = buffer[: len(values) * DTYPES[dtype][1]]
    raw.view(wanted).copy_(values)
    return raw.numpy()
