"""EMR: one unified task vector, and for every task the mask and the rescaler that make the task's own model of it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from hf_fusion.merging.engine.tensors import Chunk, Merged, Tensors, WholeModel, magnitudes, scratch
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.schema import Range

__all__ = ["emr"]


@merge_method("EMR", base="needed", needs="norms", paper="2405.17461")
def emr(
    tensors: Tensors, *, expert: Annotated[int, Range(0)] = 0, rescale: Literal["elements", "tensors"] = "elements"
) -> Merged:
    """θ0 + λ_i m_i ∘ τ: one task's model, out of what all tasks share (EMR-Merging, arXiv 2405.17461, algorithm 1).

    Elect: τ has the sign of Σ τ_j, and of the entries that have it the largest magnitude. Mask: m_i is 1 where τ_i has
    the sign of τ. Rescale: λ_i = Σ |τ_i| / Σ |m_i ∘ τ|, over the whole model; 1 where m_i is 0 everywhere, and the
    task's model is θ0. Where Σ τ_j is 0, its sign counts as negative, as in the released code and in fusion_bench.

    The method has a model for each task. One run writes one of them: run it once for each.

    Args:
        tensors: a base and one expert or more.
        expert: i, the task whose model is written, from 1 on in the recipe's order; 0 writes θ0 + τ, which is for all
            tasks alike.
        rescale: the sums are of all "elements", as in the paper; or of the means of the "tensors", as in the released
            code and in fusion_bench.

    Raises:
        ValueError: there is no such expert, or a tensor lacks one.
    """
    if expert > len(tensors):
        raise ValueError(f"{tensors.name} has {len(tensors)} experts, and is to be made for number {expert}")
    if not expert:
        return lambda chunk: _elected(chunk).add_(chunk.base)
    factor = float(tensors.model.compute_once(("emr", rescale), lambda model: _rescalers(model, rescale))[expert - 1])

    def merged(chunk: Chunk) -> torch.Tensor:
        elected = _elected(chunk)
        return elected.mul_(_agrees(elected.sign(), chunk.delta(expert - 1))).mul_(factor).add_(chunk.base)

    return merged


def _elected(chunk: Chunk) -> torch.Tensor:
    """τ: of the sign that the experts' differences have in sum, the farthest from 0: (size,)."""
    elected, high, low = (scratch(f"emr {name}")[: chunk.size].zero_() for name in ("elected", "high", "low"))
    total = scratch("emr total", torch.float64)[: chunk.size].zero_()  # whose sign decides
    for index in range(len(chunk.tensors)):
        delta = chunk.delta(index)
        total += delta
        torch.maximum(high, delta, out=high)
        torch.minimum(low, delta, out=low)
    return torch.where(total > 0, high, low, out=elected)


def _agrees(sign: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """m_i: 1.0 where a difference is not 0 and has the sign of τ, which is not 0 either."""
    return torch.mul(delta, sign, out=scratch("emr agrees")[: len(delta)]).gt_(0)


def _rescalers(model: WholeModel, rescale: str) -> torch.Tensor:
    """λ_i of every expert, (K,) float64; 1 for one that left everything as it was."""
    count = max(len(tensors) for tensors in model.tensors)

    def sums(chunk: Chunk) -> torch.Tensor:
        elected = _elected(chunk)
        sign, size = elected.sign(), elected.abs_()
        own, kept = [], []
        for index in range(count):
            delta = chunk.delta(index)
            kept.append(magnitudes(_agrees(sign, delta).mul_(size)))
            own.append(magnitudes(delta))
        return torch.stack([torch.stack(own), torch.stack(kept)])

    total = torch.zeros(2, count, dtype=torch.float64)
    for tensors in model.tensors:
        if len(tensors) < count:
            raise ValueError(
                f"{tensors.name} has {len(tensors)} of {count} experts (mismatch: base leaves it as it is)"
            )
        total += tensors.sums(sums) / (1 if rescale == "elements" else max(1, tensors.numel))
    own, kept = total
    return torch.where(kept > 0, own / kept, 1.0)
