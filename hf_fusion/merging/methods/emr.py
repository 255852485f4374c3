"""EMR-Merging: one unified task vector, with a mask and a rescaler per task."""

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
    """θ0 + λ_i m_i ∘ τ: the model of one task, from a unified task vector τ (EMR-Merging, 2405.17461, algorithm 1).

    Elect: τ has the sign of Σ τ_j, and the largest magnitude among the entries with that sign. Mask: m_i is 1 where τ_i
    has the sign of τ. Rescale: λ_i = Σ |τ_i| / Σ |m_i ∘ τ|, over the whole model; 1 if m_i is 0 everywhere (the task's
    model is then θ0). If Σ τ_j is 0, its sign is negative, as in the released code and in fusion_bench.

    The method gives one model per task. One merge writes one of them.

    Args:
        tensors: a base and one expert or more.
        expert: i, the task whose model is written, counted from 1 in the recipe's order; 0 writes θ0 + τ, without mask
            and rescaler.
        rescale: sum over all "elements", as in the paper; or over the means of all "tensors", as in the released code
            and in fusion_bench.

    Raises:
        ValueError: there is no such expert, or a tensor lacks one.
    """
    if expert > len(tensors):
        raise ValueError(f"{tensors.name} has {len(tensors)} experts, but expert is {expert}")
    if not expert:
        return lambda chunk: _unified_task_vector(chunk).add_(chunk.base)
    factor = float(tensors.model.compute_once(("emr", rescale), lambda model: _rescalers(model, rescale))[expert - 1])

    def merged(chunk: Chunk) -> torch.Tensor:
        elected = _unified_task_vector(chunk)
        return elected.mul_(_agreement_mask(elected.sign(), chunk.delta(expert - 1))).mul_(factor).add_(chunk.base)

    return merged


def _unified_task_vector(chunk: Chunk) -> torch.Tensor:
    """τ, (size,): the entry of largest magnitude with the sign of the sum of the task vectors."""
    elected, high, low = (scratch(f"emr {name}")[: chunk.size].zero_() for name in ("elected", "high", "low"))
    total = scratch("emr total", torch.float64)[: chunk.size].zero_()  # float64, since its sign is decisive
    for index in range(len(chunk.tensors)):
        delta = chunk.delta(index)
        total += delta
        torch.maximum(high, delta, out=high)
        torch.minimum(low, delta, out=low)
    return torch.where(total > 0, high, low, out=elected)


def _agreement_mask(sign: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """m_i: 1.0 where a task vector and τ have the same nonzero sign."""
    return torch.mul(delta, sign, out=scratch("emr agrees")[: len(delta)]).gt_(0)


def _rescalers(model: WholeModel, rescale: str) -> torch.Tensor:
    """λ_i of every expert, (K,) float64; 1 for an expert equal to the base."""
    count = max(len(tensors) for tensors in model.tensors)

    def sums(chunk: Chunk) -> torch.Tensor:
        elected = _unified_task_vector(chunk)
        sign, size = elected.sign(), elected.abs_()
        full, masked = [], []
        for index in range(count):
            delta = chunk.delta(index)
            masked.append(magnitudes(_agreement_mask(sign, delta).mul_(size)))
            full.append(magnitudes(delta))
        return torch.stack([torch.stack(full), torch.stack(masked)])

    total = torch.zeros(2, count, dtype=torch.float64)
    for tensors in model.tensors:
        if len(tensors) < count:
            raise ValueError(
                f"{tensors.name} has {len(tensors)} of {count} experts (mismatch: base leaves it as it is)"
            )
        total += tensors.sums(sums) / (1 if rescale == "elements" else max(1, tensors.numel))
    full, masked = total
    return torch.where(masked > 0, full / masked, 1.0)
