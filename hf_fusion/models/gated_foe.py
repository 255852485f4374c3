"""Fusers that read the experts' hidden states: they weigh the experts by gates, or add up evidence for each label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

CONFIDENCES = 4  # log-sum-exp of the logits, entropy, log of the largest probability, margin over the second
LEAST_LOG = -20.0  # lower bound of log-probabilities as features, and of the mixture's
MOST_MARGIN = 20.0


class GatedFuser(nn.Module):
    """Weights for the experts, from what each of them shows of the input, and the mixture of their probabilities.

    An expert k that was queried gives features f_k: its embedding, its confidence and, for classifiers, its
    log-probabilities. Each adds evidence for experts and labels, and what was not queried adds none,

        e = K / |S| Σ_{k in S} (A_k f_k + a_k),

    so that one fuser stands for every set S of queried experts. With calibrated probabilities p̃_k = softmax(τ_k z_k +
    b_k) over the labels that the expert knows, the fused score of label c is

        log Σ_{k in S} w_k p̃_k(c) + e_c,    w = softmax over S of e.

    Without `gates` the mixture is left out, which makes a linear stacker (Wolpert 1992); in selection the scores are
    e, one for each expert, whether queried or not.

    Args:
        sizes: width of the embedding of each expert that is read, (K,).
        outputs: C, number of fused labels that experts give logits of; 0 for language models.
        experts: how many experts there are to select from; in output fusion, K.
        selection: whether the scores are those of experts.
        gates: whether experts are weighed.
        labels: whether evidence is added for labels.
    """

    known: torch.Tensor
    temperature: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self, sizes: Sequence[int], outputs: int, *, experts: int, selection: bool, gates: bool, labels: bool
    ) -> None:
        super().__init__()
        self.experts = experts
        self.outputs, self.selection, self.gates, self.labels = outputs, selection, gates or selection, labels
        self.widths = [outputs + size for size in sizes]  # of the parts of `features`
        confidences = CONFIDENCES + outputs if outputs else 0
        self.evidence_size = experts * self.gates + (0 if selection else outputs * labels)
        self.evidence = nn.ModuleList(nn.Linear(size + confidences, self.evidence_size) for size in sizes)
        self.bias = nn.Parameter(torch.zeros(self.evidence_size))
        if outputs and not selection:
            self.temperature = nn.Parameter(torch.ones(experts))
            self.shift = nn.Parameter(torch.zeros(experts, outputs))
            self.register_buffer("known", torch.zeros(experts, outputs, dtype=torch.bool))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.bias.dtype

    @property
    def shown_size(self) -> int:
        """R, the width of what an expert shows."""
        return self.evidence_size + (0 if self.selection else self.outputs)

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """What all experts show: features (B, Σ_k (C + d_k)) -> (B, K, R)."""
        parts = features.split(self.widths, 1)
        return torch.stack([self.read_expert(index, part) for index, part in enumerate(parts)], 1)

    def read_expert(self, expert: int, part: torch.Tensor) -> torch.Tensor:
        """What one expert shows: logits, -inf for labels that it does not know, and embedding (B, C + d_k) -> (B, R).

        R is the number of labels, for calibrated probabilities, and the width of the evidence; in selection only that.
        """
        logits, embedding = part[:, : self.outputs].float(), part[:, self.outputs :]
        is_whole = embedding.isfinite().all(1, keepdim=True)
        if self.outputs:
            is_whole = is_whole & logits.isfinite().any(1, keepdim=True)
            embedding = torch.cat([embedding.float(), confidence(logits), log_probabilities(logits)], 1)
        embedding = torch.where(is_whole, embedding, 0.0)  # an expert that failed counts as not queried
        evidence = self.evidence[expert](embedding.to(self.dtype)).float() * is_whole
        if self.selection:
            return evidence
        return torch.cat([self.calibrated(expert, logits) * is_whole, evidence], 1)

    def calibrated(self, expert: int, logits: torch.Tensor) -> torch.Tensor:
        """An expert's calibrated probabilities, (B, C); 0 for labels that it does not know."""
        scaled = logits * self.temperature[expert].float() + self.shift[expert].float()
        return log_probabilities(scaled.masked_fill(~self.known[expert], float("-inf")), float("-inf")).exp()

    def combine(self, shown: torch.Tensor, queried: torch.Tensor) -> torch.Tensor:
        """What experts show (B, K, R), and which were queried (B, K) -> scores (B, C), or (B, K) in selection."""
        counted, total = self._total(shown, queried)
        if self.selection:
            return total
        labels = total[:, self.experts * self.gates :] if self.labels else torch.zeros(())
        if not self.gates:
            return labels
        nobody = ~counted.any(1, keepdim=True)
        weights = total[:, : self.experts].masked_fill(~counted & ~nobody, float("-inf")).softmax(1)
        mixture = (weights[..., None] * shown[..., : self.outputs]).sum(1)
        return mixture.clamp(min=torch.finfo(torch.float32).tiny).log().clamp(min=LEAST_LOG) + labels

    def _total(self, shown: torch.Tensor, queried: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which experts count (B, K), and the evidence of all of them (B, G)."""
        counted = queried & (shown != 0).any(2)
        evidence = shown[..., shown.shape[2] - self.evidence_size :] * counted[..., None]
        scale = shown.shape[1] / counted.sum(1, keepdim=True).clamp(min=1)
        return counted, evidence.sum(1) * scale + self.bias.float()

    def position(self, shown: torch.Tensor, queried: torch.Tensor) -> torch.Tensor:
        """What is believed of an input: weights of all experts, and with `labels` the labels' probabilities."""
        found = []
        if self.gates:
            found.append(self._total(shown, queried)[1][:, : self.experts].softmax(1))
        if self.labels and not self.selection:
            found.append(self.combine(shown, queried).softmax(1))
        return torch.cat(found, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of all experts (B, Σ_k (C + d_k)) -> scores (B, C), or (B, K) in selection."""
        shown = self.read(features)
        return self.combine(shown, torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device))


def log_probabilities(logits: torch.Tensor, least: float = LEAST_LOG) -> torch.Tensor:
    """Logits (B, C) -> log-probabilities, at least `least`; a row of which no logit is finite has `least`."""
    is_row = logits.isfinite().any(1, keepdim=True)
    return torch.where(is_row, logits, 0.0).log_softmax(1).masked_fill(~is_row, least).clamp(min=least)


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the logits, entropy, log of the largest probability and its margin: (B, C) -> (B, 4)."""
    is_row = logits.isfinite().any(1, keepdim=True)
    logits = torch.where(is_row, logits, 0.0)
    total = logits.logsumexp(1, keepdim=True)
    logs = log_probabilities(logits)
    entropy = -(logs.exp() * logs).sum(1, keepdim=True)
    largest = logs.topk(min(2, logs.shape[1]), 1).values
    margin = (largest[:, :1] - largest[:, -1:]).clamp(max=MOST_MARGIN)
    return torch.cat([total, entropy, largest[:, :1], margin], 1)


__all__ = ["CONFIDENCES", "GatedFuser", "confidence", "log_probabilities"]
