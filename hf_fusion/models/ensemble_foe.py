"""Ensembles: fusion of the experts' outputs by a fixed rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

RULES = ("mean", "max_model")
OVER = ("logits", "probabilities")
LEAST_PROBABILITY = 1e-8  # lower bound of probabilities before the logarithm, so that losses are finite


class FixedFuser(nn.Module):
    """Mean of the experts' outputs, or their maximum for each label; replaces the MLP and has no parameters.

    Args:
        experts: K, number of experts.
        rule: "mean" (simple and weighted ensemble) or "max_model" (fusion_bench's max-model predictor).
        over: kind of the inputs: "logits", -inf for labels that an expert lacks or if it did not run; "probabilities",
            0 as well. Scores of regression are given as logits.
        weights: of the experts in the mean; default is equal weights.
    """

    def __init__(self, experts: int, rule: str, over: str, weights: Sequence[float] | None) -> None:
        super().__init__()
        self.rule, self.over = rule, over
        self.weights = [1.0] * experts if weights is None else list(weights)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, K C) -> (B, C): logits, or the logarithms of probabilities."""
        outputs = features.float().view(len(features), len(self.weights), -1)  # (B, K, C)
        absent = float("-inf") if self.over == "logits" else 0.0
        # (B, K): an expert with non-finite outputs on an example does not count for it
        is_finite = (outputs != absent).any(-1)
        if self.rule == "max_model":
            fused = outputs.amax(1)
        else:
            shares = is_finite * torch.tensor(self.weights, device=outputs.device)  # (B, K)
            shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            fused = (outputs.masked_fill(~is_finite[..., None], 0) * shares[..., None]).sum(1)
        if self.over == "probabilities":
            return fused.clamp(min=LEAST_PROBABILITY).log()
        return fused.masked_fill(~is_finite.any(1, keepdim=True), 0)


def fused_logits(logits: torch.Tensor, onehot: torch.Tensor, regression: bool) -> torch.Tensor:
    """Map experts' logits (G, n, C_b) to the fused label space, (G, n, C); rows that are not finite become -inf.

    Args:
        logits: -inf in columns without a label.
        onehot: (G, C_b, C), which fused label each of an expert's labels is; a fused label that none is gets -inf, one
            that several are log Σ exp of theirs.
        regression: scores: there is one label.
    """
    if regression:
        return torch.where(logits.isfinite(), logits, float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    summed = torch.bmm((logits - largest).double().exp(), onehot.double())  # in fp64 those 700 below do not vanish
    known = onehot.any(1)[:, None] & summed.isfinite().all(-1, keepdim=True)  # (G, n, C)
    fused = summed.clamp(min=torch.finfo(torch.float64).tiny).log() + largest
    return torch.where(known, fused, float("-inf")).float()


def check_ensemble(config: Any) -> None:
    """Check that experts can be fused by the rule of a config.

    Raises:
        ValueError: the rule is unknown, weights are invalid, or an expert lacks logits for the mean.
    """
    for name, value, allowed in (("rule", config.rule, RULES), ("over", config.over, OVER)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    weights = config.weights
    if weights is not None:
        if config.rule != "mean":
            raise ValueError(f"the rule {config.rule!r} has no use for weights; 'mean' weighs")
        if len(weights) != config.num_experts or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights must hold a share for each of the {config.num_experts} experts, not {weights}")
    if config.rule == "mean" and config.over == "logits":
        for expert in config.experts:
            if unknown := sorted(set(range(config.num_outputs)) - set(expert["label_map"])):
                raise ValueError(
                    f"{expert['name']} does not know the label {config.id2label[unknown[0]]!r}, so there is no mean of"
                    " all experts' logits: over='probabilities' counts what is unknown as 0, label_maps may join labels"
                )


__all__ = ["FixedFuser", "check_ensemble", "fused_logits"]
