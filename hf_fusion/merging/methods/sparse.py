"""TIES, DARE, DELLA, Breadcrumbs, magnitude pruning and SCE: methods that sparsify task vectors.

Each combines a sparsification (`merging.sparsification`) with a weighted sum, or with TIES' sign election
(`merging.sign_election`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from hf_fusion.merging.engine.tensors import Chunk, Merged, Tensors, stacked
from hf_fusion.merging.engine.thresholds import Trim, find_thresholds
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.sign_election import merge_elected_signs
from hf_fusion.merging.sparsification import (
    SparseVectors,
    drop_by_magnitude,
    drop_uniformly,
    rescale_kept,
    sum_task_vectors,
    trim_both_tails,
    trim_magnitudes,
)
from hf_fusion.schema import EachNumber, Range

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
Norm = Literal["norm", "none"]


@merge_method(
    "TIES",
    base="needed",
    needs="thresholds",
    paper="2306.01708",
    mergekit=mk.TASK | mk.DENSITY | mk.elected(True) | mk.NOT_RESCALED,
)
def ties(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.2,),
    scaling: Scaling = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    trim: Literal["tensor", "model"] = "tensor",
    ties: Ties = "exact",
    rescale: Norm = "none",
) -> Merged:
    """θ0 + λ · mean of the trimmed task vectors' entries of the elected sign (TIES; Yadav et al., 2023, 2306.01708).

    Trim: the largest entries of every τ_i are kept. Elect: for every element, the sign of Σ w_i τ_i; a sum of exactly 0
    elects +, as in mergekit. Merge: the entries of that sign are averaged.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept; the paper's 0.2.
        scaling: λ; the paper's 1. fusion_bench's is 0.3, with merge: sum.
        merge: the agreeing entries' weighted "mean" (paper; mergekit with normalize) or their "sum" (fusion_bench;
            mergekit without).
        trim: the largest of each "tensor" (mergekit), or of the whole "model" (paper, fusion_bench).
        ties: keep "exact"ly the share, the first ones among equal magnitudes; or "all" entries that equal the threshold
            (paper, fusion_bench).
        rescale: scale the kept entries to the tensor's former L1 "norm" (mergekit with rescale), or not ("none").
    """
    kept = rescale_kept(tensors, trim_magnitudes(tensors, density, trim, ties), rescale)
    return merge_elected_signs(tensors, kept, weight, scaling, merge)


@merge_method("Magnitude pruning", base="needed", needs="thresholds", paper="2306.01708")
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
    """θ0 + λ Σ w_i τ_i with the largest entries of each τ_i: magnitude pruning, then task arithmetic.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept.
        scaling: λ.
        normalize: divides by the sum of the weights.
        trim: see `ties`.
        ties: see `ties`.
    """
    kept = rescale_kept(tensors, trim_magnitudes(tensors, density, trim, ties), "none")
    return sum_task_vectors(tensors, kept, weight, scaling, normalize)


@merge_method(
    "DARE task arithmetic",
    base="needed",
    needs="chunks",
    paper="2311.03099",
    stochastic=True,
    mergekit=mk.TASK | mk.DROPPED | mk.summed(False) | mk.RESCALED,
)
def dare_linear(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    drop_rate: Share = (0.5,),
    scaling: Scaling = 0.3,
    normalize: bool = False,
    rescale: Rescale = "rate",
) -> Merged:
    """θ0 + λ Σ w_i τ_i with entries of each τ_i dropped at random (DARE; Yu et al., 2024, arXiv 2311.03099).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        drop_rate: p, the probability of an entry to be dropped.
        scaling: λ.
        normalize: divides by the sum of the weights: with scaling 1, the average of the experts.
        rescale: scale the kept entries by 1 / (1 - p), "rate" (paper, fusion_bench), or to the tensor's former L1
            "norm" (mergekit), or not ("none").
    """
    return sum_task_vectors(tensors, drop_uniformly(tensors, drop_rate, rescale), weight, scaling, normalize)


@merge_method(
    "DARE-TIES",
    base="needed",
    needs="thresholds",
    paper="2311.03099",
    stochastic=True,
    mergekit=mk.TASK | mk.DROPPED | mk.elected(False) | mk.RESCALED,
)
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
    """TIES of task vectors with entries dropped at random (DARE; Yu et al., 2024, arXiv 2311.03099).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        drop_rate: see `dare_linear`.
        density: share of the sparsified task vectors that TIES keeps: 1 skips its trimming, as in mergekit; the paper
            and fusion_bench trim to 0.2.
        scaling: λ.
        merge: see `ties`.
        rescale: see `dare_linear`.
        trim: see `ties`.
        ties: see `ties`.

    Raises:
        ValueError: trim: model with rescale: norm, whose factor differs between tensors.
    """
    kept = drop_uniformly(tensors, drop_rate, rescale)
    if min(density) < 1:
        if trim == "model" and rescale == "norm":
            raise ValueError("trim: model works with rescale: rate or none, not with norm")
        entries = trim_magnitudes(tensors, density, trim, ties, kept.entries, ("dropped", *drop_rate))
        kept = SparseVectors(entries, kept.factors)
    return merge_elected_signs(tensors, kept, weight, scaling, merge)


@merge_method(
    "DELLA",
    base="needed",
    needs="thresholds",
    paper="2406.11617",
    stochastic=True,
    mergekit=mk.DELLA | mk.elected(True) | mk.RESCALED,
    mergekit_always={"rank": "row"},
)
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
    """TIES of task vectors with entries dropped at random, small ones more often than large ones (DELLA, 2406.11617).

    An entry is kept with probability density - ε + 2 ε r, where r is its rank by magnitude, from 0 to 1.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: mean probability of an entry to be kept.
        epsilon: ε: how far the probabilities of the smallest and the largest entry differ from the mean.
        scaling: λ.
        merge: see `ties`.
        rescale: scale a kept entry by 1 / its probability, "rate" (paper), or the kept entries to the tensor's former
            L1 "norm" (mergekit), or not ("none").
        rank: among the entries of the "tensor", where magnitudes with the same leading 16 bits share a rank; or exact,
            among those of the "row" (paper, mergekit), which is several times slower.

    Raises:
        ValueError: a probability is outside of [0, 1].
    """
    return merge_elected_signs(
        tensors, drop_by_magnitude(tensors, density, epsilon, rescale, rank), weight, scaling, merge
    )


@merge_method(
    "DELLA, no election",
    base="needed",
    needs="thresholds",
    paper="2406.11617",
    stochastic=True,
    mergekit=mk.DELLA | mk.summed(False) | mk.RESCALED,
    mergekit_always={"rank": "row"},
)
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
    """Task arithmetic of task vectors sparsified as in `della` (arXiv 2406.11617).

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
    return sum_task_vectors(
        tensors, drop_by_magnitude(tensors, density, epsilon, rescale, rank), weight, scaling, normalize
    )


@merge_method(
    "Breadcrumbs",
    base="needed",
    needs="thresholds",
    paper="2312.06795",
    mergekit=mk.CRUMBS | mk.summed(False) | mk.NOT_RESCALED,
)
def breadcrumbs(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.9,),
    gamma: Share = (0.01,),
    scaling: Scaling = 0.3,
    normalize: bool = False,
    rescale: Norm = "none",
) -> Merged:
    """Task arithmetic without the smallest and the largest entries (Davari & Belilovsky, 2023, arXiv 2312.06795).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept.
        gamma: share of the largest entries that are dropped; less if density + gamma > 1, as in mergekit.
        scaling: λ.
        normalize: divides by the sum of the weights.
        rescale: see `ties`.
    """
    kept = rescale_kept(tensors, trim_both_tails(tensors, density, gamma), rescale)
    return sum_task_vectors(tensors, kept, weight, scaling, normalize)


@merge_method(
    "Breadcrumbs with TIES",
    base="needed",
    needs="thresholds",
    paper="2312.06795",
    mergekit=mk.CRUMBS | mk.elected(False) | mk.NOT_RESCALED,
)
def breadcrumbs_ties(
    tensors: Tensors,
    *,
    weight: EachNumber = (1.0,),
    density: Share = (0.9,),
    gamma: Share = (0.01,),
    scaling: Scaling = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    rescale: Norm = "none",
) -> Merged:
    """TIES' sign election on task vectors sparsified as in `breadcrumbs` (arXiv 2312.06795).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: see `breadcrumbs`.
        gamma: see `breadcrumbs`.
        scaling: λ.
        merge: see `ties`.
        rescale: see `ties`.
    """
    kept = rescale_kept(tensors, trim_both_tails(tensors, density, gamma), rescale)
    return merge_elected_signs(tensors, kept, weight, scaling, merge)


@merge_method(
    "SCE",
    base="needed",
    needs="thresholds",
    paper="2408.07990",
    mergekit={"select_topk": mk.MergekitParameter("density", 1.0)},
)
def sce(tensors: Tensors, *, density: Annotated[float, Range(0, 1)] = 1.0) -> Merged:
    """SCE: select, calculate, erase (Wan et al., 2024, arXiv 2408.07990).

    Select: the elements in which the experts differ most. Calculate: each task vector is weighted by its mean square.
    Erase: entries against the elected sign. If nothing is selected, weights are equal; mergekit uses equal weights
    whenever the mean squares sum to less than 1e-6, as for many fine-tunes.

    Args:
        tensors: a base and one expert or more.
        density: share of the elements with nonzero variance that are kept (mergekit's select_topk).
    """
    count, ones = len(tensors), torch.ones(len(tensors), dtype=torch.float64)

    def deviation(chunk: Chunk) -> torch.Tensor:
        """Standard deviation over the experts: exactly 0 if all are equal, and without overflow."""
        found, first = stacked("deviation", 1, chunk.size), 0
        for block in chunk.float64_blocks(deltas=True):
            mean = torch.mv(block.mT, ones).div_(count)
            squares = torch.mv(block.sub_(mean).square_().mT, ones)
            found[0, first : first + len(squares)].copy_(squares.div_(count).sqrt_())
            first += len(squares)
        return found

    select: Trim | None = None
    if density < 1:
        varied = int(tensors.sums(lambda chunk: torch.count_nonzero(deviation(chunk))))
        select = Trim(find_thresholds(tensors, [int(varied * density)], deviation), "exact")

    def kept(chunk: Chunk) -> torch.Tensor:
        if select is None:
            return chunk.deltas()
        selected = select(deviation(chunk), chunk.index == 0).sign_()
        return chunk.deltas().mul_(selected)

    energy = tensors.sums(lambda chunk: kept(chunk).double().square_().sum(1)).tolist() if tensors.numel else []
    total = sum(energy)
    weight = [square / total for square in energy] if total > 0 else [1 / count] * count
    return merge_elected_signs(tensors, rescale_kept(tensors, kept, "none"), weight, 1.0, "mean", plain_sign=True)
