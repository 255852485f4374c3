"""Writes the safetensors files of a merged model; shards are laid out before the first value is computed.

Everything is written to a hidden staging folder beside the output, which is moved into place once it is complete. A
killed run leaves the staging folder: the next run of the same merge keeps its finished shards, any other merge clears
it. A run that fails removes it.
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
from hf_fusion.merging.engine.checkpoint import DTYPES, INDEX, SINGLE, TensorEntry
from hf_fusion.recipe import RECIPE_FILE

SHARD_BYTES = 5_000_000_000
FACTS = "merge.json"
"""Facts about a merge that its recipe does not record, for the card; written only if there are any."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write.

    Attributes:
        name: in the model.
        dtype: safetensors' name of its dtype.
        shape: of the tensor.
        folder: the subfolder of its file, which is also the prefix of its name; "" for the model's folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    folder: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def name_in_file(self) -> str:
        """Its name in its file, without the subfolder."""
        return self.name.removeprefix(f"{self.folder}/") if self.folder else self.name


def split_into_shards(specs: Sequence[TensorSpec], most: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """Splits tensors, in order, into shards of at most `most` bytes; a larger tensor gets a shard for itself."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def plan_files(specs: Sequence[TensorSpec], most: int = SHARD_BYTES) -> list[tuple[str, list[TensorSpec]]]:
    """The files of a merged model with their tensors: its shards, and one file per module in a subfolder."""
    shards = split_into_shards([spec for spec in specs if not spec.folder], most)
    folders = dict.fromkeys(spec.folder for spec in specs if spec.folder)
    files = [(shard_name(number, len(shards)), shard) for number, shard in enumerate(shards)]
    return files + [(f"{name}/{SINGLE}", [spec for spec in specs if spec.folder == name]) for name in folders]


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` of `count`, as in transformers."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


class Shard:
    """Writes one safetensors file: ``with Shard(…) as shard`` closes it, complete or not.

    Args:
        file: path of the complete file; until `finish` it has the suffix ``.part``.
        specs: its tensors.
    """

    def __init__(self, file: Path, specs: Sequence[TensorSpec]) -> None:
        self.file, self._part = file, file.with_name(f"{file.name}.part")
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        starts, end = [], 0
        for spec in specs:
            span = [end, end + spec.nbytes]
            header[spec.name_in_file] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
            starts.append(end)
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self.entries = {
            spec.name: TensorEntry(spec.name, spec.dtype, spec.shape, file, data + start)
            for spec, start in zip(specs, starts, strict=True)
        }
        self._header, self._size = len(text).to_bytes(8, "little") + text, data + end

    def __enter__(self) -> Shard:
        with explain_disk_errors(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                self._reserve(self._size)
                self._put(self._header, 0)
            except BaseException:
                os.close(self._file)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _reserve(self, size: int) -> None:
        """Reserves the disk space of the whole file."""
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
        """Writes elements of a tensor from `start` on, as bytes."""
        entry = self.entries[name]
        with explain_disk_errors(self.file.parent):
            self._put(values.data, entry.start + start * entry.itemsize)

    def _put(self, view: memoryview | bytes, offset: int) -> None:
        while view:
            count = os.pwrite(self._file, view, offset)
            offset, view = offset + count, view[count:]

    def finish(self) -> None:
        """Flushes the complete file to disk and gives it its final name."""
        with explain_disk_errors(self.file.parent):
            os.fsync(self._file)
            self._part.rename(self.file)


def write_index(folder: Path, shards: Sequence[Sequence[TensorSpec]]) -> None:
    """Writes the index of tensors to shards, if there is more than one."""
    if len(shards) == 1:
        return
    files = {spec.name: shard_name(index, len(shards)) for index, shard in enumerate(shards) for spec in shard}
    total = sum(spec.nbytes for shard in shards for spec in shard)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_file(folder / INDEX, json.dumps(content, indent=2) + "\n")


def output_folder(folder: str | Path) -> Path:
    """The absolute path of an output folder, with links resolved.

    Raises:
        FusionError: the path is a file, a broken link or a mount point.
    """
    given = Path(folder)
    with explain_disk_errors(given):
        if given.is_symlink() and not given.is_dir():
            raise FusionError(f"{given} is a broken link, or a link to a file", "remove it, or choose another --output")
        try:
            folder = given.resolve()
        except RuntimeError:  # Python before 3.13, for circular links
            raise FusionError(f"{given} is behind circular links", "choose another --output") from None
        if folder.exists() and not folder.is_dir():
            raise FusionError(f"{given} is a file", "remove it, or choose another --output")
        if os.path.ismount(folder):
            raise FusionError(f"{given} is a mount point: no folder can be moved there", f"--output {given / 'merged'}")
    return folder


def staging_path(folder: Path) -> Path:
    """The hidden folder that a merge is written to before it is moved to `folder`."""
    return folder.with_name(f".{folder.name}.merging")


@contextmanager
def staging(folder: Path, digest: str, needed: int) -> Iterator[Path]:
    """Locks and prepares the staging folder of a merge.

    Args:
        folder: the output folder.
        digest: of everything that determines the bytes; the staging folder of another merge is cleared.
        needed: bytes to write.

    Yields:
        The staging folder.

    Raises:
        FusionError: another process is writing to it, it cannot be written, or there is too little disk space.
    """
    staging_folder = staging_path(folder)
    with explain_disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # holds the digest of the merge that the staging folder belongs to
        lock = folder.with_name(f".{folder.name}.lock")
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if not _try_lock(held, lock):
            raise FusionError(f"{folder} is being written by another process", "wait for it")
        try:
            with explain_disk_errors(folder.parent):
                _prepare(staging_folder, folder, held, digest, needed)
            yield staging_folder
        except Exception:  # would fail again; only a killed or interrupted run can be resumed
            shutil.rmtree(staging_folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
            raise
        lock.unlink(missing_ok=True)
    finally:
        os.close(held)


def _try_lock(held: int, lock: Path) -> bool:
    """Locks an open file; False if another process holds the lock or has just unlinked the file."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(held), lock.lstat())
    except OSError:
        return False


def _prepare(staging_folder: Path, folder: Path, held: int, digest: str, needed: int) -> None:
    """Removes what an earlier run left, except finished shards of this merge, and checks the disk space."""
    restore_folder(staging_folder, folder)
    # stale files, which a loader would read as part of the merged model, are only removed from an earlier merge
    stale = (path for pattern in STALE for path in folder.glob(pattern))
    if not (folder / RECIPE_FILE).exists() and (foreign := next(stale, None)):
        raise FusionError(
            f"{folder} holds {foreign.name}, and no {RECIPE_FILE} of an earlier merge",
            "choose another --output, or clear it",
        )
    if staging_folder.exists() and os.pread(held, len(digest) + 1, 0) != digest.encode():
        shutil.rmtree(staging_folder)
    staging_folder.mkdir(exist_ok=True)
    done = 0
    for path in staging_folder.iterdir():
        if path.suffix == ".safetensors":
            done += path.stat().st_size
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    free = shutil.disk_usage(staging_folder).free
    if needed - done > free:
        raise FusionError(
            f"{folder} needs {(needed - done) / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left",
            "free some, or choose another --output",
        )
    os.ftruncate(held, 0)
    os.pwrite(held, digest.encode(), 0)


def explain_disk_errors(folder: Path) -> AbstractContextManager[None]:
    """Turns disk errors of the system (full, read-only …) into a FusionError with the next step."""
    return writing(folder, "choose another --output")


def convert_to_bytes(values: torch.Tensor, dtype: str, buffer: torch.Tensor) -> np.ndarray:
    """Values (n,) converted to `dtype`, as bytes; `buffer` must have room for them."""
    wanted = getattr(torch, DTYPES[dtype][0])
    if values.dtype is wanted:
        return values.contiguous().view(torch.uint8).numpy()
    raw = buffer[: len(values) * DTYPES[dtype][1]]
    raw.view(wanted).copy_(values)
    return raw.numpy()
