"""Reads safetensors headers: name, dtype, shape and file offset of every tensor; values are read in pieces on demand.

Files are untrusted: every field of a header is validated before it is used.
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
from hf_fusion.hub.snapshot_checks import parser_message, read_index, unique_keys
from hf_fusion.io.files import open_file, own_file

if TYPE_CHECKING:
    import numpy as np

# safetensors' name of a dtype -> (torch's name, bytes per element); dtypes of less than a byte are not supported
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
MAX_NUMEL = 1 << 62  # elements: fits in a signed 64-bit integer
MAX_DIMENSIONS = 64  # torch's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """The location of a tensor in a safetensors file.

    Attributes:
        name: its name in the file.
        dtype: safetensors' name of its dtype, a key of `DTYPES`.
        shape: of the tensor.
        file: the file that holds it.
        start: offset of its first byte in the file.
        root: the model's folder, if the file is in a subfolder of it.
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
        """Bytes per element."""
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize

    @property
    def is_float(self) -> bool:
        """Whether its dtype is a floating-point type."""
        return self.dtype in FLOATS


class OpenFiles:
    """Keeps files open by path: each is opened once and can be read from any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, entry: TensorEntry, start: int, buffer: np.ndarray) -> None:
        """Fills a byte buffer with the elements of a tensor from `start` on.

        Raises:
            FusionError: the file is truncated or cannot be read.
        """
        with self._lock:
            if entry.file not in self._open:
                with open_file(entry.file, entry.root) as stream:
                    self._open[entry.file] = os.dup(stream.fileno())
        file, offset, view = self._open[entry.file], entry.start + start * entry.itemsize, buffer.data
        while view:
            try:
                count = os.preadv(file, [view], offset)
            except OSError as error:
                raise FusionError(f"{entry.file}: {entry.name} cannot be read ({error.strerror})") from None
            if not count:
                raise FusionError(f"{entry.file} ends within {entry.name}", "download it again: it is truncated")
            offset, view = offset + count, view[count:]

    def memory_of(self, name: str) -> dict[Any, Any] | None:
        """What is kept between merges of a tensor, see `Tensors`; None: nothing is."""
        return None

    def close(self) -> None:
        """Closes all files."""
        for file in self._open.values():
            os.close(file)
        self._open.clear()


class HeldFiles(OpenFiles):
    """Reads each tensor from its file once, as a whole, and holds its bytes in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[tuple[Path, str], np.ndarray] = {}
        self._memories: dict[str, dict[Any, Any]] = {}

    def memory_of(self, name: str) -> dict[Any, Any] | None:
        """See `OpenFiles.memory_of`."""
        return self._memories.setdefault(name, {})

    def read(self, entry: TensorEntry, start: int, buffer: np.ndarray) -> None:
        """See `OpenFiles.read`."""
        import numpy as np

        key = (entry.file, entry.name)
        if (held := self._held.get(key)) is None:
            held = np.empty(entry.nbytes, dtype=np.uint8)
            super().read(entry, 0, held)
            self._held[key] = held
        first = start * entry.itemsize
        buffer[...] = held[first : first + len(buffer)]


def read_header(file: Path, root: Path | None = None) -> dict[str, TensorEntry]:
    """Reads the header of a safetensors file: name -> entry, in the order of the data.

    Args:
        file: path.
        root: the model's folder, if the file is in a subfolder of it.

    Raises:
        FusionError: the header is truncated, too long, not JSON, or names a tensor twice; a name is not printable; a
            dtype is unknown; a shape is invalid; or offsets overlap, leave gaps or do not match the shape.
    """
    try:
        with open_file(file, root) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _broken(file, f"its header of {length} bytes does not fit into its {size} bytes: it is truncated")
            if length > MAX_HEADER:
                raise _broken(file, f"its header of {length} bytes is longer than {MAX_HEADER}")
            raw = stream.read(length)
    except OSError as error:
        raise FusionError(f"{file} cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)  # only UTF-8, as in safetensors
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid ({parser_message(error)})") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    found = [(_span(file, name, row), _entry(file, root, name, row, 8 + length)) for name, row in header.items()]
    end = 0
    for (start, stop), entry in sorted(found, key=lambda pair: pair[0]):
        if start != end:
            raise _broken(file, f"{entry.name} begins at byte {start} of the data, the tensor before it ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise _broken(file, f"its tensors end at byte {8 + length + end}, the file at {size}")
    return {entry.name: entry for _, entry in sorted(found, key=lambda pair: pair[0])}


def read_checkpoint(folder: Path, name: str, root: Path | None = None) -> dict[str, TensorEntry]:
    """Reads all headers of a model: of ``model.safetensors``, or of the shards in its index.

    Args:
        folder: holds the files.
        name: of the model, for errors.
        root: the model's folder, if `folder` is a subfolder of it.

    Raises:
        FusionError: there are no safetensors, a file is broken, or the index does not match the shards.
    """
    if own_file(folder / SINGLE, root):
        return read_header(folder / SINGLE, root)
    if not own_file(folder / INDEX, root):
        raise FusionError(f"{name} has no {SINGLE} and no {INDEX}", "only safetensors are merged")
    shard_by_tensor = read_index(folder / INDEX, name)
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(shard_by_tensor.values())):
        if not own_file(folder / shard, root):
            raise FusionError(f"{name} lacks {shard}, which its {INDEX} names", "download it again")
        for key, entry in read_header(folder / shard, root).items():
            if shard_by_tensor.get(key) == shard:
                tensors[key] = entry
    if missing := next((key for key in shard_by_tensor if key not in tensors), None):
        raise FusionError(
            f"{name}: {shown(missing)} is not in {shard_by_tensor[missing]}, where its {INDEX} locates it",
            "download it again",
        )
    return tensors


def _broken(file: Path, why: str) -> FusionError:
    return FusionError(f"{file} is not a valid safetensors file: {why}", "download it again, or save it again")


def _span(file: Path, name: str, row: object) -> tuple[int, int]:
    """The byte range [start, stop) of a tensor in the data."""
    if not name or not name.isprintable() or len(name) > MAX_NAME:
        raise _broken(file, f"{shown(name)} is not a valid tensor name")
    if not isinstance(row, Mapping) or not _counts(row.get("data_offsets")) or len(row["data_offsets"]) != 2:
        raise _broken(file, f"{name} has no two data_offsets")
    start, stop = row["data_offsets"]
    return start, stop


def _entry(file: Path, root: Path | None, name: str, row: Mapping[str, Any], data: int) -> TensorEntry:
    dtype, shape = row.get("dtype"), row.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(file, f"{name} has the dtype {shown(dtype)}; supported are {', '.join(DTYPES)}")
    # dimensions of 0 count as 1: an empty tensor still has strides
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(1, n) for n in shape) > MAX_NUMEL:
        raise _broken(file, f"{name} has the shape {shown(shape)}")
    start, stop = row["data_offsets"]
    entry = TensorEntry(name, dtype, tuple(shape), file, data + start, root)
    if stop - start != entry.nbytes:
        raise _broken(
            file, f"{name} has {stop - start} bytes, but {entry.dtype} {list(entry.shape)} needs {entry.nbytes}"
        )
    return entry


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_NUMEL for n in value)
