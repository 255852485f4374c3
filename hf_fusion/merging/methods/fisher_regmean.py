"""Data-dependent methods: Fisher-weighted averaging and RegMean, from statistics of each expert on its data.

`hf_fusion.training.fisher` and `hf_fusion.training.gram` compute the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch

from hf_fusion.merging.engine.tensors import Chunk, Combination, Merged, Statistic, Tensors, compute_device, scratch
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.methods.linear import shares
from hf_fusion.schema import EachNumber, Range

__all__ = ["fisher", "regmean"]

RIDGE = 1e-6
"""Ridge towards the average, relative to each input's energy; determines directions without examples."""


@merge_method("Fisher", base="", needs="chunks", paper="2111.09832", statistics="fisher")
def fisher(
    tensors: Tensors,
    *,
    weight: Annotated[EachNumber, Range(0)] = (1.0,),
    floor: Annotated[float, Range(1e-30)] = 1e-6,
    normalize: bool = False,
) -> Merged | Combination:
    """Σ w_i (F_i + ε) θ_i / Σ w_i (F_i + ε), element by element (Matena and Raffel, 2022, arXiv 2111.09832, eq. 4).

    Tensors without Fisher information are averaged by the weights; so are, in effect, elements with all F_i far below
    ε. Sums are in float64, so that neither a large F_i nor a small ε overflows or vanishes.

    Args:
        tensors: the experts, with the diagonal Fisher information of each.
        weight: w_i, the paper's λ_i.
        floor: ε.
        normalize: multiply w_i by 1 / (‖F_i‖ + ε), ‖F_i‖ over the whole model, so that an expert with generally larger
            gradients gets no larger weight; as in fusion_bench and MergeLM, but not in the paper.

    Raises:
        ValueError: some experts have no Fisher information of the tensor, or all weights are 0.
    """
    statistics, average = _complete_statistics(tensors), _average(tensors, weight)
    if not statistics:
        return Combination(0.0, average)
    if any(m.reader.shape != tensors.shape for m in statistics):
        raise ValueError(f"the Fisher information of {tensors.name} is not of {list(tensors.shape)}")
    norms = [m.norm + floor if normalize else 1.0 for m in statistics]
    factors = [w / norm for w, norm in zip(average, norms, strict=True)]

    def merged(chunk: Chunk) -> torch.Tensor:
        total, sums, share, values = (
            scratch(f"fisher {name}", torch.float64)[: chunk.size] for name in ("total", "sums", "share", "values")
        )
        total.zero_(), sums.zero_()
        for index, factor in enumerate(factors):
            share.copy_(chunk.statistic(index)).add_(floor).mul_(factor)
            total.addcmul_(share, values.copy_(chunk.expert(index)))
            sums.add_(share)
        return total.div_(sums).float()

    return merged


@merge_method("RegMean", base="", needs="whole", paper="2212.09849", statistics="gram")
def regmean(
    tensors: Tensors,
    *,
    weight: Annotated[EachNumber, Range(0)] = (1.0,),
    off_diagonal: Annotated[float, Range(0, 1)] = 0.95,
) -> torch.Tensor | Combination:
    """W = (Σ w_i G_i)⁻¹ Σ w_i G_i W_i: least squares to all experts' outputs on their inputs (RegMean, 2212.09849).

    G_i = X_iᵀ X_i / N_i of the layer's inputs, W_i as (d_in, d_out). Biases and all other tensors that are not weights
    of linear layers are averaged by the weights. With Gram matrices of `training.gram.measure_gram_merged` this is
    RegMean++.

    Directions that no expert's examples determine are averaged: a ridge of 1e-6 times each input's energy pulls towards
    the average.

    Args:
        tensors: the experts, with the Gram matrix of each.
        weight: w_i. N_i, the number of tokens, gives the paper's sums XᵀX; fusion_bench has means, as here.
        off_diagonal: factor for the off-diagonal entries of G_i: 0.9 in the paper (0.1 for T5), 0.95 for
            CLIP and 0.6 for GPT-2 in fusion_bench.

    Raises:
        ValueError: the matrices of some experts are missing or do not fit, the sum cannot be inverted, or all weights
            are 0.
    """
    statistics, average = _complete_statistics(tensors), _average(tensors, weight)
    if not statistics:
        return Combination(0.0, average)
    axis = statistics[0].axis
    size = tensors.shape[axis]
    if len(tensors.shape) != 2 or any(m.axis != axis or m.reader.shape != (size, size) for m in statistics):
        raise ValueError(f"the Gram matrices of {tensors.name} are not those of a weight of {list(tensors.shape)}")
    device = compute_device()
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    target = torch.zeros(size, tensors.numel // size, dtype=torch.float64, device=device)
    mean = torch.zeros_like(target)
    for index, w in enumerate(average):
        scaled = tensors.whole(statistics[index].reader).to(device).double()
        diagonal = scaled.diagonal() * w
        scaled.mul_(w * off_diagonal).diagonal().copy_(diagonal)
        expert = tensors.whole(tensors.experts[index]).to(device).double()
        expert = expert if axis == 0 else expert.T  # (d_in, d_out)
        gram += scaled
        target.addmm_(scaled, expert)
        mean.add_(expert, alpha=w)
    energy = gram.diagonal() * RIDGE
    energy[energy == 0] = 1.0  # an input that is always 0: averaged
    gram.diagonal().add_(energy)
    target.addcmul_(energy[:, None], mean)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ValueError(f"the Gram matrices of {tensors.name} cannot be inverted: lower off_diagonal={off_diagonal}")
    solved = torch.cholesky_solve(target, factor).float().cpu()
    return solved if axis == 0 else solved.T.contiguous()


def _complete_statistics(tensors: Tensors) -> Sequence[Statistic]:
    """The statistics of all experts for a tensor; empty if none has any."""
    found = [m for m in tensors.statistics if m is not None]
    if found and len(found) < len(tensors):
        missing = next(i for i, m in enumerate(tensors.statistics) if m is None)
        raise ValueError(f"the statistics of expert {missing + 1} lack {tensors.name}, which those of others have")
    return found


def _average(tensors: Tensors, weight: Sequence[float]) -> list[float]:
    """Weights, normalized to a sum of 1."""
    if not any(weight):
        raise ValueError(f"the weights of {tensors.name} are all 0")
    return shares(weight, normalize=True)
