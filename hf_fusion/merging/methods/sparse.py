"""Methods that keep a part of every task vector: the largest, some at random, or those that agree.

Each is a way to sparsify and a way to add up what is left.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from hf_fusion.merging.engine.tensors import Chunk, Merged, Tensors, stacked
from hf_fusion.merging.engine.thresholds import Trim, largest
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.sparsity import Sparse, dropped, elected, middle, pruned, rescaled, summed, trimmed
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
        rescale: what is kept grows to the tensor's former L1 "norm" (mergekit with rescale), or stays, "none".
    """
    kept = rescaled(tensors, trimmed(tensors, density, trim, ties), rescale)
    return elected(tensors, kept, weight, scaling, merge)


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
    kept = rescaled(tensors, trimmed(tensors, density, trim, ties), "none")
    return summed(tensors, kept, weight, scaling, normalize)


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
    return summed(tensors, dropped(tensors, drop_rate, rescale), weight, scaling, normalize)


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
    kept = dropped(tensors, drop_rate, rescale)
    if min(density) < 1:
        if trim == "model" and rescale == "norm":
            raise ValueError("trim: model goes with rescale: rate or none, not with norm")
        entries = trimmed(tensors, density, trim, ties, kept.entries, ("dropped", *drop_rate))
        kept = Sparse(entries, kept.rates)
    return elected(tensors, kept, weight, scaling, merge)


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
    return elected(tensors, pruned(tensors, density, epsilon, rescale, rank), weight, scaling, merge)


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
    return summed(tensors, pruned(tensors, density, epsilon, rescale, rank), weight, scaling, normalize)


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
    """Task arithmetic without the smallest and the very largest entries (Davari & Belilovsky, 2023, arXiv 2312.06795).

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: share of each task vector that is kept.
        gamma: share of the largest entries that are dropped; less where density asks for more. As in mergekit.
        scaling: λ.
        normalize: divides by the sum of the weights.
        rescale: see `ties`.
    """
    kept = rescaled(tensors, middle(tensors, density, gamma), rescale)
    return summed(tensors, kept, weight, scaling, normalize)


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
    """What `breadcrumbs` keeps, added up as TIES does.

    Args:
        tensors: a base and one expert or more.
        weight: w_i.
        density: see `breadcrumbs`.
        gamma: see `breadcrumbs`.
        scaling: λ.
        merge: see `ties`.
        rescale: see `ties`.
    """
    kept = rescaled(tensors, middle(tensors, density, gamma), rescale)
    return elected(tensors, kept, weight, scaling, merge)


@merge_method(
    "SCE",
    base="needed",
    needs="thresholds",
    paper="2408.07990",
    mergekit={"select_topk": mk.MergekitParameter("density", 1.0)},
)
def sce(tensors: Tensors, *, density: Annotated[float, Range(0, 1)] = 1.0) -> Merged:
    """Select, calculate, erase (Wan et al., 2024, arXiv 2408.07990).

    Kept are the elements in which the experts differ most; every task vector weighs by its mean square; entries against
    the elected sign are erased. Where nothing is kept, all weigh alike; mergekit has them weigh alike already where the
    mean squares add up to less than 1e-6, as those of many fine-tunes do.

    Args:
        tensors: a base and one expert or more.
        density: share of the elements with any variance that are kept (mergekit's select_topk).
    """
    count, ones = len(tensors), torch.ones(len(tensors), dtype=torch.float64)

    def deviation(chunk: Chunk) -> torch.Tensor:
        """The root of the variance, whose order it has: exactly 0 where all experts are equal, in range for all."""
        found, first = stacked("deviation", 1, chunk.size), 0
        for part in chunk.exact(deltas=True):
            mean = torch.mv(part.mT, ones).div_(count)
            squares = torch.mv(part.sub_(mean).square_().mT, ones)
            found[0, first : first + len(squares)].copy_(squares.div_(count).sqrt_())
            first += len(squares)
        return found

    select: Trim | None = None
    if density < 1:
        varied = int(tensors.sums(lambda chunk: torch.count_nonzero(deviation(chunk))))
        select = Trim(largest(tensors, [int(varied * density)], deviation), "exact")

    def kept(chunk: Chunk) -> torch.Tensor:
        if select is None:
            return chunk.deltas()
        selected = select(deviation(chunk), chunk.number == 0).sign_()
        return chunk.deltas().mul_(selected)

    energy = tensors.sums(lambda chunk: kept(chunk).double().square_().sum(1)).tolist() if tensors.numel else []
    total = sum(energy)
    weight = [one / total for one in energy] if total > 0 else [1 / count] * count
    return elected(tensors, rescaled(tensors, kept, "none"), weight, 1.0, "mean", plain_sign=True)
