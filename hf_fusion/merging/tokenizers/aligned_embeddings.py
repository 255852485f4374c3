"""Reads embeddings and heads with rows from several models, aligned by token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import CHUNK, Reader

# sources of rows other than a model
ZERO, AVERAGE = -1, -2


@dataclass(frozen=True)
class RowSources:
    """The sources of an embedding's rows, as runs of consecutive rows of one model.

    Attributes:
        starts: first row of each run.
        models: index of its model, or `ZERO` or `AVERAGE`.
        rows: first row of the run in that model.
        averaged: row with source `AVERAGE` -> (model, row) of each averaged row.
    """

    starts: list[int]
    models: list[int]
    rows: list[int]
    averaged: dict[int, list[tuple[int, int]]]

    @classmethod
    def of(cls, models: np.ndarray, rows: np.ndarray, averaged: dict[int, list[tuple[int, int]]]) -> RowSources:
        """Builds runs from the model and row of each token."""
        breaks = models[1:] != models[:-1]
        breaks |= (models[1:] >= 0) & (rows[1:] != rows[:-1] + 1)
        breaks |= models[1:] == AVERAGE
        starts = [0, *(breaks.nonzero()[0] + 1).tolist()]
        return cls(starts, models[starts].tolist(), rows[starts].tolist(), averaged)


class AlignedReader:
    """Reads an embedding, or a head, with rows of several models.

    Args:
        readers: of the models.
        table: sources of the rows.
        rows: number of rows, including padding.
        size: rows with a source; further ones are their mean.
    """

    def __init__(self, readers: Sequence[Reader], table: RowSources, rows: int, size: int) -> None:
        self.readers, self.table, self.size = readers, table, size
        self.shape = (rows, *readers[0].shape[1:])
        self._width = int(np.prod(self.shape[1:], dtype=np.int64))
        self._mean: torch.Tensor | None = None

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        width, table, done = self._width, self.table, 0
        while done < len(out):
            position = start + done
            row = position // width
            if row >= self.size:
                columns = torch.arange(position, start + len(out)) % width
                torch.index_select(self.mean, 0, columns, out=out[done:])
                return
            run = bisect_right(table.starts, row) - 1
            end = table.starts[run + 1] if run + 1 < len(table.starts) else self.size
            block = out[done : done + end * width - position]
            offset = position - table.starts[run] * width
            self._read_run(run, offset, block)
            done += len(block)

    def _read_run(self, run: int, offset: int, out: torch.Tensor) -> None:
        """Reads values of a run from `offset` on."""
        model, row = self.table.models[run], self.table.rows[run]
        if model >= 0:
            self.readers[model].read(row * self._width + offset, out)
            return
        out.zero_()
        if model == AVERAGE:
            sources = self.table.averaged[self.table.starts[run]]
            values = torch.empty_like(out)
            for index, source_row in sources:
                self.readers[index].read(source_row * self._width + offset, values)
                out.add_(values)
            out.div_(len(sources))

    @property
    def mean(self) -> torch.Tensor:
        """Mean of all rows with a source, (width,)."""
        if self._mean is None:
            total = torch.zeros(self._width, dtype=torch.float64)
            step = max(1, CHUNK // self._width)
            for first in range(0, self.size, step):
                values = torch.empty(min(step, self.size - first) * self._width)
                self.read(first * self._width, values)
                total += values.view(-1, self._width).sum(0, dtype=torch.float64)
            self._mean = (total / self.size).float()
        return self._mean
