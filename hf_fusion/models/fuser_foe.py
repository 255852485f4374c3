"""The fusers that are learned: the paper's MLP, and which class belongs to each name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .attention_foe import AttentionFuser
from .gated_foe import GatedFuser

# name in a config -> options of `GatedFuser`
GATED = {
    "stacking": {"gates": False, "labels": True},
    "gating": {"gates": True, "labels": False},
    "gated-stacking": {"gates": True, "labels": True},
}
FUSERS = ("mlp", *GATED, "attention")


class Fuser(nn.Module):
    """The MLP that fuses: experts' outputs (or embeddings) -> fused outputs (or one score per expert)."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, dropout: float, experts: int = 1) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.output = nn.Linear(widths[-1], outputs)
        self.dropout = nn.Dropout(dropout)
        self.experts, self.inputs = experts, inputs
        self.position = None  # the search of neighbours compares outputs, as in the paper

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, inputs) -> (B, outputs)."""
        features = features.to(self.output.weight.dtype)
        for linear in self.hidden:
            features = self.dropout(torch.relu(linear(features)))
        return self.output(features)

    @property
    def shown_size(self) -> int:
        """R, the width of what an expert shows."""
        return self.inputs // self.experts

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """What each expert shows: (B, K C) -> (B, K, C)."""
        return features.view(len(features), self.experts, -1)

    def read_expert(self, expert: int, part: torch.Tensor) -> torch.Tensor:
        """What one expert shows: its outputs, (B, C)."""
        return part

    def combine(self, shown: torch.Tensor, queried: torch.Tensor) -> torch.Tensor:
        """What the experts show (B, K, C), and which were queried (B, K) -> fused outputs (B, outputs)."""
        return self(torch.where(queried[..., None], shown, 0.0).flatten(1))


def build_fuser(config: Any) -> Fuser | GatedFuser | AttentionFuser:
    """The untrained fuser of a config."""
    experts, outputs = config.num_experts, 0 if config.vocabularies else config.num_outputs
    sizes = [expert.get("feature_size") or 0 for expert in config.experts]
    if config.features_from is not None:
        sizes = [sizes[config.features_from]]
    selection = config.mode == "selection"
    if config.fuser == "attention":
        return AttentionFuser(sizes, outputs, experts=experts, selection=selection)
    if config.fuser in GATED:
        return GatedFuser(sizes, outputs, experts=experts, selection=selection, **GATED[config.fuser])
    if selection:
        return Fuser(sum(sizes), config.fuser_hidden, experts, config.fuser_dropout)
    return Fuser(experts * outputs, config.fuser_hidden, outputs, config.fuser_dropout, experts)


__all__ = ["FUSERS", "GATED", "Fuser", "build_fuser"]
