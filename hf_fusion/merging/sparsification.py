"""Sparsification of task vectors: by magnitude, at random, or both; and the weighted sum of what is kept.

Each sparsification is a function of a `Chunk`, called in order, that returns the kept entries of all task vectors; and
a factor per expert by which they are still to be multiplied. See `sign_election` for TIES' alternative to the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import Chunk, Merged, Tensors, Values, magnitudes, scratch, stacked
from hf_fusion.merging.engine.thresholds import Threshold, Trim, find_thresholds

HIGH_DROP_RATE = 15 / 16
"""Above this drop rate, 16 random bits would give 1 - rate with a relative error of more than 1e-4."""


@dataclass(frozen=True)
class SparseVectors:
    """Sparsified task vectors.

    Attributes:
        entries: kept entries of a chunk, (K, size), 0 elsewhere.
        factors: of each expert, by which its entries are to be multiplied.
    """

    entries: Values
    factors: Sequence[float]


def trim_magnitudes(
    tensors: Tensors,
    density: Sequence[float],
    trim: str,
    ties: str,
    values: Values = Chunk.deltas,
    key: tuple[Any, ...] = (),
) -> Values:
    """Keeps the largest entries by magnitude, of each tensor or of the whole model.

    Args:
        tensors: the inputs.
        density: share to keep, of each expert.
        trim: "tensor" or "model".
        ties: see `Trim`; thresholds over the model keep all ties.
        values: the task vectors to trim.
        key: of `values` in the cache of thresholds over the model.

    Raises:
        ValueError: trim is "model", and an expert lacks a tensor.
    """
    if trim == "tensor":
        return trim_per_tensor(tensors, values, density, ties)

    if any(len(each) != len(tensors) for each in tensors.model.tensors):
        raise ValueError("trim: model needs every tensor in every expert; use mismatch: base, or trim: tensor")

    def found(model: object) -> list[Threshold]:
        counts = [_count(share, tensors.model.numel) for share in density]
        return find_thresholds(tensors.model, counts, _magnitude_of(values))

    thresholds = tensors.model.compute_once(("trim", *density, *key), found)
    return _trimming(values, thresholds, "all")


def trim_per_tensor(tensors: Tensors, values: Values, density: Sequence[float], ties: str) -> Values:
    """Keeps the largest entries of each tensor by magnitude."""
    counts = [_count(share, tensors.numel) for share in density]
    memory = tensors.memory if values is Chunk.deltas else None  # others depend on parameters
    return _trimming(values, find_thresholds(tensors, counts, _magnitude_of(values), memory), ties)


def _trimming(values: Values, thresholds: Sequence[Threshold], ties: str) -> Values:
    trim = Trim(thresholds, ties)
    return lambda chunk: trim(values(chunk), chunk.index == 0)


def _magnitude_of(values: Values) -> Values:
    return lambda chunk: values(chunk).abs_()


def _count(share: float, total: int) -> int:
    """The number of entries for a share: at least one, unless the share is 0."""
    return max(1, int(share * total)) if share and total else 0


def trim_both_tails(tensors: Tensors, density: Sequence[float], gamma: Sequence[float]) -> Values:
    """Drops the share `gamma` of the largest entries, then the smallest down to `density`, by magnitude."""
    total = tensors.numel
    kept = [int(share * total) for share in density]
    # if both do not fit, fewer of the largest entries are dropped: the density takes precedence
    top = [min(int(share * total), total - k) for share, k in zip(gamma, kept)]
    magnitude = _magnitude_of(Chunk.deltas)
    upper = Trim(find_thresholds(tensors, top, magnitude, tensors.memory), "exact")
    lower = Trim(find_thresholds(tensors, [k + t for k, t in zip(kept, top)], magnitude, tensors.memory), "exact")

    def between(chunk: Chunk) -> torch.Tensor:
        deltas, is_first = chunk.deltas(), chunk.index == 0
        highest = stacked("highest", *deltas.shape).copy_(deltas)
        return lower(deltas, is_first).sub_(upper(highest, is_first))

    return between


def drop_uniformly(tensors: Tensors, drop_rate: Sequence[float], rescale: str) -> SparseVectors:
    """Drops entries independently at random (DARE).

    Args:
        tensors: the inputs.
        drop_rate: probability of each expert's entries to be dropped.
        rescale: "rate", by 1 / (1 - drop_rate), or see `rescale_kept`.
    """
    # narrow integers are fastest to draw: bytes represent multiples of 1/256 exactly; near 1, where the kept share
    # must match the factor by which entries grow, 32 bits are needed
    drawn_as: type[np.unsignedinteger[Any]] = np.uint16
    if all(rate * 256 % 1 == 0 for rate in drop_rate):
        drawn_as = np.uint8
    elif any(HIGH_DROP_RATE < rate < 1 for rate in drop_rate):
        drawn_as = np.uint32
    full = 1 << 8 * np.dtype(drawn_as).itemsize
    limits = [min(round(rate * full), full - (rate < 1)) for rate in drop_rate]  # integers below are dropped

    def sparse(chunk: Chunk) -> torch.Tensor:
        deltas = chunk.deltas()
        for row, drawn, limit in zip(deltas.numpy(), chunk.random(drawn_as), limits, strict=True):
            np.multiply(row, drawn >= limit, out=row)
        return deltas

    if rescale == "rate":  # at a rate of 1 nothing is kept
        return SparseVectors(sparse, [1 / (1 - rate) if rate < 1 else 1.0 for rate in drop_rate])
    return rescale_kept(tensors, sparse, rescale)


def drop_by_magnitude(
    tensors: Tensors, density: Sequence[float], epsilon: Sequence[float], rescale: str, rank: str
) -> SparseVectors:
    """Drops entries at random, small ones more likely than large ones (DELLA).

    Args:
        tensors: the inputs.
        density: mean probability of each expert's entries to be kept.
        epsilon: how far the probabilities of the smallest and the largest entry differ from the mean.
        rescale: "rate", by the inverse of an entry's probability, or see `rescale_kept`.
        rank: among the entries of a "tensor", or of a "row".

    Raises:
        ValueError: a probability is outside of [0, 1].
    """
    for share, reach in zip(density, epsilon):
        keeps_all = share == 1 and reach == 0
        if not keeps_all and not (share - reach > 0 and share + reach < 1):
            raise ValueError(f"density {share} minus and plus epsilon {reach} must lie between 0 and 1")
    # probabilities in units of 1 / full, as integers: the factor is the exact inverse of the probability
    full = 1 << 16
    ends = [(full * (share - reach), full * (share + reach)) for share, reach in zip(density, epsilon)]
    probabilities_of = (_rank_in_row if rank == "row" else _rank_in_tensor)(tensors, ends)

    def sparse(chunk: Chunk) -> torch.Tensor:
        deltas = chunk.deltas()
        probabilities = probabilities_of(chunk, deltas)
        kept = stacked("kept", *deltas.shape)
        np.copyto(kept.numpy(), chunk.random())
        torch.lt(kept, probabilities, out=kept)
        if rescale == "rate":
            kept.div_(probabilities)
        return deltas.mul_(kept)

    return (
        SparseVectors(sparse, [float(full)] * len(tensors))
        if rescale == "rate"
        else rescale_kept(tensors, sparse, rescale)
    )


Ends = Sequence[tuple[float, float]]
"""Probabilities of the smallest and the largest magnitude, of each expert."""


def _rank_in_tensor(tensors: Tensors, ends: Ends) -> Callable[[Chunk, torch.Tensor], torch.Tensor]:
    """Probabilities (K, size) by rank in the tensor, from a table over the first 16 bits of the magnitudes."""

    def prefixes(deltas: torch.Tensor) -> torch.Tensor:
        """Exponents and leading 7 mantissa bits of magnitudes, as integers in the same order."""
        bits = torch.abs(deltas, out=stacked("prefixes", *deltas.shape)).view(torch.int32)
        return torch.bitwise_right_shift(bits, 16, out=bits)

    counts = torch.zeros(len(tensors), 1 << 15, dtype=torch.int64)
    for chunk in tensors.chunks():
        for row, prefix in zip(counts, prefixes(chunk.deltas()), strict=True):
            row.add_(torch.bincount(prefix, minlength=1 << 15))
    before = counts.cumsum(1) - counts
    ranks = (before + (counts - 1) / 2) / max(1, tensors.numel - 1)  # from 0 to 1; entries of a bin share a rank
    low, high = torch.tensor(ends, dtype=torch.float64).T[..., None]
    tables = (low + (high - low) * ranks).ceil_().float()

    def probabilities(chunk: Chunk, deltas: torch.Tensor) -> torch.Tensor:
        out = stacked("probabilities", *deltas.shape)
        for row, table, prefix in zip(out, tables, prefixes(deltas), strict=True):
            torch.index_select(table, 0, prefix, out=row)
        return out

    return probabilities


def _rank_in_row(tensors: Tensors, ends: Ends) -> Callable[[Chunk, torch.Tensor], torch.Tensor]:
    """Probabilities (K, size) by exact rank in the row; a vector is one row."""
    width = max(1, math.prod(tensors.shape[1:]) if len(tensors.shape) > 1 else tensors.numel)
    steps = torch.stack([torch.linspace(low, high, width, dtype=torch.float64).ceil_().float() for low, high in ends])

    def probabilities(chunk: Chunk, _: torch.Tensor) -> torch.Tensor:
        first, last = chunk.start // width, -(-(chunk.start + chunk.size) // width)
        first, size = first * width, (last - first) * width  # whole rows; the chunk may begin or end within one
        magnitudes, base = torch.empty(len(tensors), size), torch.empty(size)
        tensors.required_base.read(first, base)
        for row, reader in zip(magnitudes, tensors.experts, strict=True):
            reader.read(first, row)
        by_row = magnitudes.sub_(base).abs_().view(len(tensors), -1, width)
        order = by_row.argsort(dim=2, stable=True)
        by_row.scatter_(2, order, steps[:, None].expand_as(by_row))
        return magnitudes[:, chunk.start - first :][:, : chunk.size]

    return probabilities


def rescale_kept(tensors: Tensors, sparse: Values, rescale: str) -> SparseVectors:
    """With rescale "norm", scales the kept entries of each tensor to its former L1 norm; with "none", not.

    A tensor with either norm below 1e-7 is not scaled, as in mergekit.
    """
    if rescale != "norm" or not tensors.numel:
        return SparseVectors(sparse, [1.0] * len(tensors))
    norms = tensors.sums(lambda chunk: torch.stack([magnitudes(values(chunk)) for values in (Chunk.deltas, sparse)]))
    return SparseVectors(sparse, [float(a / b) if min(a, b) >= 1e-7 else 1.0 for a, b in norms.view(2, -1).T])


def sum_task_vectors(
    tensors: Tensors, kept: SparseVectors, weight: Sequence[float], scaling: float, normalize: bool
) -> Merged:
    """θ0 + λ Σ w_i τ_i, with the kept entries of τ_i; `normalize` divides by Σ w_i unless it is 0."""
    total = sum(weight)
    factor = scaling / total if normalize and abs(total) > 1e-8 else scaling
    weights = torch.tensor([w * scale * factor for w, scale in zip(weight, kept.factors, strict=True)])

    def merged(chunk: Chunk) -> torch.Tensor:
        out = scratch("total")[: chunk.size]
        return torch.addmv(chunk.base, kept.entries(chunk).T, weights, out=out)

    return merged
