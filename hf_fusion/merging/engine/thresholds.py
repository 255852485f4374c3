"""The k-th largest value among more than fit into memory, exactly, in about one pass.

A sample brackets the value; one pass counts what lies above the bracket and keeps what lies inside; the value is among
the kept. Differences of bfloat16 weights take few distinct values: the most frequent of them are counted, not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import PIECE, Chunk, Values

_HEAVY = 8
"""Values that are counted one by one, at most."""


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
    wanted = {i: k for i, k in enumerate(counts) if 0 < k <= total}
    if not wanted:
        return [Threshold(math.inf, 0, 0)] * len(counts)
    sample = np.concatenate([of(chunk).numpy().copy() for chunk in tensors.sample()], 1)
    searches = {index: _Search(total, k, sample[index]) for index, k in wanted.items()}
    while searches:
        for chunk in tensors.chunks():
            values = of(chunk).numpy()
            for index, search in searches.items():
                search.see(values[index])
        found |= {index: threshold for index, search in searches.items() if (threshold := search.result())}
        searches = {index: search for index, search in searches.items() if index not in found}
    return [found.get(index, Threshold(math.inf, 0, 0)) for index in range(len(counts))]


class _Search:
    """For one expert's k-th largest: a bracket, what lies above it, and what lies inside.

    Args:
        total: values there are.
        k: from 1 to total.
        sample: some of them.
    """

    def __init__(self, total: int, k: int, sample: np.ndarray) -> None:
        self.total, self.k, self.sample = total, k, sample
        self.reach = 6.0  # standard errors
        self._bracket()

    def _bracket(self) -> None:
        """Begins with the values that the sample has around the wanted rank."""
        sample = self.sample
        share, size = self.k / self.total, len(sample)
        # neighbours in a tensor are alike: how far a rank is off is told by how the sample's pieces differ
        middle = _ranked(sample, max(0, size - 1 - int(share * size)))
        shares = [
            np.count_nonzero(piece > middle) / len(piece) for piece in np.split(sample, range(PIECE, size, PIECE))
        ]
        reach = self.reach * (np.std(shares) / math.sqrt(len(shares)) * size + 1)
        first, last = math.floor(share * size - reach), math.ceil(share * size + reach)  # 0 is the largest
        self.low = _ranked(sample, size - 1 - last) if last < size else 0.0
        self.high = _ranked(sample, size - 1 - first) if first >= 0 else math.inf
        values, counts = np.unique(sample[(sample >= self.low) & (sample <= self.high)], return_counts=True)
        most = np.argsort(counts)[-_HEAVY:]
        # values so frequent that they are counted rather than kept
        self.heavy = {float(values[i]): 0 for i in most if counts[i] > size / 100}
        self.above, self.kept = 0, list[np.ndarray]()

    def see(self, values: np.ndarray) -> None:
        """Counts and keeps."""
        inside = values >= self.low
        if self.high < math.inf:
            above = values > self.high
            self.above += int(np.count_nonzero(above))
            np.logical_xor(inside, above, out=inside)
        for value in self.heavy:
            same = values == value
            self.heavy[value] += int(np.count_nonzero(same))
            np.logical_xor(inside, same, out=inside)
        self.kept.append(np.compress(inside, values))

    def result(self) -> Threshold | None:
        """The threshold, or None where the bracket missed it: the next pass has a wider one."""
        kept, rank = np.concatenate(self.kept), self.k - self.above  # from the largest down, from 1 on
        if not 0 < rank <= len(kept) + sum(self.heavy.values()):
            if self.low == 0 and rank > 0:  # fewer than k are numbers
                return Threshold(0.0, 0, 0)
            self.reach *= 4
            self._bracket()
            return None
        larger = 0
        for value, times in sorted(self.heavy.items(), reverse=True):
            before = larger + int(np.count_nonzero(kept > value))
            if rank <= before:
                break
            if rank <= before + times:
                return Threshold(value, rank - before, times)
            larger += times
        value = _ranked(kept, len(kept) - (rank - larger))
        before = larger + int(np.count_nonzero(kept > value))
        return Threshold(value, rank - before, int(np.count_nonzero(kept == value)))


def _ranked(values: np.ndarray, rank: int) -> float:
    """The value (not negative) of a rank, from 0 for the smallest on, by counting leading bits.

    Such numbers are ordered as their bits are. Several times as fast as `numpy.partition` where many are equal.
    """
    bits = values.view(np.int32)
    while (low := int(bits.min())) < (high := int(bits.max())):
        bins = (bits - low) >> max(0, (high - low).bit_length() - 14)
        upto = np.bincount(bins).cumsum()
        place = int(np.searchsorted(upto, rank, side="right"))
        rank -= int(upto[place - 1]) if place else 0
        bits = bits[bins == place]
    return float(bits[:1].view(np.float32)[0])


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
        self._is_none = [t.value == math.inf and not t.equal for t in thresholds]  # an infinite value is one to keep
        self._equal = [t.equal if ties == "exact" and t.equal < t.ties else None for t in thresholds]
        self.left = list(self._equal)

    def __call__(self, values: torch.Tensor, is_first: bool) -> torch.Tensor:
        """The experts' next values (K, size), trimmed in place; those of the first chunk begin anew."""
        if is_first:
            self.left = list(self._equal)
        for index, (own, limit, left) in enumerate(zip(values, self.limits, self.left, strict=True)):
            if self._is_none[index]:
                own.zero_()
            elif left == 0:  # none of those that equal the threshold is wanted any more
                torch.ops.aten.hardshrink.out(own, limit, out=own)
            else:
                torch.ops.aten.hardshrink.out(own, self.below[index], out=own)
                if left is not None:
                    array = own.numpy()
                    equal = np.flatnonzero((array == limit) | (array == -limit))
                    array[equal[left:]] = 0
                    self.left[index] = max(0, left - len(equal))
        return values
