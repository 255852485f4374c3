"""What sparse methods share: which entries of a task vector are kept, and how what is left is added up.

To keep is a function of a `Chunk` that gives what is left of all task vectors, called chunk by chunk in order, with a
number that each expert's entries are still to be multiplied with; to add up gives what a method returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import EXACT, Chunk, Merged, Tensors, Values, magnitudes, scratch, stacked
from hf_fusion.merging.engine.thresholds import Threshold, Trim, largest

FINE = 15 / 16
"""Above this drop rate 16 random bits are too few: of 1 - rate they would be off by more than 1e-4."""

CANCELLED = 1e-6
"""Weights whose sum is this share of the sum of their magnitudes cancel out, but for the rounding of float32."""


@dataclass(frozen=True)
class Sparse:
    """What is kept of the task vectors.

    Attributes:
        entries: (K, size) of a chunk, 0 where nothing is kept.
        rates: what the entries of each expert are multiplied with.
    """

    entries: Values
    rates: Sequence[float]


# ---------------------------------------------------------------- what is kept of a task vector


def trimmed(
    tensors: Tensors,
    density: Sequence[float],
    trim: str,
    ties: str,
    values: Values = Chunk.deltas,
    which: tuple[Any, ...] = (),
) -> Values:
    """The largest entries of each tensor, or of the model; of the model's `values`, `which` tells them apart."""
    if trim == "tensor":
        return trimmed_each(tensors, values, density, ties)

    if any(len(one) != len(tensors) for one in tensors.model.tensors):
        raise ValueError("trim: model needs every tensor in every expert; mismatch: base, or trim: tensor, do without")

    def found(model: object) -> list[Threshold]:
        counts = [_count(share, tensors.model.numel) for share in density]
        return largest(tensors.model, counts, _magnitude_of(values))

    thresholds = tensors.model.once(("trim", *density, *which), found)
    return _trimming(values, thresholds, "all")


def trimmed_each(tensors: Tensors, values: Values, density: Sequence[float], ties: str) -> Values:
    """The largest entries of each tensor."""
    counts = [_count(share, tensors.numel) for share in density]
    return _trimming(values, largest(tensors, counts, _magnitude_of(values)), ties)


def _trimming(values: Values, thresholds: Sequence[Threshold], ties: str) -> Values:
    trim = Trim(thresholds, ties)
    return lambda chunk: trim(values(chunk), chunk.number == 0)


def _magnitude_of(values: Values) -> Values:
    return lambda chunk: values(chunk).abs_()


def _count(share: float, total: int) -> int:
    """How many are so large a share: at least one, unless none is wanted."""
    return max(1, int(share * total)) if share and total else 0


def middle(tensors: Tensors, density: Sequence[float], gamma: Sequence[float]) -> Values:
    """All but the largest and the smallest entries."""
    total = tensors.numel
    kept = [int(share * total) for share in density]
    # where both do not fit, fewer of the largest go: the density counts
    top = [min(int(share * total), total - k) for share, k in zip(gamma, kept)]
    of = _magnitude_of(Chunk.deltas)
    upper = Trim(largest(tensors, top, of), "exact")
    lower = Trim(largest(tensors, [k + t for k, t in zip(kept, top)], of), "exact")

    def between(chunk: Chunk) -> torch.Tensor:
        deltas, is_first = chunk.deltas(), chunk.number == 0
        highest = stacked("highest", *deltas.shape).copy_(deltas)
        return lower(deltas, is_first).sub_(upper(highest, is_first))

    return between


def dropped(tensors: Tensors, drop_rate: Sequence[float], rescale: str) -> Sparse:
    """Entries that were not dropped at random."""
    # the narrowest numbers that tell all rates are drawn fastest: bytes tell 256ths exactly, and of a rate near 1 the
    # few entries that are left must be as many as they grow by
    drawn_as: type[np.unsignedinteger[Any]] = np.uint16
    if all(rate * 256 % 1 == 0 for rate in drop_rate):
        drawn_as = np.uint8
    elif any(FINE < rate < 1 for rate in drop_rate):
        drawn_as = np.uint32
    full = 1 << 8 * np.dtype(drawn_as).itemsize
    limits = [min(round(rate * full), full - (rate < 1)) for rate in drop_rate]  # what is below is dropped

    def sparse(chunk: Chunk) -> torch.Tensor:
        deltas = chunk.deltas()
        for own, drawn, limit in zip(deltas.numpy(), chunk.random(drawn_as), limits, strict=True):
            np.multiply(own, drawn >= limit, out=own)
        return deltas

    if rescale == "rate":  # of a rate of 1 nothing is left to grow
        return Sparse(sparse, [1 / (1 - rate) if rate < 1 else 1.0 for rate in drop_rate])
    return rescaled(tensors, sparse, rescale)


def pruned(tensors: Tensors, density: Sequence[float], epsilon: Sequence[float], rescale: str, rank: str) -> Sparse:
    """Entries that were not dropped, large ones less likely than small ones."""
    for share, reach in zip(density, epsilon):
        keeps_all = share == 1 and reach == 0
        if not keeps_all and not (share - reach > 0 and share + reach < 1):
            raise ValueError(f"density {share} less and more epsilon {reach} must lie between 0 and 1")
    # chances in what is drawn, whole numbers below this, and so are they: an entry grows by as much as it is rare
    full = 1 << 16
    ends = [(full * (share - reach), full * (share + reach)) for share, reach in zip(density, epsilon)]
    chances_of = (_chances_in_row if rank == "row" else _chances_in_tensor)(tensors, ends)

    def sparse(chunk: Chunk) -> torch.Tensor:
        deltas = chunk.deltas()
        chances = chances_of(chunk, deltas)
        kept = stacked("kept", *deltas.shape)
        np.copyto(kept.numpy(), chunk.random())
        torch.lt(kept, chances, out=kept)
        if rescale == "rate":
            kept.div_(chances)
        return deltas.mul_(kept)

    return Sparse(sparse, [float(full)] * len(tensors)) if rescale == "rate" else rescaled(tensors, sparse, rescale)


Ends = Sequence[tuple[float, float]]
"""What the smallest and the largest magnitude get, of each expert."""


def _chances_in_tensor(tensors: Tensors, ends: Ends) -> Callable[[Chunk, torch.Tensor], torch.Tensor]:
    """By rank among all entries, (K, size), from a table over the first 16 bits of the magnitudes."""

    def prefixes(deltas: torch.Tensor) -> torch.Tensor:
        """The exponents and 7 bits of magnitudes, as whole numbers: they are ordered as the magnitudes are."""
        bits = torch.abs(deltas, out=stacked("prefixes", *deltas.shape)).view(torch.int32)
        return torch.bitwise_right_shift(bits, 16, out=bits)

    counts = torch.zeros(len(tensors), 1 << 15, dtype=torch.int64)
    for chunk in tensors.chunks():
        for own, prefix in zip(counts, prefixes(chunk.deltas()), strict=True):
            own.add_(torch.bincount(prefix, minlength=1 << 15))
    before = counts.cumsum(1) - counts
    ranks = (before + (counts - 1) / 2) / max(1, tensors.numel - 1)  # from 0 to 1; those of a bin share theirs
    low, high = torch.tensor(ends, dtype=torch.float64).T[..., None]
    tables = (low + (high - low) * ranks).ceil_().float()

    def chances(chunk: Chunk, deltas: torch.Tensor) -> torch.Tensor:
        out = stacked("chances", *deltas.shape)
        for own, table, prefix in zip(out, tables, prefixes(deltas), strict=True):
            torch.index_select(table, 0, prefix, out=own)
        return out

    return chances


def _chances_in_row(tensors: Tensors, ends: Ends) -> Callable[[Chunk, torch.Tensor], torch.Tensor]:
    """By rank among the entries of a row, exactly, (K, size); a vector is one row."""
    width = max(1, math.prod(tensors.shape[1:]) if len(tensors.shape) > 1 else tensors.numel)
    steps = torch.stack([torch.linspace(low, high, width, dtype=torch.float64).ceil_().float() for low, high in ends])

    def chances(chunk: Chunk, _: torch.Tensor) -> torch.Tensor:
        first, last = chunk.start // width, -(-(chunk.start + chunk.size) // width)
        first, size = first * width, (last - first) * width  # whole rows, of which the chunk may hold parts
        magnitudes, base = torch.empty(len(tensors), size), torch.empty(size)
        tensors.the_base.read(first, base)
        for own, reader in zip(magnitudes, tensors.experts, strict=True):
            reader.read(first, own)
        by_row = magnitudes.sub_(base).abs_().view(len(tensors), -1, width)
        order = by_row.argsort(dim=2, stable=True)
        by_row.scatter_(2, order, steps[:, None].expand_as(by_row))
        return magnitudes[:, chunk.start - first :][:, : chunk.size]

    return chances


def rescaled(tensors: Tensors, sparse: Values, rescale: str) -> Sparse:
    """What is left, to be multiplied up to the task vectors' former L1 "norm" where that is wanted.

    Where either norm is below 1e-7 there is nothing to grow or to grow to, and what is left stays: as in mergekit.
    """
    if rescale != "norm" or not tensors.numel:
        return Sparse(sparse, [1.0] * len(tensors))
    norms = tensors.sums(lambda chunk: torch.stack([magnitudes(own(chunk)) for own in (Chunk.deltas, sparse)]))
    return Sparse(sparse, [float(a / b) if min(a, b) >= 1e-7 else 1.0 for a, b in norms.view(2, -1).T])


# ---------------------------------------------------------------- how it is added up


def summed(tensors: Tensors, kept: Sparse, weight: Sequence[float], scaling: float, normalize: bool) -> Merged:
    """θ0 + λ Σ w_i of what is kept."""
    total = sum(weight)
    factor = scaling / total if normalize and abs(total) > 1e-8 else scaling
    numbers = torch.tensor([own * rate * factor for own, rate in zip(weight, kept.rates, strict=True)])

    def merged(chunk: Chunk) -> torch.Tensor:
        out = scratch("total")[: chunk.size]
        return torch.addmv(chunk.base, kept.entries(chunk).T, numbers, out=out)

    return merged


def elected(
    tensors: Tensors, kept: Sparse, weight: Sequence[float], scaling: float, merge: str, plain_sign: bool = False
) -> Merged:
    """θ0 + λ · the entries of the elected sign, their weighted mean or sum.

    Times the elected sign, the entries that agree are those above 0, and their sum is what lies that far from the base:
    sums over the experts are products of a (size, K) matrix with a vector, and no mask is ever made. The election is
    in float64, which holds products of float32 exactly: what cancels out is 0 on every machine, and elects +.

    Where the weights of the entries that agree cancel out, their sum is not divided; only negative weights can do that.

    Args:
        plain_sign: elects by the plain task vectors; else by the weighted.
    """
    weights = torch.tensor(weight)
    sizes = weights.abs() * torch.tensor(kept.rates)
    votes = torch.ones(len(weight), dtype=torch.float64) if plain_sign else sizes.double()
    negative = [index for index, own in enumerate(weight) if own < 0]
    one = torch.ones(())

    def merged(chunk: Chunk) -> torch.Tensor:
        sign, total, below = (scratch(name)[: chunk.size] for name in ("sign", "total", "below"))
        entries = kept.entries(chunk)
        if plain_sign:
            _sums(entries, votes, sign)
        for index in negative:
            entries[index].neg_()
        if not plain_sign:
            _sums(entries, votes, sign)
        torch.copysign(one, sign, out=sign)  # a sum of 0 elects +
        agreeing = entries.mul_(sign).clamp_(min=0)
        torch.mv(agreeing.T, sizes, out=total)
        if merge == "mean":
            torch.mv(agreeing.sign_().T, weights, out=below)
            none = torch.eq(below, 0, out=scratch("none")[: chunk.size])
            if negative:  # 0 but for rounding
                torch.mv(agreeing.T, weights.abs() * CANCELLED, out=none)
                torch.le(below.abs(), none, out=none)
                below.mul_(1 - none)
            total.div_(below.add_(none))
        return torch.addcmul(chunk.base, total, sign, value=scaling, out=total)

    return merged


def _sums(entries: torch.Tensor, votes: torch.Tensor, out: torch.Tensor) -> None:
    """Σ_i votes_i entries_i, (K, size) float32 -> (size,), rounded to float32 only at the end."""
    for first in range(0, len(out), EXACT):
        part = slice(first, min(first + EXACT, len(out)))
        exact = stacked("votes", len(votes), part.stop - first, EXACT, torch.float64).copy_(entries[:, part])
        out[part].copy_(torch.mv(exact.T, votes))
