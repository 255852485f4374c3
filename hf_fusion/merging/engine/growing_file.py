"""Writes a safetensors file tensor by tensor, before all shapes are known: ranks are found one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hf_fusion.merging.engine.checkpoint import DTYPES, OpenFiles, TensorEntry
from hf_fusion.merging.engine.tensors import CHUNK

_ROW = 400  # characters of a tensor's row in the header, without its name: dtype, at most 8 dimensions, two offsets
_NAMES = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}


class GrowingFile:
    """A safetensors file with tensors in the order in which they are added: ``with GrowingFile(…) as file``.

    The header lies before the data, so that room for it is reserved: unused room is filled with spaces, as the format
    allows.

    Args:
        file: its path; must not exist.
        names: of all tensors that may be added.
    """

    def __init__(self, file: Path, names: Iterable[str]) -> None:
        self.file = file
        self._room = -(-sum(len(json.dumps(name)) + _ROW for name in names) // 8) * 8 + 64
        self._rows: dict[str, dict[str, Any]] = {}
        self._end = 0

    def __enter__(self) -> GrowingFile:
        self._file = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if failed is None:
                self._finish()
        finally:
            os.close(self._file)

    @property
    def names(self) -> list[str]:
        """The tensors added so far."""
        return [*self._rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors added so far."""
        return self._end

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor."""
        start = self._begin(name, _NAMES[tensor.dtype], tensor.shape)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._put(flat.view(torch.uint8).numpy().data, start)

    def copy(self, name: str, entry: TensorEntry, files: OpenFiles) -> None:
        """Adds a tensor of another file, byte by byte."""
        start = self._begin(name, entry.dtype, entry.shape)
        buffer = torch.empty(CHUNK * entry.itemsize, dtype=torch.uint8)
        for first in range(0, entry.numel, CHUNK):
            part = buffer[: min(CHUNK, entry.numel - first) * entry.itemsize].numpy()
            files.read(entry, first, part)
            self._put(part.data, start + first * entry.itemsize)

    def _begin(self, name: str, dtype: str, shape: Iterable[int]) -> int:
        """Adds a row to the header; returns the offset of the tensor in the file."""
        row = TensorEntry(name, dtype, tuple(shape), self.file, 8 + self._room + self._end)
        self._rows[name] = {
            "dtype": dtype,
            "shape": [*row.shape],
            "data_offsets": [self._end, self._end + row.nbytes],
        }
        self._end += row.nbytes
        return row.start

    def _finish(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._rows}, separators=(",", ":")).encode()
        self._put(memoryview(self._room.to_bytes(8, "little") + header.ljust(self._room)), 0)
        os.fsync(self._file)

    def _put(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._file, view, offset)
            offset, view = offset + count, view[count:]
