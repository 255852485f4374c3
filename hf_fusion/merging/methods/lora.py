"""LoRA adapters of one base as one adapter: on the factors of each module, without ever forming an update."""

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
        lost: ‖Σ w_i B_i A_i - B A‖², Frobenius; 0 where nothing was cut off.
        norm: ‖Σ w_i B_i A_i‖², likewise; 0 where nothing had to be measured.
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

    Side by side they are that sum exactly: [w_1 B_1 … w_K B_K] [A_1; …; A_K], with a rank of Σ r_i. To a smaller rank
    they are cut by the singular value decomposition of the sum, the best of that rank (Eckart and Young): of
    Q_B (R_B R_Aᵀ) Q_Aᵀ, so that nothing larger than (Σ r_i, Σ r_i) is decomposed. As PEFT's ``add_weighted_adapter``
    with "cat" and "svd".

    Args:
        pairs: A (r_i, d_in) and B (d_out, r_i), scaling folded in, of each adapter; None where it leaves the module.
        weight: w_i. An adapter that leaves the module adds 0.
        normalize: divides the weights by their sum.
        rank: of the merged factors; 0: as many as it takes to be exact.
    """
    given = [(a, b, w) for pair, w in zip(pairs, shares(weight, normalize), strict=True) if pair for a, b in [pair]]
    a = torch.cat([a.double() for a, _, _ in given])  # (R, d_in)
    b = torch.cat([b.double() * w for _, b, w in given], 1)  # (d_out, R)
    if not 0 < rank < len(a):
        return Factors(a.float(), b.float())
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma[:rank].sqrt()  # each factor gets half, as if it had been trained
    b, a = (q_b @ u[:, :rank]) * root, (q_a @ v[:rank].T * root).T
    energy = sigma.square()
    return Factors(a.float(), b.float(), float(energy[rank:].sum()), float(energy.sum()))
