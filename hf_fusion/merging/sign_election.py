"""TIES' election: the sign of every merged element, and the mean or sum of the entries that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fusion.merging.engine.tensors import FLOAT64_BLOCK, Chunk, Merged, Tensors, scratch, stacked
from hf_fusion.merging.sparsification import SparseVectors

CANCELLED = 1e-6
"""Weights cancel out if the magnitude of their sum is at most this share of the sum of their magnitudes."""


def merge_elected_signs(
    tensors: Tensors, kept: SparseVectors, weight: Sequence[float], scaling: float, merge: str, plain_sign: bool = False
) -> Merged:
    """θ0 + λ times the weighted mean or sum of the entries that have the elected sign.

    Multiplied by the elected sign, agreeing entries are positive and others are clamped to 0: sums over the experts are
    products of a (size, K) matrix with a vector, without masks. Votes are counted in float64, where products of float32
    are exact: votes that cancel are 0 on every machine, and elect +.

    If the weights of agreeing entries cancel, which takes negative weights, their sum is not divided.

    Args:
        tensors: the inputs.
        kept: sparsified task vectors.
        weight: of each expert.
        scaling: λ.
        merge: "mean" or "sum" of the agreeing entries.
        plain_sign: elect by the sum of the task vectors; else by their weighted sum.
    """
    weights = torch.tensor(weight)
    sizes = weights.abs() * torch.tensor(kept.factors)
    votes = torch.ones(len(weight), dtype=torch.float64) if plain_sign else sizes.double()
    negative = [index for index, w in enumerate(weight) if w < 0]
    one = torch.ones(())

    def merged(chunk: Chunk) -> torch.Tensor:
        sign, total, below = (scratch(name)[: chunk.size] for name in ("sign", "total", "below"))
        entries = kept.entries(chunk)
        if plain_sign:
            _count_votes(entries, votes, sign)
        for index in negative:
            entries[index].neg_()
        if not plain_sign:
            _count_votes(entries, votes, sign)
        torch.copysign(one, sign, out=sign)  # a sum of 0 elects +
        agreeing = entries.mul_(sign).clamp_(min=0)
        torch.mv(agreeing.T, sizes, out=total)
        if merge == "mean":
            torch.mv(agreeing.sign_().T, weights, out=below)
            none = torch.eq(below, 0, out=scratch("none")[: chunk.size])
            if negative:  # weights that cancel up to rounding
                torch.mv(agreeing.T, weights.abs() * CANCELLED, out=none)
                torch.le(below.abs(), none, out=none)
                below.mul_(1 - none)
            total.div_(below.add_(none))
        return torch.addcmul(chunk.base, total, sign, value=scaling, out=total)

    return merged


def _count_votes(entries: torch.Tensor, votes: torch.Tensor, out: torch.Tensor) -> None:
    """Σ_i votes_i entries_i, (K, size) float32 -> (size,) float32, summed in float64."""
    for first in range(0, len(out), FLOAT64_BLOCK):
        block = slice(first, min(first + FLOAT64_BLOCK, len(out)))
        wide = stacked("votes", len(votes), block.stop - first, FLOAT64_BLOCK, torch.float64).copy_(entries[:, block])
        out[block].copy_(torch.mv(wide.T, votes))
