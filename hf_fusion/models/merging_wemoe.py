"""Rules that merge the tensors that are not up-scaled.

A rule is a function of one tensor of the base, the experts' task vectors (their differences from it) and λ; a new rule
is a function here and its entry in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Rule = Callable[[torch.Tensor, Sequence[torch.Tensor], float], torch.Tensor]


def task_arithmetic(base: torch.Tensor, vectors: Sequence[torch.Tensor], scaling: float) -> torch.Tensor:
    """θ0 + λ Σ τ_i (Ilharco et al., 2023, arXiv 2212.04089)."""
    merged = base.clone()
    for vector in vectors:
        merged.add_(vector, alpha=scaling)
    return merged


def simple_average(base: torch.Tensor, vectors: Sequence[torch.Tensor], scaling: float) -> torch.Tensor:
    """The mean of the experts; λ is not used."""
    return task_arithmetic(base, vectors, 1 / len(vectors))


def ties(base: torch.Tensor, vectors: Sequence[torch.Tensor], scaling: float) -> torch.Tensor:
    """θ0 + λ times the disjoint mean of trimmed task vectors (TIES; Yadav et al., 2023, arXiv 2306.01708).

    Each task vector is trimmed to the 20 % of its entries with the largest magnitude, at least one. The sign of the
    kept entries' sum is elected, and the kept entries of that sign are averaged. Where the sum is 0, nothing is added.
    """
    total = torch.zeros_like(base, dtype=torch.float64)
    trimmed = []
    for vector in vectors:
        magnitude, kept = vector.abs(), max(1, round(0.2 * vector.numel()))
        threshold = magnitude.flatten().kthvalue(vector.numel() - kept + 1).values
        trimmed.append(torch.where(magnitude >= threshold, vector, 0.0))
        total += trimmed[-1]
    sign = total.sign()
    agreeing, count = torch.zeros_like(base), torch.zeros_like(base)
    for vector in trimmed:
        agrees = (vector.sign() == sign) & (vector != 0)
        agreeing += torch.where(agrees, vector, 0.0)
        count += agrees
    return base + scaling * agreeing / count.clamp(min=1)


RULES: dict[str, Rule] = {"task_arithmetic": task_arithmetic, "simple_average": simple_average, "ties": ties}

__all__ = ["RULES", "Rule"]
