"""Methods that keep a part of every task vector: the largest, some at random, or those that agree.

Each is a way to sparsify (a function of a `Chunk` and an expert's number) and a way to add up what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch

from hf_fusion.merging.schema import EachNumber, Range
from hf_fusion.merging.tensors import Chunk, Merged, Tensors, Values, scratch
from hf_fusion.merging.thresholds import Threshold, Trim, largest

__all__ = [
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "magnitude",
    "sce",
    "ties",
]

Share = Annotated[EachNumber, Range(0, 1)]
Scaling = Annotated[float, Range()]
Ties = Literal["exact", "all"]
Rescale = Literal["rate", "norm", "none"]


def ties(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.2,),
    scaling: Scaling = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    trim: Literal["tensor", "model"] = "tensor",
    ties: Ties = "exact",
) -> Merged:
    """θ0 + λ · what agrees of the trimmed task vectors (TIES; Yadav et al., 2023, arXiv 2306.01708).

    Of every τ_i the largest entries are kept; for every element the sign of Σ w_i τ_i is elected; the entries of that
    sign are averaged. A sum of exactly 0 elects +, as in mergekit.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept; the paper's 0.2.
        scaling: λ; the paper's 1. fusion_bench's is 0.3, with merge: sum.
        merge: the agreeing entries' weighted "mean" (paper; mergekit with normalize) or their "sum" (fusion_bench;
            mergekit without).
        trim: the largest of each "tensor" (mergekit), or of the whole "model" (paper, fusion_bench).
        ties: keeps "exact"ly the share, of equal magnitudes the first, or "all" that equal the threshold (paper,
            fusion_bench).
    """
    kept = _trimmed(tensors, density, trim, ties)
    return _consensus(tensors, kept, weight, scaling, merge)


def magnitude(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.2,),
    scaling: Scaling = 0.3,
    normalize: bool = False,
    trim: Literal["tensor", "model"] = "tensor",
    ties: Ties = "exact",
) -> Merged:
    """θ0 + λ Σ w_i times the largest entries of τ_i: magnitude pruning before task arithmetic.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept.
        scaling: λ.
        normalize: divides by the sum of the weights.
        trim: see `ties`.
        ties: see `ties`.
    """
    return _sum(tensors, _trimmed(tensors, density, trim, ties), weight, scaling, normalize)


def dare_linear(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    drop_rate: Share = (0.5,),
    scaling: Scaling = 0.3,
    normalize: bool = False,
    rescale: Rescale = "rate",
) -> Merged:
    """θ0 + λ Σ w_i times what is left of τ_i when entries are dropped at random (DARE; Yu et al., 2024, 2311.03099).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        drop_rate: p, the chance of an entry to be dropped.
        scaling: λ.
        normalize: divides by the sum of the weights: with scaling 1, the average of the experts.
        rescale: what is left grows by 1 / (1 - p), "rate" (paper, fusion_bench), or to the tensor's former L1 "norm"
            (mergekit), or stays, "none".
    """
    return _sum(tensors, _dropped(tensors, drop_rate, rescale), weight, scaling, normalize)


def dare_ties(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    drop_rate: Share = (0.5,),
    density: Share = (1.0,),
    scaling: Scaling = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    rescale: Rescale = "rate",
    trim: Literal["tensor", "model"] = "tensor",
    ties: Ties = "exact",
) -> Merged:
    """TIES of task vectors whose entries were dropped at random (DARE; Yu et al., 2024, arXiv 2311.03099).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        drop_rate: see `dare_linear`.
        density: share of the thinned task vectors that TIES keeps: 1 leaves out its trimming, as mergekit does; the
            paper and fusion_bench trim to 0.2.
        scaling: λ.
        merge: see `ties`.
        rescale: see `dare_linear`.
        trim: see `ties`.
        ties: see `ties`.

    Raises:
        ValueError: trim: model with rescale: norm, which is another number for every tensor.
    """
    kept = _dropped(tensors, drop_rate, rescale)
    if min(density) < 1:
        if trim == "model" and rescale == "norm":
            raise ValueError("trim: model goes with rescale: rate or none, not with norm")
        kept = _trimmed(tensors, density, trim, ties, kept, ("dropped", *drop_rate, rescale))
    return _consensus(tensors, kept, weight, scaling, merge)


def della(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.5,),
    epsilon: Share = (0.1,),
    scaling: Scaling = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    rescale: Rescale = "rate",
    rank: Literal["tensor", "row"] = "tensor",
) -> Merged:
    """TIES of task vectors thinned at random, small entries more than large ones (DELLA, arXiv 2406.11617).

    An entry is kept with probability density - ε + 2 ε r, r its rank by magnitude from 0 to 1.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: mean probability to be kept.
        epsilon: ε: how far the probability is from its mean for the smallest and the largest.
        scaling: λ.
        merge: see `ties`.
        rescale: a kept entry grows by 1 / its probability, "rate" (paper), or what is left to the tensor's former L1
            "norm" (mergekit), or stays, "none".
        rank: among a "tensor"'s entries, where magnitudes that agree in their first 8 bits share a rank; or exactly,
            among those of its "row" (paper, mergekit), several times as slow.

    Raises:
        ValueError: a probability would leave 0..1.
    """
    return _consensus(tensors, _pruned(tensors, density, epsilon, rescale, rank), weight, scaling, merge)


def della_linear(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.5,),
    epsilon: Share = (0.1,),
    scaling: Scaling = 0.3,
    normalize: bool = False,
    rescale: Rescale = "rate",
    rank: Literal["tensor", "row"] = "tensor",
) -> Merged:
    """Task arithmetic of task vectors thinned as `della` does (arXiv 2406.11617).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: see `della`.
        epsilon: see `della`.
        scaling: λ.
        normalize: divides by the sum of the weights.
        rescale: see `della`.
        rank: see `della`.
    """
    return _sum(tensors, _pruned(tensors, density, epsilon, rescale, rank), weight, scaling, normalize)


def breadcrumbs(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.9,),
    gamma: Share = (0.01,),
    scaling: Scaling = 0.3,
    normalize: bool = False,
) -> Merged:
    """Task arithmetic without the smallest and the very largest entries (Davari & Belilovsky, 2023, arXiv 2312.06795).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept.
        gamma: share of the largest entries that are dropped; less where density asks for more. As in mergekit.
        scaling: λ.
        normalize: divides by the sum of the weights.
    """
    return _sum(tensors, _middle(tensors, density, gamma), weight, scaling, normalize)


def breadcrumbs_ties(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.9,),
    gamma: Share = (0.01,),
    scaling: Scaling = 1.0,
    merge: Literal["mean", "sum"] = "mean",
) -> Merged:
    """What `breadcrumbs` keeps, added up as TIES does.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: see `breadcrumbs`.
        gamma: see `breadcrumbs`.
        scaling: λ.
        merge: see `ties`.
    """
    return _consensus(tensors, _middle(tensors, density, gamma), weight, scaling, merge)


def sce(tensors: Tensors, *, density: Annotated[float, Range(0, 1)] = 1.0) -> Merged:
    """Select, calculate, erase (Wan et al., 2024, arXiv 2408.07990).

    Kept are the elements in which the experts differ most; every task vector weighs by its mean square; entries against
    the elected sign are erased.

    Args:
        tensors: a base and one expert or more.
        density: share of the elements with any variance that are kept (mergekit's select_topk).
    """
    count = len(tensors)

    def variance(chunk: Chunk, _: int = 0) -> torch.Tensor:
        mean, squares = scratch("mean")[: chunk.size].zero_(), scratch("squares")[: chunk.size].zero_()
        for i in range(count):
            delta = chunk.delta(i)
            mean.add_(delta, alpha=1 / count)
        for i in range(count):
            delta = chunk.delta(i).sub_(mean)
            squares.addcmul_(delta, delta, value=1 / count)
        return squares

    select: Trim | None = None
    if density < 1:
        varied = int(tensors.sums(lambda chunk: torch.count_nonzero(variance(chunk))))
        select = Trim(largest(tensors, [int(varied * density)], variance), "exact")

    def kept(chunk: Chunk, index: int) -> torch.Tensor:
        if index == 0 and select is not None:
            torch.sign(select(variance(chunk), 0), out=scratch("selected")[: chunk.size])
        delta = chunk.delta(index)
        return delta if select is None else delta.mul_(scratch("selected")[: chunk.size])

    def squares(chunk: Chunk) -> torch.Tensor:
        rows = [kept(chunk, i) for i in range(count)]
        return torch.stack([torch.dot(row, row) for row in rows])

    energy = (tensors.sums(squares) / tensors.numel).tolist()
    if select is not None:
        select = Trim(largest(tensors, [int(varied * density)], variance), "exact")
    total = sum(energy)
    weight = [one / total for one in energy] if total >= 1e-6 else [1 / count] * count
    return _consensus(tensors, kept, weight, 1.0, "mean", plain_sign=True)


# ---------------------------------------------------------------- what is kept of a task vector


def _trimmed(
    tensors: Tensors,
    density: Sequence[float],
    trim: str,
    ties: str,
    values: Values = Chunk.delta,
    which: tuple[Any, ...] = (),
) -> Values:
    """The largest entries of each tensor, or of the model; of the model's `values`, `which` tells them apart."""
    if trim == "tensor":
        return _largest_of(tensors, values, density, ties)

    if any(len(one) != len(tensors) for one in tensors.model.tensors):
        raise ValueError("trim: model needs every tensor in every expert; mismatch: base, or trim: tensor, do without")

    def found(model: object) -> list[Threshold]:
        counts = [_count(share, tensors.model.numel) for share in density]
        return largest(tensors.model, counts, _magnitude_of(values))

    thresholds = tensors.model.once(("trim", *density, *which), found)
    return _trimming(values, thresholds, "all")


def _largest_of(tensors: Tensors, values: Values, density: Sequence[float], ties: str) -> Values:
    counts = [_count(share, tensors.numel) for share in density]
    return _trimming(values, largest(tensors, counts, _magnitude_of(values)), ties)


def _trimming(values: Values, thresholds: Sequence[Threshold], ties: str) -> Values:
    trim = Trim(thresholds, ties)
    return lambda chunk, index: trim(values(chunk, index), index)


def _magnitude_of(values: Values) -> Values:
    return lambda chunk, index: values(chunk, index).abs_()


def _count(share: float, total: int) -> int:
    """How many are so large a share: at least one, unless none is wanted."""
    return max(1, int(share * total)) if share and total else 0


def _middle(tensors: Tensors, density: Sequence[float], gamma: Sequence[float]) -> Values:
    """All but the largest and the smallest entries."""
    total = tensors.numel
    kept = [int(share * total) for share in density]
    # where both do not fit, fewer of the largest go: the density counts
    top = [min(int(share * total), total - k) for share, k in zip(gamma, kept)]
    of = _magnitude_of(Chunk.delta)
    upper = Trim(largest(tensors, top, of), "exact")
    lower = Trim(largest(tensors, [k + t for k, t in zip(kept, top)], of), "exact")

    def middle(chunk: Chunk, index: int) -> torch.Tensor:
        delta = chunk.delta(index)
        highest = scratch("highest")[: chunk.size].copy_(delta)
        return lower(delta, index).sub_(upper(highest, index))

    return middle


def _dropped(tensors: Tensors, drop_rate: Sequence[float], rescale: str) -> Values:
    """Entries that were not dropped at random."""
    limits = [round(rate * (1 << 16)) for rate in drop_rate]  # a uint16 below it: dropped

    def dropped(chunk: Chunk, index: int) -> torch.Tensor:
        kept = scratch("kept")[: chunk.size]
        np.copyto(kept.numpy(), chunk.random(index) >= limits[index])
        return chunk.delta(index).mul_(kept)

    rates = [1 / (1 - rate) if rescale == "rate" and rate < 1 else 1.0 for rate in drop_rate]
    return _rescaled(tensors, dropped, rates, rescale)


def _pruned(tensors: Tensors, density: Sequence[float], epsilon: Sequence[float], rescale: str, rank: str) -> Values:
    """Entries that were not dropped, large ones less likely than small ones."""
    for share, reach in zip(density, epsilon):
        keeps_all = share == 1 and reach == 0
        if not keeps_all and not (share - reach > 0 and share + reach < 1):
            raise ValueError(f"density {share} less and more epsilon {reach} must lie between 0 and 1")
    ranked = _rank_in_row(tensors) if rank == "row" else _rank_in_tensor(tensors)

    def pruned(chunk: Chunk, index: int) -> torch.Tensor:
        delta = chunk.delta(index)
        chances = ranked(chunk, index, delta)
        chances.mul_(2 * epsilon[index]).add_(density[index] - epsilon[index])
        drawn, kept = scratch("drawn")[: chunk.size], scratch("kept")[: chunk.size]
        np.copyto(drawn.numpy(), chunk.random(index))
        torch.lt(drawn.mul_(2**-16), chances, out=kept)
        if rescale == "rate":
            kept.div_(chances)
        return delta.mul_(kept)

    return _rescaled(tensors, pruned, [1.0] * len(density), rescale)


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


def _rescaled(tensors: Tensors, sparse: Values, rates: Sequence[float], rescale: str) -> Values:
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


def _sum(tensors: Tensors, kept: Values, weight: Sequence[float], scaling: float, normalize: bool) -> Merged:
    """θ0 + λ Σ w_i of what is kept."""
    total = sum(weight)
    factor = scaling / total if normalize and abs(total) > 1e-8 else scaling

    def merged(chunk: Chunk) -> torch.Tensor:
        result = scratch("total")[: chunk.size].copy_(chunk.base)
        for index, own in enumerate(weight):
            result.add_(kept(chunk, index), alpha=own * factor)
        return result

    return merged


def _consensus(
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
        positive, total, elected = (scratch(name)[:size].zero_() for name in ("positive", "total", "elected"))
        signs, present, part = (scratch(name)[:size] for name in ("signs", "present", "part"))
        signs.zero_()
        present.zero_()
        for index, own in enumerate(weight):
            entries = kept(chunk, index)
            if plain_sign:
                elected.add_(entries)
            total.add_(entries.mul_(own))
            torch.sign(entries, out=part)
            signs.add_(part, alpha=own)  # Σ w over + less Σ w over -
            present.add_(part.abs_(), alpha=own)  # Σ w over both
            positive.add_(torch.clamp(entries, min=0, out=part))
        chosen = torch.ge(elected if plain_sign else total, 0, out=part)  # 1 elects +
        # P where + is elected, else N = total - P
        total.sub_(positive)
        positive.sub_(total).mul_(chosen).add_(total)
        if merge == "mean":
            # the weights' sum over the agreeing: (present + signs) / 2 or (present - signs) / 2
            chosen.mul_(2).sub_(1).mul_(signs).add_(present).mul_(0.5)
            positive.div_(chosen.add_(torch.eq(chosen, 0, out=present)))
        return torch.add(chunk.base, positive, alpha=scaling, out=positive)

    return merged
