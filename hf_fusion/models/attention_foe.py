"""A fuser in which the experts attend to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .gated_foe import CONFIDENCES, LEAST_LOG, confidence, log_probabilities

WIDTH, HEADS = 64, 4


class AttentionFuser(nn.Module):
    """One token for each queried expert, attention between them, a weight for each: the mixture of what they predict.

    An expert's token is its embedding in a common space, plus its confidence (by weights that all experts share), plus
    a learned vector. Experts in another order, with their parameters, give the same scores, and `with_expert` adds one:
    all other parameters stay as they are, and so do scores for which the new one is not queried.

    Args:
        sizes: width of the embedding of each expert that is read, (K,).
        outputs: C, number of fused labels that experts give logits of; 0 for language models.
        experts: how many experts there are to select from; in output fusion, K.
        selection: whether the scores are those of experts.
    """

    def __init__(self, sizes: Sequence[int], outputs: int, *, experts: int, selection: bool) -> None:
        super().__init__()
        self.sizes, self.outputs, self.experts, self.selection = list(sizes), outputs, experts, selection
        self.widths = [outputs + size for size in sizes]  # of the parts of `features`
        self.projections = nn.ModuleList(nn.Sequential(nn.LayerNorm(s), nn.Linear(s, WIDTH)) for s in sizes)
        self.confidence = nn.Linear(CONFIDENCES, WIDTH)
        self.names = nn.Parameter(torch.randn(len(sizes), WIDTH) / WIDTH**0.5)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.score = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        self.choices = nn.Parameter(torch.randn(experts, WIDTH) / WIDTH**0.5) if selection else None

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.names.dtype

    @property
    def shown_size(self) -> int:
        """R, the width of what an expert shows."""
        return self.outputs + WIDTH

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """What all experts show: features (B, Σ_k (C + d_k)) -> (B, K, R)."""
        return torch.stack([self.read_expert(k, part) for k, part in enumerate(features.split(self.widths, 1))], 1)

    def read_expert(self, expert: int, part: torch.Tensor) -> torch.Tensor:
        """What one expert shows: logits and embedding (B, C + d_k) -> its probabilities and token (B, C + width)."""
        logits, embedding = part[:, : self.outputs].float(), part[:, self.outputs :]
        is_whole = embedding.isfinite().all(1, keepdim=True)
        if self.outputs:
            is_whole = is_whole & logits.isfinite().any(1, keepdim=True)
        token = self.projections[expert](torch.where(is_whole, embedding, 0.0).to(self.dtype)) + self.names[expert]
        if not self.outputs:
            return token.float() * is_whole
        token = token + self.confidence(confidence(logits).to(self.dtype))
        probabilities = log_probabilities(logits, float("-inf")).exp()
        return torch.cat([probabilities, token.float()], 1) * is_whole

    def combine(self, shown: torch.Tensor, queried: torch.Tensor) -> torch.Tensor:
        """What the experts show (B, K, R), and which were queried (B, K) -> scores (B, C), or (B, K) in selection."""
        counted = queried & (shown != 0).any(2)
        nobody = ~counted.any(1, keepdim=True)
        absent = ~counted & ~nobody  # of nobody, attention would have nothing to normalise
        tokens = self.norm(shown[..., self.outputs :].to(self.dtype))
        tokens = tokens + self.attention(tokens, tokens, tokens, key_padding_mask=absent, need_weights=False)[0]
        if self.choices is not None:
            weight = (~absent)[..., None].to(tokens.dtype)
            pooled = (tokens * weight).sum(1) / weight.sum(1)
            return self.score[:3](pooled).float() @ self.choices.float().T
        scores = self.score(tokens)[..., 0].float().masked_fill(absent, float("-inf"))
        mixture = (scores.softmax(1)[..., None] * shown[..., : self.outputs] * counted[..., None]).sum(1)
        return torch.where(nobody, 0.0, mixture).clamp(min=torch.finfo(torch.float32).tiny).log().clamp(min=LEAST_LOG)

    def position(self, shown: torch.Tensor, queried: torch.Tensor) -> torch.Tensor:
        """What is believed of an input: probabilities of labels, or of experts in selection."""
        return self.combine(shown, queried).softmax(1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of all experts (B, Σ_k (C + d_k)) -> scores (B, C), or (B, K) in selection."""
        shown = self.read(features)
        return self.combine(shown, torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device))

    def with_expert(self, size: int) -> AttentionFuser:
        """A copy for one more expert, which comes last; only its projection and its vector are new.

        Args:
            size: width of its embedding.
        """
        added = 1 if self.selection else 0
        wider = AttentionFuser(
            [*self.sizes, size], self.outputs, experts=self.experts + added, selection=self.selection
        )
        own = self.state_dict()
        for name, tensor in wider.state_dict().items():
            if name in ("names", "choices"):
                tensor[: len(own[name])] = own[name]
            elif name in own:
                tensor.copy_(own[name])
        return wider


__all__ = ["AttentionFuser"]
