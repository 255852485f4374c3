"""Model Stock and Arcee Fusion: weights from angles between task vectors, or from the importance of values."""

from __future__ import annotations

import math
from typing import Literal

import torch

from hf_fusion.merging.engine.grouped_sums import combination, grams
from hf_fusion.merging.engine.tensors import CHUNK, Combination, Merged, Tensors
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.schema import Per

__all__ = ["arcee_fusion", "model_stock"]


@merge_method(
    "Model stock",
    base="needed",
    needs="norms",
    experts=(2, None),
    paper="2403.19522",
    mergekit={"filter_wise": mk.flag("per", False, on="row", off="tensor")},
)
def model_stock(tensors: Tensors, *, per: Per = "tensor", average: Literal["cosine", "angle"] = "cosine") -> Merged:
    """r θ̄ + (1 - r) θ0 with r = K cos α / ((K - 1) cos α + 1): the average of the experts, interpolated to the base.

    α is the angle between two task vectors; r falls from 1 at cos α = 1 to 0 at a right angle. In the paper r is in
    [0, 1], and cos α = ‖μ - θ0‖² / ‖θi - θ0‖² >= 0, where μ is the centre around which fine-tunes lie. For obtuse
    angles that centre, and therefore the merge, is the base; mergekit and fusion_bench extrapolate beyond the base
    there, without bound if the denominator is near 0. A task vector of 0 counts as orthogonal to all others. (Model
    Stock, arXiv 2403.19522, equation 6.)

    Args:
        tensors: a base and two experts or more.
        per: one r for the whole tensor, per row, or per column. mergekit's
            ``filter_wise: true`` is "row".
        average: the mean over all pairs of more than two experts is that of the "cosine" (mergekit) or of the "angle"
            (fusion_bench).
    """
    count = len(tensors)
    if count == 1:  # the others lack this tensor
        return Combination(0.0, [1.0])
    gram = grams(tensors, True, per)  # (G, K, K)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms[:, :, None] * norms[:, None, :]
    # a task vector of 0 is at right angles to all
    cosines = torch.where(lengths == 0, 0.0, gram / lengths).clamp(-1, 1)
    row, column = torch.triu_indices(count, count, offset=1)
    pairs = cosines[:, row, column]
    cosine = pairs.mean(1) if average == "cosine" else pairs.arccos().mean(1).cos()
    cosine = cosine.clamp(min=0)
    ratio = count * cosine / ((count - 1) * cosine + 1)  # (G,)
    return combination(per, 1 - ratio, (ratio / count).expand(count, -1))


@merge_method("Arcee Fusion", base="needed", needs="whole", experts=(1, 1), mergekit={})
def arcee_fusion(tensors: Tensors) -> torch.Tensor:
    """θ0 + m ∘ τ, where m selects elements whose importance |τ| · KL is at least its median + 1.5 · (Q3 - Q1).

    KL is the divergence KL(p + ε ‖ q + ε) of a row's softmax p from the base's q, with ε = 1e-8; a vector is one row.
    Quantiles are the values at ⌊q (n - 1)⌋ in ascending order. As mergekit's ``arcee_fusion``, but with exact quantiles
    (mergekit samples a million values of larger tensors) and importance in float64, since p and q of a fine-tune are
    nearly equal. An expert equal to the base leaves it unchanged.

    Args:
        tensors: a base and one expert.
    """
    base, expert = tensors.whole(tensors.required_base), tensors.whole(tensors.experts[0])
    if not tensors.numel:
        return base
    width = (tensors.shape or (1,))[-1]
    importance = torch.empty(tensors.numel // width, width, dtype=torch.float64)
    step = max(1, CHUNK // width)
    for parts in zip(importance.split(step), expert.view(-1, width).split(step), base.view(-1, width).split(step)):
        out, one, other = parts[0], parts[1].double(), parts[2].double()
        p, q = (values.softmax(-1).add_(1e-8) for values in (one, other))
        divergence = p.mul(p.div(q).log_()).sum(-1, keepdim=True)
        torch.mul(one.sub_(other).abs_(), divergence, out=out)
    flat = importance.view(-1).numpy().copy()
    ranks = [math.floor(share * (len(flat) - 1)) for share in (0.25, 0.5, 0.75)]
    flat.partition(ranks)
    lower, median, upper = (float(flat[rank]) for rank in ranks)
    kept = importance.view(tensors.shape) >= median + 1.5 * (upper - lower)
    return base.add_(expert.sub_(base).mul_(kept))
