"""Embeddings and heads whose rows come from here and there: from several models, token by token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import CHUNK, Reader

# where a row comes from, if not from a model
ZERO, AVERAGE = -1, -2


@dataclass(frozen=True)
class RowSources:
    """Where the rows of an embedding come from: runs of rows that lie one behind the other in one model."""

    starts: list[int]
    models: list[int]
    rows: list[int]
    averaged: dict[int, list[tuple[int, int]]]

    @classmethod
    def of(cls, models: np.ndarray, rows: np.ndarray, averaged: dict[int, list[tuple[int, int]]]) -> RowSources:
        """From the model and row of each token."""
        breaks = models[1:] != models[:-1]
        breaks |= (models[1:] >= 0) & (rows[1:] != rows[:-1] + 1)
        breaks |= models[1:] == AVERAGE
        starts = [0, *(breaks.nonzero()[0] + 1).tolist()]
        return cls(starts, models[starts].tolist(), rows[starts].tolist(), averaged)


class AlignedReader:
    """An embedding, or a head, with rows of several models.

    Args:
        readers: of the models.
        table: where the rows come from.
        rows: how many there shall be.
        size: those that have a token; others are their mean.
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
            place = start + done
            row = place // width
            if row >= self.size:
                columns = torch.arange(place, start + len(out)) % width
                torch.index_select(self.mean, 0, columns, out=out[done:])
                return
            run = bisect_right(table.starts, row) - 1
            end = table.starts[run + 1] if run + 1 < len(table.starts) else self.size
            part = out[done : done + end * width - place]
            offset = place - table.starts[run] * width
            self._run(run, offset, part)
            done += len(part)

    def _run(self, run: int, offset: int, out: torch.Tensor) -> None:
        """Some values of a run, from `offset` on."""
        model, row = self.table.models[run], self.table.rows[run]
        if model >= 0:
            self.readers[model].read(row * self._width + offset, out)
            return
        out.zero_()
        if model == AVERAGE:
            having = self.table.averaged[self.table.starts[run]]
            values = torch.empty_like(out)
            for index, own in having:
                self.readers[index].read(own * self._width + offset, values)
                out.add_(values)
            out.div_(len(having))

    @property
    def mean(self) -> torch.Tensor:
        """Of all rows that have a token, (width,)."""
        if self._mean is None:
            total = torch.zeros(self._width, dtype=torch.float64)
            step = max(1, CHUNK // self._width)
            for first in range(0, self.size, step):
                values = torch.empty(min(step, self.size - first) * self._width)
                self.read(first * self._width, values)
                total += values.view(-1, self._width).sum(0, dtype=torch.float64)
            self._mean = (total / self.size).float()
        return self._mean
