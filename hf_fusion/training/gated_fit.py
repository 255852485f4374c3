"""Fits a `GatedFuser` on features of all experts: L-BFGS over few directions of the features, with an L2 penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from hf_fusion.models.gated_foe import CONFIDENCES, GatedFuser, confidence, log_probabilities

MOST_DIRECTIONS = 384  # principal directions of the features, for which weights are learned
CALIBRATION_PENALTY = 1e-3  # on the temperatures' distance from 1, and on the shifts
LEAST_DEVIATION = 1e-5  # a feature that varies less is left out
ITERATIONS = 60


class Design:
    """Features of N rows in few directions, so that a fit takes seconds.

    Every feature has mean 0 and variance 1 over the rows; embeddings, confidences and log-probabilities together have
    as much weight each.

    Args:
        parts: of each expert, logits and embedding (N, C + d_k).
        outputs: C.
        queried: sets of experts (M, N, K) for which the rows are repeated; None for all experts once.
        directions: the maximum number of principal directions.
    """

    def __init__(
        self,
        parts: Sequence[torch.Tensor],
        outputs: int,
        queried: torch.Tensor | None = None,
        directions: int = MOST_DIRECTIONS,
    ) -> None:
        self.queried = queried
        features = [_features(part, outputs) for part in parts]
        self.means = [each.mean(0) for each in features]
        sizes = [part.shape[1] - outputs for part in parts]
        kinds = [sum(sizes), CONFIDENCES * len(parts), outputs * len(parts)] if outputs else [sum(sizes)]
        self.scales = []
        for each, size in zip(features, sizes, strict=True):
            counts = [size, CONFIDENCES, outputs] if outputs else [size]
            shares = torch.cat([torch.full((n,), k**-0.5) for n, k in zip(counts, kinds, strict=True) if n])
            deviation = each.std(0, correction=0)
            self.scales.append(torch.where(deviation > LEAST_DEVIATION, shares / deviation, 0.0))
        scaled = [(each - mean) * scale for each, mean, scale in zip(features, self.means, self.scales, strict=True)]
        self.widths = [each.shape[1] for each in scaled]
        whole = torch.cat(scaled, 1)
        rank = min(directions, *whole.shape)
        self.axes = torch.eye(rank)
        if rank < whole.shape[1]:
            with torch.random.fork_rng(devices=[]):  # the decomposition starts from random directions
                torch.manual_seed(0)
                self.axes = torch.svd_lowrank(whole, q=rank, niter=2)[2]
        if queried is None:
            self.rows = whole @ self.axes
        else:
            by_expert = [part @ axes for part, axes in zip(scaled, self._axes(), strict=True)]
            stacked = torch.stack(by_expert, 1)  # (N, K, r)
            asked = queried.sum(2, keepdim=True)
            sets = [torch.einsum("nk,nkr->nr", each.float(), stacked) * len(parts) for each in queried]
            self.rows = torch.cat([each / count for each, count in zip(sets, asked, strict=True)])

    def _axes(self) -> tuple[torch.Tensor, ...]:
        """The directions, split into each expert's features."""
        found: tuple[torch.Tensor, ...] = torch.split(self.axes, self.widths)
        return found

    def to_features(self, weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights for directions (r, G) -> for each expert those for its features (G, F_k), and their bias (G,)."""
        found = []
        for axes, mean, scale in zip(self._axes(), self.means, self.scales, strict=True):
            own = (axes @ weights) * scale[:, None]
            found.append((own.T, -(mean @ own)))
        return found


def _features(part: torch.Tensor, outputs: int) -> torch.Tensor:
    """Logits and embedding -> what `GatedFuser.evidence` reads."""
    if not outputs:
        return part
    logits = part[:, :outputs]
    return torch.cat([part[:, outputs:], confidence(logits), log_probabilities(logits)], 1)


def fit_gated(
    fuser: GatedFuser,
    parts: Sequence[torch.Tensor],
    targets: torch.Tensor,
    *,
    penalty: float,
    design: Design,
) -> None:
    """Fits a fuser in place: the mean cross-entropy of its scores, plus penalties on squared weights.

    Args:
        fuser: its weights are replaced.
        parts: of each expert, logits and embedding (N, C + d_k).
        targets: fused labels, or in selection experts, (N,).
        penalty: on the weights.
        design: of these parts.
    """
    outputs, experts, queried = fuser.outputs, len(parts), design.queried
    repeated = 1 if queried is None else len(queried)
    targets = targets.repeat(repeated)
    asked = None if queried is None else queried.flatten(0, 1)
    weights = torch.zeros(design.rows.shape[1], fuser.evidence_size, requires_grad=True)
    bias = torch.zeros(fuser.evidence_size, requires_grad=True)
    learned = [weights, bias]
    gates = fuser.experts * fuser.gates
    mixes = fuser.gates and not fuser.selection
    if mixes:
        logits = torch.stack([part[:, :outputs] for part in parts], 1)  # (N, K, C)
        known = logits.isfinite().any(0)
        largest = logits.masked_fill(~known, float("-inf")).amax(2, keepdim=True)
        base = torch.where(known & largest.isfinite(), logits - largest, 0.0)
        temperature = torch.ones(experts, requires_grad=True)
        shift = torch.zeros(experts, outputs, requires_grad=True)
        learned += [temperature, shift]

    def objective() -> torch.Tensor:
        evidence = design.rows @ weights + bias
        scores = evidence[:, gates:] if not fuser.selection else evidence
        loss = penalty * weights.square().sum()
        if mixes:
            scaled = (base * temperature[:, None] + shift).masked_fill(~known, -1e4)
            logs = scaled.log_softmax(2).repeat(repeated, 1, 1)
            gate = evidence[:, :gates] if asked is None else evidence[:, :gates].masked_fill(~asked, -1e4)
            mixture = torch.logsumexp(logs + gate.log_softmax(1)[..., None], 1).clamp(min=-20)
            scores = mixture + scores if fuser.labels else mixture
            loss = loss + CALIBRATION_PENALTY * ((temperature - 1).square().sum() + shift.square().sum())
        return loss + nn.functional.cross_entropy(scores, targets)

    optimizer = torch.optim.LBFGS(
        learned, max_iter=ITERATIONS, history_size=10, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        linears = cast("list[nn.Linear]", list(fuser.evidence))
        for linear, (matrix, offset) in zip(linears, design.to_features(weights), strict=True):
            linear.weight.copy_(matrix)
            linear.bias.copy_(offset)
        fuser.bias.copy_(bias)
        if mixes:
            fuser.temperature.copy_(temperature)
            fuser.shift.copy_(shift)
        if hasattr(fuser, "known"):
            logits = torch.stack([part[:, :outputs] for part in parts], 1)
            fuser.known.copy_(logits.isfinite().any(0))
