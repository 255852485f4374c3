"""Merges LoRA adapters to one adapter, on the factors of each module, without materialising an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.methods.linear import shares
from hf_fusion.schema import EachNumber, Range

__all__ = ["Factors", "lora"]


@dataclass(frozen=True)
class Factors:
    """A merged update B A of one module.

    Attributes:
        a: (r, d_in), fp32.
        b: (d_out, r), fp32.
        lost: ‖Σ w_i B_i A_i - B A‖², squared Frobenius norm of the truncation error; 0 for an exact merge.
        norm: ‖Σ w_i B_i A_i‖², squared Frobenius norm; 0 for an exact merge, where it is not needed.
    """

    a: torch.Tensor
    b: torch.Tensor
    lost: float = 0.0
    norm: float = 0.0


@merge_method("LoRA adapters as one", base="", needs="whole", merges="adapters")
def lora(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    *,
    weight: EachNumber = (1.0,),
    normalize: bool = False,
    rank: Annotated[int, Range(0)] = 0,
) -> Factors:
    """Σ w_i B_i A_i of one module, as one pair of factors.

    Concatenation gives the exact sum, [w_1 B_1 … w_K B_K] [A_1; …; A_K], with rank Σ r_i. A smaller rank is reached by
    the truncated singular value decomposition, the best approximation of that rank (Eckart and Young), of
    Q_B (R_B R_Aᵀ) Q_Aᵀ, so that no matrix larger than (Σ r_i, Σ r_i) is decomposed. Equals PEFT's
    ``add_weighted_adapter`` with "cat" and "svd".

    Args:
        pairs: A (r_i, d_in) and B (d_out, r_i) of each adapter, with its scaling; None if it does not adapt the module.
        weight: w_i. An adapter that does not adapt the module adds 0.
        normalize: divide the weights by their sum.
        rank: of the merged factors; 0: exact, by concatenation.
    """
    given = [(a, b, w) for pair, w in zip(pairs, shares(weight, normalize), strict=True) if pair for a, b in [pair]]
    a = torch.cat([a.double() for a, _, _ in given])  # (R, d_in)
    b = torch.cat([b.double() * w for _, b, w in given], 1)  # (d_out, R)
    if not 0 < rank < len(a):
        return Factors(a.float(), b.float())
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma[:rank].sqrt()  # shared equally between the factors
    b, a = (q_b @ u[:, :rank]) * root, (q_a @ v[:rank].T * root).T
    energy = sigma.square()
    return Factors(a.float(), b.float(), float(energy[rank:].sum()), float(energy.sum()))
