"""A checkpoint as what its headers say: every tensor's name, type, shape and place; values are read piece by piece.

Safetensors come from strangers: everything a header says is checked before any of it is believed.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from hf_fusion.errors import FusionError, shown
from hf_fusion.hub.snapshot import read_index, unique_keys, why_not
from hf_fusion.io.files import open_file, own_file

if TYPE_CHECKING:
    import numpy as np

# safetensors' name of a type -> (torch's, bytes of an element); those of less than a byte are not merged
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
FLOATS = tuple(name for name in DTYPES if name[0] in "FB" and name != "BOOL")
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_NAME = 500  # characters of a tensor's name
MAX_NUMEL = 1 << 62  # elements: what 64 bits can count
MAX_DIMENSIONS = 64  # torch's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        name: as the file calls it.
        dtype: safetensors' name of its type, a key of `DTYPES`.
        shape: its sizes.
        file: the file that holds it.
        start: offset of its first byte in the file.
        root: its model's folder, where the file lies in one within it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    root: Path | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.itemsize

    @property
    def is_float(self) -> bool:
        """Whether it holds weights, rather than positions or masks."""
        return self.dtype in FLOATS


class Files:
    """Open files, by path: each is opened once and read from any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, entry: Entry, start: int, buffer: np.ndarray) -> None:
        """Elements of a tensor from `start` on, as many as fit in a buffer of bytes.

        Raises:
            FusionError: the file ends before, or cannot be read.
        """
        with self._lock:
            if entry.file not in self._open:
                with open_file(entry.file, entry.root) as stream:
                    self._open[entry.file] = os.dup(stream.fileno())
        file, offset, view = self._open[entry.file], entry.start + start * entry.itemsize, buffer.data
        while view:
            try:
                got = os.preadv(file, [view], offset)
            except OSError as error:
                raise FusionError(f"{entry.file}: {entry.name} cannot be read ({error.strerror})") from None
            if not got:
                raise FusionError(f"{entry.file} ends within {entry.name}", "fetch it again: it is cut off")
            offset, view = offset + got, view[got:]

    def close(self) -> None:
        """Closes all files."""
        for file in self._open.values():
            os.close(file)
        self._open.clear()


def read_header(file: Path, root: Path | None = None) -> dict[str, Entry]:
    """What a safetensors file holds, by name, in the order of the file.

    Args:
        file: which.
        root: its model's folder, where it lies in one within it.

    Raises:
        FusionError: naming the file and what is wrong with it: a header that is cut off, too long, no JSON or that
            names a tensor twice; a name that cannot be shown; a type that is not known; sizes that are none; offsets
            that overlap, leave gaps or do not fit the shape.
    """
    try:
        with open_file(file, root) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _broken(file, f"its header of {length} bytes does not fit into its {size} bytes: it is cut off")
            if length > MAX_HEADER:
                raise _broken(file, f"its header of {length} bytes is longer than {MAX_HEADER}")
            raw = stream.read(length)
    except OSError as error:
        raise FusionError(f"{file} cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)  # UTF-8 alone, as safetensors reads it
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid ({why_not(error)})") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    found = [(_span(file, name, row), _entry(file, root, name, row, 8 + length)) for name, row in header.items()]
    end = 0
    for (start, stop), entry in sorted(found, key=lambda pair: pair[0]):
        if start != end:
            raise _broken(file, f"{entry.name} begins at byte {start} of the data, and what is before ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise _broken(file, f"its tensors end at byte {8 + length + end}, the file at {size}")
    return {entry.name: entry for _, entry in sorted(found, key=lambda pair: pair[0])}


def read_checkpoint(folder: Path, name: str, root: Path | None = None) -> dict[str, Entry]:
    """All tensors of a model's folder: of ``model.safetensors``, or of the shards that its index names.

    Args:
        folder: where the files lie.
        name: what errors call the model.
        root: the model's folder, where `folder` is one within it.

    Raises:
        FusionError: there is neither, one of the files is broken, or the index does not tell what the shards hold.
    """
    if own_file(folder / SINGLE, root):
        return read_header(folder / SINGLE, root)
    if not own_file(folder / INDEX, root):
        raise FusionError(f"{name} has no {SINGLE} and no {INDEX}", "only safetensors are merged")
    places = read_index(folder / INDEX, name)
    tensors: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        if not own_file(folder / shard, root):
            raise FusionError(f"{name} lacks {shard}, which its {INDEX} names", "fetch it again")
        for key, entry in read_header(folder / shard, root).items():
            if places.get(key) == shard:
                tensors[key] = entry
    if missing := next((key for key in places if key not in tensors), None):
        raise FusionError(
            f"{name}: {shown(missing)} is not in {places[missing]}, where its {INDEX} has it", "fetch it again"
        )
    return tensors


def _broken(file: Path, why: str) -> FusionError:
    return FusionError(f"{file} is not a valid safetensors file: {why}", "fetch it again, or save it again")


def _span(file: Path, name: str, row: object) -> tuple[int, int]:
    """A tensor's bytes in the data: first, and behind the last."""
    if not name or not name.isprintable() or len(name) > MAX_NAME:
        raise _broken(file, f"{shown(name)} is no name of a tensor")
    if not isinstance(row, Mapping) or not _counts(row.get("data_offsets")) or len(row["data_offsets"]) != 2:
        raise _broken(file, f"{name} has no two data_offsets")
    start, stop = row["data_offsets"]
    return start, stop


def _entry(file: Path, root: Path | None, name: str, row: Mapping[str, Any], data: int) -> Entry:
    dtype, shape = row.get("dtype"), row.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(file, f"{name} is of type {shown(dtype)}; known are {', '.join(DTYPES)}")
    # sizes beside a 0 count too: such a tensor has no elements, but it has strides
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(1, n) for n in shape) > MAX_NUMEL:
        raise _broken(file, f"{name} has the shape {shown(shape)}")
    start, stop = row["data_offsets"]
    entry = Entry(name, dtype, tuple(shape), file, data + start, root)
    if stop - start != entry.nbytes:
        raise _broken(
            file, f"{name} takes {stop - start} bytes, {entry.dtype} {list(entry.shape)} needs {entry.nbytes}"
        )
    return entry


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_NUMEL for n in value)
