"""The files of a merged model: sizes are known before the first value, so shards are laid out first, then filled.

Everything is written into a hidden folder beside the output and moved there when all of it is on the disk. A run that
was killed leaves that folder; the next run of the same merge keeps its finished shards, any other begins anew. A run
that fails leaves nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_fusion.errors import FusionError, writing
from hf_fusion.families import STALE
from hf_fusion.io.folders import restore_folder
from hf_fusion.io.saving import write_file
from hf_fusion.merging.engine.checkpoint import DTYPES, INDEX, SINGLE, Entry
from hf_fusion.recipe import RECIPE_FILE

SHARD_BYTES = 5_000_000_000
FACTS = "merge.json"
"""What there is to tell of a merge beside its recipe, if anything; cards have it from there."""


@dataclass(frozen=True)
class Spec:
    """A tensor that is to be written.

    Attributes:
        name: as the model calls it.
        dtype: safetensors' name of its type.
        shape: its sizes.
        folder: the folder within the model's that its file lies in, which is the beginning of its name; "": none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    folder: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def stored(self) -> str:
        """Its name in its file."""
        return self.name.removeprefix(f"{self.folder}/") if self.folder else self.name


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


def layout(specs: Sequence[Spec], most: int = SHARD_BYTES) -> list[tuple[str, list[Spec]]]:
    """The files of a merged model and what they hold: its shards, and one file for each module in a folder below it."""
    shards = shards_of([spec for spec in specs if not spec.folder], most)
    folders = dict.fromkeys(spec.folder for spec in specs if spec.folder)
    files = [(shard_name(number, len(shards)), shard) for number, shard in enumerate(shards)]
    return files + [(f"{own}/{SINGLE}", [spec for spec in specs if spec.folder == own]) for own in folders]


def shard_name(number: int, count: int) -> str:
    """The name of one of so many files, as transformers looks for it."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class Shard:
    """One file in the making: ``with Shard(…) as shard`` closes it, whole or not.

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
            header[spec.stored] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
            starts.append(end)
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self.entries = {
            spec.name: Entry(spec.name, spec.dtype, spec.shape, file, data + start)
            for spec, start in zip(specs, starts, strict=True)
        }
        self._begin, self._size = len(text).to_bytes(8, "little") + text, data + end

    def __enter__(self) -> Shard:
        with disk_full_named(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                self._reserve(self._size)
                self._put(self._begin, 0)
            except BaseException:
                os.close(self._file)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _reserve(self, size: int) -> None:
        """Asks for all of the disk that is needed before any of it is filled."""
        if not hasattr(os, "posix_fallocate"):  # macOS
            os.ftruncate(self._file, size)
            return
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._file, size)

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Puts a tensor's elements from `start` on, as bytes, in their place."""
        entry = self.entries[name]
        with disk_full_named(self.file.parent):
            self._put(values.data, entry.start + start * entry.itemsize)

    def _put(self, view: memoryview | bytes, offset: int) -> None:
        while view:
            put = os.pwrite(self._file, view, offset)
            offset, view = offset + put, view[put:]

    def finish(self) -> None:
        """The file is whole: it gets its name once its bytes are on the disk."""
        with disk_full_named(self.file.parent):
            os.fsync(self._file)
            self._part.rename(self.file)


def write_index(folder: Path, shards: Sequence[Sequence[Spec]]) -> None:
    """Which file holds which tensor, where there is more than one."""
    if len(shards) == 1:
        return
    places = {spec.name: shard_name(number, len(shards)) for number, shard in enumerate(shards) for spec in shard}
    total = sum(spec.nbytes for shard in shards for spec in shard)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_file(folder / INDEX, json.dumps(content, indent=2) + "\n")


def output_folder(folder: str | Path) -> Path:
    """Where a merged model will lie, links followed.

    Raises:
        FusionError: no folder can be put there as a whole.
    """
    given = Path(folder)
    with disk_full_named(given):
        if given.is_symlink() and not given.is_dir():
            raise FusionError(f"{given} is a link to no folder", "remove it, or choose another --output")
        try:
            folder = given.resolve()
        except RuntimeError:  # what Python before 3.13 says of links in a circle
            raise FusionError(f"{given} lies behind links in a circle", "choose another --output") from None
        if folder.exists() and not folder.is_dir():
            raise FusionError(f"{given} is a file", "remove it, or choose another --output")
        if os.path.ismount(folder):
            raise FusionError(f"{given} is a mount point: no folder can be moved there", f"--output {given / 'merged'}")
    return folder


def place_of(folder: Path) -> Path:
    """The hidden folder that a merge is written to."""
    return folder.with_name(f".{folder.name}.merging")


@contextmanager
def staging(folder: Path, digest: str, needed: int) -> Iterator[Path]:
    """The hidden folder that a merge is written to, its own until it is done.

    Args:
        folder: where the merged model will lie.
        digest: of all that decides the bytes: a folder that another merge left is cleared.
        needed: bytes that will be written.

    Raises:
        FusionError: another process writes there now; it cannot be written; or there is too little room on the disk.
    """
    place = place_of(folder)
    with disk_full_named(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # it says of which merge the hidden folder is the beginning
        lock = folder.with_name(f".{folder.name}.lock")
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if not _is_ours(held, lock):
            raise FusionError(f"{folder} is being written by another process", "wait for it")
        try:
            with disk_full_named(folder.parent):
                _begin(place, folder, held, digest, needed)
            yield place
        except Exception:  # it would go wrong again; only who is killed, or stopped by hand, goes on where it was
            shutil.rmtree(place, ignore_errors=True)
            lock.unlink(missing_ok=True)
            raise
        lock.unlink(missing_ok=True)
    finally:
        os.close(held)


def _is_ours(held: int, lock: Path) -> bool:
    """Locks an open file, unless another process holds it, or has just unlinked it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(held), lock.lstat())
    except OSError:
        return False


def _begin(place: Path, folder: Path, held: int, digest: str, needed: int) -> None:
    """Clears what is not to be kept of an earlier run, and asks for room."""
    restore_folder(place, folder)
    # what a loader would take for part of the merged model goes when an earlier merge is replaced: no other's
    stale = (path for pattern in STALE for path in folder.glob(pattern))
    if not (folder / RECIPE_FILE).exists() and (foreign := next(stale, None)):
        raise FusionError(
            f"{folder} holds {foreign.name}, and no {RECIPE_FILE} of an earlier merge",
            "choose another --output, or clear it",
        )
    if place.exists() and os.pread(held, len(digest) + 1, 0) != digest.encode():
        shutil.rmtree(place)
    place.mkdir(exist_ok=True)
    done = 0
    for path in place.iterdir():
        if path.suffix == ".safetensors":
            done += path.stat().st_size
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    free = shutil.disk_usage(place).free
    if needed - done > free:
        raise FusionError(
            f"{folder} needs {(needed - done) / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left",
            "free some, or choose another --output",
        )
    os.ftruncate(held, 0)
    os.pwrite(held, digest.encode(), 0)


def disk_full_named(folder: Path) -> AbstractContextManager[None]:
    """Turns the system's word for a full disk, or a place that cannot be written, into an error with the next step."""
    return writing(folder, "choose another --output")


def as_bytes(values: torch.Tensor, dtype: str, buffer: torch.Tensor) -> np.ndarray:
    """Values (n,) as the bytes of another type, in a buffer that has room for them."""
    wanted = getattr(torch, DTYPES[dtype][0])
    if values.dtype is wanted:
        return values.contiguous().view(torch.uint8).numpy()
    raw = buffer[: len(values) * DTYPES[dtype][1]]
    raw.view(wanted).copy_(values)
    return raw.numpy()
