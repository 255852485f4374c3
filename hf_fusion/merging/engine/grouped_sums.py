"""Inner products and weighted sums of a tensor's inputs, for the whole tensor, per row or per column.

Rows are along the last axis, columns along the first. Tensors are read in chunks.
"""

from __future__ import annotations

import torch

from hf_fusion.merging.engine.tensors import CANCELLATION_LIMIT, Chunk, Combination, Merged, Tensors
from hf_fusion.schema import Per

__all__ = ["combination", "grams"]


def grams(tensors: Tensors, deltas: bool, per: Per) -> torch.Tensor:
    """Inner products of the experts.

    Args:
        tensors: the experts.
        deltas: of their task vectors; else of their values.
        per: over the whole tensor, per row, or per column.

    Returns:
        (G, K, K) float64: one matrix per row or column, or one for the tensor.
    """
    if per == "tensor":
        return tensors.gram(deltas)[None]
    count = len(tensors)
    total = torch.zeros(_groups(tensors, per), count, count, dtype=torch.float64)
    for chunk in tensors.chunks():
        group, first = _group(chunk, per), 0
        for block in chunk.float64_blocks(deltas):
            groups = group[first : first + block.shape[1]]
            first += block.shape[1]
            for i in range(count):
                for j in range(i, count):
                    total[:, i, j].index_add_(0, groups, block[i] * block[j])
    return total.triu() + total.triu(1).mT


def combination(per: Per, base: torch.Tensor, experts: torch.Tensor) -> Merged:
    """A weighted sum of the inputs, with weights for the tensor, per row or per column.

    Args:
        per: what the weights are for.
        base: the base's weights, (G,) float64.
        experts: the experts' weights, (K, G) float64.
    """
    if per == "tensor":
        return Combination(float(base), experts[:, 0].tolist())

    # as in `Combination`: large weights amplify float32 rounding errors
    dtype = torch.float64 if bool((experts.abs().sum(0) + base.abs() > CANCELLATION_LIMIT).any()) else torch.float32

    def merged(chunk: Chunk) -> torch.Tensor:
        group = _group(chunk, per)
        total = torch.zeros(chunk.size, dtype=dtype)
        if chunk.tensors.base is not None:
            total.addcmul_(chunk.base.to(dtype), base.to(dtype)[group])
        for index, weights in enumerate(experts.to(dtype)):
            total.addcmul_(chunk.expert(index).to(dtype), weights[group])
        return total.float()

    return merged


def _groups(tensors: Tensors, per: Per) -> int:
    """Number of rows or columns; a scalar counts as a vector of one element."""
    size = (tensors.shape or (1,))[-1 if per == "row" else 0]
    return tensors.numel // size if size else 0


def _group(chunk: Chunk, per: Per) -> torch.Tensor:
    """Index of each element's row or column, (size,)."""
    index, groups = torch.arange(chunk.start, chunk.start + chunk.size), _groups(chunk.tensors, per)
    return index // (chunk.tensors.numel // groups) if per == "row" else index % groups
