"""The k-th largest value among more than fit into memory, exactly, in about one pass.

A sample brackets the value; one pass counts what lies above the bracket and keeps what lies inside; the value is among
the kept. Differences of bfloat16 weights take few distinct values, so what is kept is held as values with their counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hf_fusion.merging.tensors import Chunk, Values, scratch

_KEPT = 1 << 21
"""Values kept apart before equal ones are counted together."""


class Streamed(Protocol):
    """What thresholds are taken over: one tensor, or all of a model."""

    @property
    def numel(self) -> int:
        """Elements of one expert."""

    def chunks(self) -> Iterator[Chunk]:
        """All elements, in order."""

    def sample(self) -> Iterator[Chunk]:
        """Some of them, from many places."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest value.

    Attributes:
        value: it; infinite for k = 0.
        equal: how many of the k largest are equal to it, the others being larger.
        ties: how many of all are equal to it.
    """

    value: float
    equal: int
    ties: int


def largest(tensors: Streamed, counts: Sequence[int], of: Values) -> list[Threshold]:
    """The k-th largest of an expert's values, for each expert.

    Args:
        tensors: what holds the values.
        counts: k for each expert, from 0 to the number of elements.
        of: one number, not negative, for each element of a chunk and an expert.

    Returns:
        One threshold for each expert, exact.
    """
    total = tensors.numel
    found: dict[int, Threshold] = {}
    searches = {i: _Search(total, k) for i, k in enumerate(counts) if 0 < k <= total}
    for index, search in searches.items():
        if total:
            search.bracket(np.concatenate([of(chunk, index).numpy() for chunk in tensors.sample()]))
    while searches:
        for chunk in tensors.chunks():
            for index, search in searches.items():
                search.see(of(chunk, index))
        found |= {index: threshold for index, search in searches.items() if (threshold := search.result())}
        searches = {index: search for index, search in searches.items() if index not in found}
    return [found.get(index, Threshold(math.inf, 0, 0)) for index in range(len(counts))]


class _Search:
    """For one expert's k-th largest: a bracket, what lies above it, and what lies inside."""

    def __init__(self, total: int, k: int) -> None:
        self.total, self.k = total, k
        self._begin(0.0, math.inf)

    def _begin(self, low: float, high: float) -> None:
        self.low, self.high, self.above = low, high, 0
        self.values, self.counts = np.empty(0, np.float32), np.empty(0, np.int64)
        self.kept: list[np.ndarray] = []
        self.size = 0

    def bracket(self, sample: np.ndarray) -> None:
        """Begins with the values that a sample has around the wanted rank, far enough apart for all but odd tensors."""
        ordered = np.sort(sample)[::-1]
        share, size = self.k / self.total, len(ordered)
        # neighbours in a tensor are alike, so a sample of pieces tells less than one of single elements: 8 sigma
        reach = 8 * math.sqrt(size * share * (1 - share)) + 8
        first, last = math.floor(share * size - reach), math.ceil(share * size + reach)
        self._begin(float(ordered[last]) if last < size else 0.0, float(ordered[first]) if first >= 0 else math.inf)

    def see(self, values: torch.Tensor) -> None:
        """Counts and keeps."""
        array = values.numpy()
        inside = array >= self.low
        if self.high < math.inf:
            above = array > self.high
            self.above += int(np.count_nonzero(above))
            inside &= ~above
        kept = array[inside]
        self.kept.append(kept)
        self.size += len(kept)
        if self.size > _KEPT:
            self._count()

    def result(self) -> Threshold | None:
        """The threshold, or None where the bracket missed it: the next pass then looks beside it."""
        self._count()
        if self.k <= self.above:
            self._begin(self.high, math.inf)
            return None
        reached = self.above + np.cumsum(self.counts[::-1])  # from the largest down
        place = int(np.searchsorted(reached, self.k))
        if place == len(reached):
            self._begin(0.0, self.low)
            return None
        before = int(reached[place - 1]) if place else self.above
        return Threshold(float(self.values[::-1][place]), self.k - before, int(self.counts[::-1][place]))

    def _count(self) -> None:
        """What was kept, as distinct values in ascending order with how often each came."""
        values, counts = np.unique(np.concatenate([self.values, *self.kept]), return_inverse=True)
        weights = np.concatenate([self.counts, np.ones(self.size, np.int64)])
        self.values = values
        self.counts = np.bincount(counts, weights, minlength=len(values)).astype(np.int64)
        self.kept, self.size = [], 0


class Keeper:
    """Which elements are among the k largest, chunk by chunk in order.

    Args:
        thresholds: as `largest` found them.
        ties: "exact" keeps k elements, of those equal to the threshold the first; "all" keeps every one that equals it.
    """

    def __init__(self, thresholds: Sequence[Threshold], ties: str) -> None:
        self.values = [threshold.value for threshold in thresholds]
        self.left = [t.equal if ties == "exact" and t.equal < t.ties else None for t in thresholds]

    def mask(self, values: torch.Tensor, index: int) -> torch.Tensor:
        """Of an expert's values (size,), which are kept: 1.0 or 0.0."""
        limit, left = self.values[index], self.left[index]
        kept = scratch(f"kept {index}")[: len(values)]
        torch.ge(values, limit, out=kept)
        if left is not None:
            equal = (values == limit).nonzero().view(-1)
            if len(equal) > left:
                kept[equal[left:]] = 0
            self.left[index] = max(0, left - len(equal))
        return kept
