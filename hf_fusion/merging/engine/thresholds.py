"""Exact selection of the k-th largest value in data larger than memory, usually in one pass after sampling.

A sample gives a bracket around the value; one pass counts the values above the bracket and keeps those inside it, among
which the value is then selected. Differences of bfloat16 weights have few distinct values: the most frequent ones are
counted instead of kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import SAMPLE_PIECE, Chunk, Values

SAMPLES = "samples"
"""Key of the samples in a memory."""
_MAX_COUNTED = 8
"""Maximum number of frequent values that are counted instead of kept."""


class Streamed(Protocol):
    """The data that thresholds are taken over: one tensor, or all tensors of a model."""

    @property
    def numel(self) -> int:
        """Elements of one expert."""

    def chunks(self) -> Iterator[Chunk]:
        """All elements, in order."""

    def sample(self) -> Iterator[Chunk]:
        """A sample of the elements."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest value.

    Attributes:
        value: the threshold; infinite for k = 0.
        equal: how many of the k largest values equal it.
        ties: how many of all values equal it.
    """

    value: float
    equal: int
    ties: int


def find_thresholds(
    tensors: Streamed, counts: Sequence[int], score: Values, memory: dict[Any, Any] | None = None
) -> list[Threshold]:
    """The k-th largest score of each expert, exactly.

    Args:
        tensors: the data.
        counts: k for each expert, from 0 to the number of elements.
        score: non-negative scores (K, size) of a chunk.
        memory: keeps the samples of these scores for the next call with the same data and scores.

    Returns:
        One threshold per expert.
    """
    total = tensors.numel
    found: dict[int, Threshold] = {}
    wanted = {i: k for i, k in enumerate(counts) if 0 < k <= total}
    if not wanted:
        return [Threshold(math.inf, 0, 0)] * len(counts)
    samples: list[_Sample] = [] if memory is None else memory.setdefault(SAMPLES, [])
    if not samples:
        sampled = np.concatenate([score(chunk).numpy().copy() for chunk in tensors.sample()], 1)
        samples += [_Sample(row) if memory is None else _SortedSample(row) for row in sampled]
    searches = {index: _Search(total, k, samples[index]) for index, k in wanted.items()}
    while searches:
        for chunk in tensors.chunks():
            values = score(chunk).numpy()
            for index, search in searches.items():
                search.add(values[index])
        found |= {index: threshold for index, search in searches.items() if (threshold := search.result())}
        searches = {index: search for index, search in searches.items() if index not in found}
    return [found.get(index, Threshold(math.inf, 0, 0)) for index in range(len(counts))]


class _Sample:
    """A sample of non-negative values.

    Args:
        values: in the order of the data.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._pieces = range(SAMPLE_PIECE, len(values), SAMPLE_PIECE)

    def __len__(self) -> int:
        return len(self.values)

    def at_rank(self, rank: int) -> float:
        """The value at a rank, 0 for the smallest."""
        return _value_at_rank(self.values, rank)

    def shares_above(self, value: float) -> list[float]:
        """The share of larger values in each piece."""
        return [np.count_nonzero(piece > value) / len(piece) for piece in np.split(self.values, self._pieces)]

    def between(self, low: float, high: float) -> np.ndarray:
        """The values from low to high, both included."""
        return self.values[(self.values >= low) & (self.values <= high)]


class _SortedSample(_Sample):
    """A sample that is used several times."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values)
        self._sorted = np.sort(values)
        whole = len(values) // SAMPLE_PIECE * SAMPLE_PIECE
        self._equal, self._rest = values[:whole].reshape(-1, SAMPLE_PIECE), values[whole:]

    def at_rank(self, rank: int) -> float:
        return float(self._sorted[rank])

    def shares_above(self, value: float) -> list[float]:
        shares: list[float] = (np.count_nonzero(self._equal > value, axis=1) / SAMPLE_PIECE).tolist()
        return shares + ([np.count_nonzero(self._rest > value) / len(self._rest)] if len(self._rest) else [])

    def between(self, low: float, high: float) -> np.ndarray:
        first, last = np.searchsorted(self._sorted, low), np.searchsorted(self._sorted, high, side="right")
        return self._sorted[first:last]


class _Search:
    """The search for one expert's k-th largest value: a bracket, the count above it, and the values inside.

    Args:
        total: number of values.
        k: from 1 to total.
        sample: of the values.
    """

    def __init__(self, total: int, k: int, sample: _Sample) -> None:
        self.total, self.k, self.sample = total, k, sample
        self.width = 6.0  # of the bracket to each side, in standard errors
        self._set_bracket()

    def _set_bracket(self) -> None:
        """Starts a pass, with the bracket around the wanted rank in the sample."""
        sample = self.sample
        share, size = self.k / self.total, len(sample)
        # elements of a piece are correlated: the standard error is estimated from the differences between pieces
        middle = sample.at_rank(max(0, size - 1 - int(share * size)))
        shares = sample.shares_above(middle)
        width = self.width * (np.std(shares) / math.sqrt(len(shares)) * size + 1)
        first, last = math.floor(share * size - width), math.ceil(share * size + width)  # 0 is the largest
        self.low = sample.at_rank(size - 1 - last) if last < size else 0.0
        self.high = sample.at_rank(size - 1 - first) if first >= 0 else math.inf
        values, counts = np.unique(sample.between(self.low, self.high), return_counts=True)
        most = np.argsort(counts)[-_MAX_COUNTED:]
        # frequent values, which are counted instead of kept
        self.frequent = {float(values[i]): 0 for i in most if counts[i] > size / 100}
        self.above, self.kept = 0, list[np.ndarray]()

    def add(self, values: np.ndarray) -> None:
        """Adds the next values of the pass."""
        inside = values >= self.low
        if self.high < math.inf:
            above = values > self.high
            self.above += int(np.count_nonzero(above))
            np.logical_xor(inside, above, out=inside)
        for value in self.frequent:
            same = values == value
            self.frequent[value] += int(np.count_nonzero(same))
            np.logical_xor(inside, same, out=inside)
        self.kept.append(np.compress(inside, values))

    def result(self) -> Threshold | None:
        """The threshold, or None if it is outside of the bracket: the next pass has a wider one."""
        kept, rank = np.concatenate(self.kept), self.k - self.above  # 1 is the largest
        if not 0 < rank <= len(kept) + sum(self.frequent.values()):
            if self.low == 0 and rank > 0:  # fewer than k values are not NaN
                return Threshold(0.0, 0, 0)
            self.width *= 4
            self._set_bracket()
            return None
        larger = 0
        for value, times in sorted(self.frequent.items(), reverse=True):
            before = larger + int(np.count_nonzero(kept > value))
            if rank <= before:
                break
            if rank <= before + times:
                return Threshold(value, rank - before, times)
            larger += times
        value = _value_at_rank(kept, len(kept) - (rank - larger))
        before = larger + int(np.count_nonzero(kept > value))
        return Threshold(value, rank - before, int(np.count_nonzero(kept == value)))


def _value_at_rank(values: np.ndarray, rank: int) -> float:
    """The value at a rank, 0 for the smallest, of non-negative float32 values, by a radix search.

    Non-negative floats are ordered as their bits. Several times faster than `numpy.partition` with many equal values.
    """
    bits = values.view(np.int32)
    while (low := int(bits.min())) < (high := int(bits.max())):
        bins = (bits - low) >> max(0, (high - low).bit_length() - 14)
        upto = np.bincount(bins).cumsum()
        bin_index = int(np.searchsorted(upto, rank, side="right"))
        rank -= int(upto[bin_index - 1]) if bin_index else 0
        bits = bits[bins == bin_index]
    return float(bits[:1].view(np.float32)[0])


class Trim:
    """Zeroes all but the k largest magnitudes, chunk by chunk in order.

    Args:
        thresholds: of the magnitudes, from `find_thresholds`.
        ties: "exact" keeps k elements, the first ones among those equal to the threshold; "all" keeps all of these.
    """

    def __init__(self, thresholds: Sequence[Threshold], ties: str) -> None:
        self.limits = [threshold.value for threshold in thresholds]
        # magnitudes above this are kept: the float just below the threshold
        self.below = [float(np.nextafter(np.float32(limit), np.float32(0))) for limit in self.limits]
        self._is_none = [
            t.value == math.inf and not t.equal for t in thresholds
        ]  # an infinite threshold with equal values keeps them
        self._equal = [t.equal if ties == "exact" and t.equal < t.ties else None for t in thresholds]
        self.left = list(self._equal)

    def __call__(self, values: torch.Tensor, is_first: bool) -> torch.Tensor:
        """Trims the experts' next values (K, size) in place; the first chunk resets the state."""
        if is_first:
            self.left = list(self._equal)
        for index, (row, limit, left) in enumerate(zip(values, self.limits, self.left, strict=True)):
            if self._is_none[index]:
                row.zero_()
            elif left == 0:  # enough values that equal the threshold were kept
                torch.ops.aten.hardshrink.out(row, limit, out=row)
            else:
                torch.ops.aten.hardshrink.out(row, self.below[index], out=row)
                if left is not None:
                    array = row.numpy()
                    equal = np.flatnonzero((array == limit) | (array == -limit))
                    array[equal[left:]] = 0
                    self.left[index] = max(0, left - len(equal))
        return values
