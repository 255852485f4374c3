"""What a fusion is measured against: ensembles without training, the best expert, the oracle.

All take ``outputs`` (N, K, C): the experts' probabilities (or scores) in the fused label space.
"""

from __future__ import annotations

import torch


def mean_ensemble(outputs: torch.Tensor) -> torch.Tensor:
    """Mean of the experts' softmaxes, (N, C)."""
    return outputs.mean(1)


def max_confidence(outputs: torch.Tensor) -> torch.Tensor:
    """The softmax of the most confident expert, (N, C)."""
    surest = outputs.amax(2).argmax(1)
    return outputs[torch.arange(len(outputs)), surest]


def oracle_expert(outputs: torch.Tensor, labels: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
    """Which examples are right if the best expert for each is known, (N,) bool.

    Args:
        labels: (N,) true classes.
        experts: (N,) the expert whose domain each example is; without it an example counts as right if any expert is.
    """
    right = outputs.argmax(2) == labels[:, None]
    return right.any(1) if experts is None else right[torch.arange(len(right)), experts]
