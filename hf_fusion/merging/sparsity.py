"""What sparse methods share: which entries of a task vector are kept, and how what is left is added up.

To keep is a function of a `Chunk` and an expert's number, called chunk by chunk in order; to add up gives what a method
returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_fusion.merging.tensors import Chunk, Merged, Tensors, Values, scratch
from hf_fusion.merging.thresholds import Threshold, Trim, largest

# ---------------------------------------------------------------- what is kept of a task vector


def trimmed(
    tensors: Tensors,
    density: Sequence[float],
    trim: str,
    ties: str,
    values: Values = Chunk.delta,
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
    return lambda chunk, index: trim(values(chunk, index), index, chunk.number == 0)


def _magnitude_of(values: Values) -> Values:
    return lambda chunk, index: values(chunk, index).abs_()


def _count(share: float, total: int) -> int:
    """How many are so large a share: at least one, unless none is wanted."""
    return max(1, int(share * total)) if share and total else 0


def middle(tensors: Tensors, density: Sequence[float], gamma: Sequence[float]) -> Values:
    """All but the largest and the smallest entries."""
    total = tensors.numel
    kept = [int(share * total) for share in density]
    # where both do not fit, fewer of the largest go: the density counts
    top = [min(int(share * total), total - k) for share, k in zip(gamma, kept)]
    of = _magnitude_of(Chunk.delta)
    upper = Trim(largest(tensors, top, of), "exact")
    lower = Trim(largest(tensors, [k + t for k, t in zip(kept, top)], of), "exact")

    def between(chunk: Chunk, index: int) -> torch.Tensor:
        delta = chunk.delta(index)
        highest, is_first = scratch("highest")[: chunk.size].copy_(delta), chunk.number == 0
        return lower(delta, index, is_first).sub_(upper(highest, index, is_first))

    return between


def dropped(tensors: Tensors, drop_rate: Sequence[float], rescale: str) -> Values:
    """Entries that were not dropped at random."""
    limits = [round(rate * (1 << 16)) for rate in drop_rate]  # a uint16 below it: dropped

    def sparse(chunk: Chunk, index: int) -> torch.Tensor:
        kept = scratch("kept")[: chunk.size]
        np.copyto(kept.numpy(), chunk.random(index) >= limits[index])
        return chunk.delta(index).mul_(kept)

    rates = [1 / (1 - rate) if rescale == "rate" and rate < 1 else 1.0 for rate in drop_rate]
    return rescaled(tensors, sparse, rates, rescale)


def pruned(tensors: Tensors, density: Sequence[float], epsilon: Sequence[float], rescale: str, rank: str) -> Values:
    """Entries that were not dropped, large ones less likely than small ones."""
    for share, reach in zip(density, epsilon):
        keeps_all = share == 1 and reach == 0
        if not keeps_all and not (share - reach > 0 and share + reach < 1):
            raise ValueError(f"density {share} less and more epsilon {reach} must lie between 0 and 1")
    ranked = _rank_in_row(tensors) if rank == "row" else _rank_in_tensor(tensors)

    def sparse(chunk: Chunk, index: int) -> torch.Tensor:
        delta = chunk.delta(index)
        chances = ranked(chunk, index, delta)
        chances.mul_(2 * epsilon[index]).add_(density[index] - epsilon[index])
        drawn, kept = scratch("drawn")[: chunk.size], scratch("kept")[: chunk.size]
        np.copyto(drawn.numpy(), chunk.random(index))
        torch.lt(drawn.mul_(2**-16), chances, out=kept)
        if rescale == "rate":
            kept.div_(chances)
        return delta.mul_(kept)

    return rescaled(tensors, sparse, [1.0] * len(density), rescale)


def _rank_in_tensor(tensors: Tensors) -> Callable[[Chunk, int, torch.Tensor], torch.Tensor]:
    """Ranks from 0 to 1 among all entries, by a table over the first 16 bits of the magnitudes."""

    def prefix(delta: torch.Tensor) -> torch.Tensor:
        """The exponent and 7 bits of a magnitude, as a whole number: they are ordered as the magnitudes are."""
        bits = torch.abs(delta, out=scratch("prefix")[: len(delta)]).view(torch.int32)
        return torch.bitwise_right_shift(bits, 16, out=bits)

    counts = torch.zeros(len(tensors), 1 << 15, dtype=torch.int64)
    for chunk in tensors.chunks():
        for i, own in enumerate(counts):
            own.add_(torch.bincount(prefix(chunk.delta(i)), minlength=1 << 15))
    before = counts.cumsum(1) - counts
    tables = ((before + (counts - 1) / 2) / max(1, tensors.numel - 1)).float()  # those of a bin share theirs

    def ranked(chunk: Chunk, index: int, delta: torch.Tensor) -> torch.Tensor:
        return torch.index_select(tables[index], 0, prefix(delta), out=scratch("ranks")[: chunk.size])

    return ranked


def _rank_in_row(tensors: Tensors) -> Callable[[Chunk, int, torch.Tensor], torch.Tensor]:
    """Ranks from 0 to 1 among the entries of a row, exactly; a vector is one row."""
    width = max(1, math.prod(tensors.shape[1:]) if len(tensors.shape) > 1 else tensors.numel)
    steps = torch.linspace(0, 1, width)

    def ranked(chunk: Chunk, index: int, delta: torch.Tensor) -> torch.Tensor:
        first, last = chunk.start // width, -(-(chunk.start + chunk.size) // width)
        values, base = torch.empty(2, (last - first) * width)  # whole rows, of which the chunk may hold parts
        tensors.experts[index].read(first * width, values)
        tensors.the_base.read(first * width, base)
        rows = values.sub_(base).abs_().view(-1, width)
        order = rows.argsort(dim=1, stable=True)
        ranks = rows.scatter_(1, order, steps.expand_as(rows)).view(-1)
        return ranks[chunk.start - first * width :][: chunk.size]

    return ranked


def rescaled(tensors: Tensors, sparse: Values, rates: Sequence[float], rescale: str) -> Values:
    """What is left, times a number for each expert."""
    if rescale == "norm":

        def norms(chunk: Chunk) -> torch.Tensor:
            own = [(chunk.delta(i).abs_().sum(), sparse(chunk, i).abs_().sum()) for i in range(len(tensors))]
            return torch.tensor(own)

        rates = [float(before / after) if min(before, after) >= 1e-7 else 1.0 for before, after in tensors.sums(norms)]
    if all(rate == 1 for rate in rates):
        return sparse
    return lambda chunk, index: sparse(chunk, index).mul_(rates[index])


# ---------------------------------------------------------------- how it is added up


def summed(tensors: Tensors, kept: Values, weight: Sequence[float], scaling: float, normalize: bool) -> Merged:
    """θ0 + λ Σ w_i of what is kept."""
    total = sum(weight)
    factor = scaling / total if normalize and abs(total) > 1e-8 else scaling

    def merged(chunk: Chunk) -> torch.Tensor:
        result = scratch("total")[: chunk.size].copy_(chunk.base)
        for index, own in enumerate(weight):
            result.add_(kept(chunk, index), alpha=own * factor)
        return result

    return merged


def elected(
    tensors: Tensors, kept: Values, weight: Sequence[float], scaling: float, merge: str, plain_sign: bool = False
) -> Merged:
    """θ0 + λ · the entries of the elected sign, their weighted mean or sum.

    With P and N the sums of the positive and of the negative entries, the elected sign is that of P + N, and the sum of
    the agreeing entries is P or N: no mask is ever made.

    Args:
        plain_sign: elects by the plain task vectors; else by the weighted.
    """

    def merged(chunk: Chunk) -> torch.Tensor:
        size = chunk.size
        positive, total, votes = (scratch(name)[:size].zero_() for name in ("positive", "total", "votes"))
        signs, present, part = (scratch(name)[:size] for name in ("signs", "present", "part"))
        signs.zero_()
        present.zero_()
        for index, own in enumerate(weight):
            entries = kept(chunk, index)
            if plain_sign:
                votes.add_(entries)
            total.add_(entries.mul_(own))
            torch.sign(entries, out=part)
            signs.add_(part, alpha=own)  # Σ w over + less Σ w over -
            present.add_(part.abs_(), alpha=own)  # Σ w over both
            positive.add_(torch.clamp(entries, min=0, out=part))
        chosen = torch.ge(votes if plain_sign else total, 0, out=part)  # 1 elects +
        # P where + is elected, else N = total - P
        total.sub_(positive)
        positive.sub_(total).mul_(chosen).add_(total)
        if merge == "mean":
            # the weights' sum over the agreeing: (present + signs) / 2 or (present - signs) / 2
            chosen.mul_(2).sub_(1).mul_(signs).add_(present).mul_(0.5)
            positive.div_(chosen.add_(torch.eq(chosen, 0, out=present)))
        return torch.add(chunk.base, positive, alpha=scaling, out=positive)

    return merged
