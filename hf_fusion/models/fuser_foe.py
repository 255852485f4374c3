"""The fuser that is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Fuser(nn.Module):
    """The MLP that fuses: experts' outputs (or embeddings) -> fused outputs (or one score per expert)."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, dropout: float) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.output = nn.Linear(widths[-1], outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, inputs) -> (B, outputs)."""
        features = features.to(self.output.weight.dtype)
        for linear in self.hidden:
            features = self.dropout(torch.relu(linear(features)))
        return self.output(features)


__all__ = ["Fuser"]
