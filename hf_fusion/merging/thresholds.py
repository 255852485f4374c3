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

from hf_fusion.merging.tensors import Chunk, Values

_HEAVY = 8
"""Values that are counted one by one, at most."""
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

    def _begin(self, low: float, high: float, heavy: Sequence[float] = ()) -> None:
        self.low, self.high, self.above = low, high, 0
        self.heavy = dict.fromkeys(heavy, 0)  # values so frequent that they are counted rather than kept
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
        low = float(ordered[last]) if last < size else 0.0
        high = float(ordered[first]) if first >= 0 else math.inf
        values, counts = np.unique(sample[(sample >= low) & (sample <= high)], return_counts=True)
        most = np.argsort(counts)[-_HEAVY:]
        self._begin(low, high, [float(values[i]) for i in most if counts[i] > size / 100])

    def see(self, values: torch.Tensor) -> None:
        """Counts and keeps."""
        array = values.numpy()
        inside = array >= self.low
        if self.high < math.inf:
            above = array > self.high
            self.above += int(np.count_nonzero(above))
            np.logical_xor(inside, above, out=inside)
        kept = array[inside]
        for value in self.heavy:  # most of what is inside, and little of everything
            rest = kept[kept != value]
            self.heavy[value] += len(kept) - len(rest)
            kept = rest
        self.kept.append(kept)
        self.size += len(kept)
        if self.size > _KEPT:
            self._count()

    def result(self) -> Threshold | None:
        """The threshold, or None where the bracket missed it: the next pass then looks beside it."""
        self._count()
        if self.heavy:
            self.values = np.append(self.values, np.array(list(self.heavy), np.float32))
            self.counts = np.append(self.counts, np.array(list(self.heavy.values()), np.int64))
            order = np.argsort(self.values)
            self.values, self.counts, self.heavy = self.values[order], self.counts[order], {}
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
        ordered = np.sort(np.concatenate(self.kept)) if self.kept else np.empty(0, np.float32)
        first = np.flatnonzero(np.diff(ordered, prepend=np.float32(-1)))  # where each distinct value begins
        counts = np.diff(first, append=len(ordered))
        values, places = np.unique(np.concatenate([self.values, ordered[first]]), return_inverse=True)
        self.counts = np.bincount(places, np.concatenate([self.counts, counts]), len(values)).astype(np.int64)
        self.values, self.kept, self.size = values, [], 0


class Trim:
    """Zeroes all but the k largest magnitudes, chunk by chunk in order.

    Args:
        thresholds: of the magnitudes, as `largest` found them.
        ties: "exact" keeps k elements, of those equal to the threshold the first; "all" keeps every one that equals it.
    """

    def __init__(self, thresholds: Sequence[Threshold], ties: str) -> None:
        self.limits = [threshold.value for threshold in thresholds]
        # everything above this is kept: the number just below the threshold
        self.below = [float(np.nextafter(np.float32(limit), np.float32(0))) for limit in self.limits]
        self._equal = [t.equal if ties == "exact" and t.equal < t.ties else None for t in thresholds]
        self.left = list(self._equal)

    def __call__(self, values: torch.Tensor, index: int, is_first: bool = False) -> torch.Tensor:
        """An expert's next values (size,), trimmed in place; those of the first chunk begin anew."""
        if is_first:
            self.left[index] = self._equal[index]
        limit, left = self.limits[index], self.left[index]
        if limit == math.inf:
            return values.zero_()
        torch.ops.aten.hardshrink.out(values, self.below[index], out=values)
        if left is not None:
            equal = np.flatnonzero(np.abs(values.numpy()) == limit)
            values[torch.from_numpy(equal[left:])] = 0
            self.left[index] = max(0, left - len(equal))
        return values
