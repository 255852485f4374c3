"""Averaging, task arithmetic and ExPO: weighted sums of the inputs with fixed weights."""

from __future__ import annotations

from typing import Annotated

from hf_fusion.merging.engine.tensors import Combination, Tensors
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.schema import EachNumber, Range

__all__ = ["expo", "linear", "task_arithmetic"]


@merge_method("Linear (average)", base="", needs="chunks", paper="2203.05482", mergekit=mk.WEIGHT | mk.summed(True))
def linear(tensors: Tensors, *, weight: EachNumber = (1.0,), normalize: bool = True) -> Combination:
    """Σ w_i θ_i / Σ w_i: the average of the experts (Wortsman et al., 2022, arXiv 2203.05482).

    Args:
        tensors: two experts or more; a base does not count.
        weight: w_i.
        normalize: divide by the sum of the weights, as in mergekit.

    Raises:
        ValueError: the weights sum to 0 with normalize.
    """
    total = sum(weight) if normalize else 1.0
    if abs(total) < 1e-8:
        raise ValueError(f"the weights of {tensors.name} sum to 0 (use normalize: false)")
    return Combination(0.0, [w / total for w in weight])


@merge_method("Task arithmetic", base="needed", needs="chunks", paper="2212.04089", mergekit=mk.TASK | mk.summed(False))
def task_arithmetic(
    tensors: Tensors, *, scaling: Annotated[float, Range()] = 0.3, weight: EachNumber = (1.0,), normalize: bool = False
) -> Combination:
    """θ0 + λ Σ w_i τ_i (Ilharco et al., 2023, arXiv 2212.04089).

    Args:
        tensors: a base and one expert or more.
        scaling: λ.
        weight: w_i.
        normalize: divides the weights by their sum, as mergekit can.
    """
    factors = [scaling * w for w in shares(weight, normalize)]
    return Combination(1 - sum(factors), factors)


@merge_method("ExPO", base="needed", needs="chunks", experts=(1, 1), paper="2404.16792")
def expo(tensors: Tensors, *, scaling: Annotated[float, Range()] = 0.3) -> Combination:
    """θ1 + α (θ1 - θ0): extrapolation from the model before alignment beyond the aligned one (ExPO, arXiv 2404.16792).

    Args:
        tensors: the model before alignment as the base, the aligned one as the only expert.
        scaling: α.
    """
    return Combination(-scaling, [1 + scaling])


def shares(weight: EachNumber, normalize: bool) -> list[float]:
    """Weights, with `normalize` divided by their sum unless it is 0."""
    total = sum(weight)
    return [w / total for w in weight] if normalize and abs(total) > 1e-8 else list(weight)
