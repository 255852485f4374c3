"""Gaussian gates: the few inputs of the base at which a router decides, and the densities that it decides by.

An expert's gate at such an input is the mean of LN(x) over the expert's rows and the principal directions of its
covariance: a Gaussian that is isotropic outside these directions (probabilistic PCA, Tipping & Bishop, 1999). An
output projection of attention reads what the base's attention has collected from the context, so that the inputs of
a few of them tell the task of a token, and their decision serves the linears that follow.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .state_phatgoose import Routing, RoutingCalls

NOISE = 0.1  # variance of LN(x), which has variance 1 over its features, outside an expert's directions
DEPTH, COUNT = 0.45, 4  # decisions are spread over this share of the depth; later ones would serve few linears
ATTENTION_OUTPUT = re.compile(
    r"\w*att(n|ention)[\w.]*\.(output\.dense|o_proj|out_proj|c_proj|out_lin|dense|proj|wo)$", re.IGNORECASE
)
POOLED_HEADS = ("sequence-classification", "image-classification")  # one answer per example


def gate_points(model: nn.Module) -> list[str]:
    """Paths of the linears whose inputs Gaussian gates read, in order of execution; they depend on the base alone.

    The first linear of the first block, and the output projections of attention at up to `COUNT` depths.

    Args:
        model: a base, or a router's backbone.

    Returns:
        No path for an encoder-decoder, a model of several towers or one without attention: the paper's gates serve
        these.
    """
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    outputs = [path for path in linears if ATTENTION_OUTPUT.search(path)]
    stacks = {re.split(r"\.\d+\.", path)[0] for path in outputs}
    if len(stacks) != 1:  # their tokens are not the same
        return []
    first = next(path for path in linears if path.startswith(f"{min(stacks)}."))
    depths = {int(DEPTH * len(outputs) * part / COUNT) for part in range(1, COUNT + 1)}
    return [first, *(outputs[depth] for depth in sorted(depths))]


def before_points(model: nn.Module, adapted: Collection[str]) -> str:
    """The first adapted linear that the base runs before its gate points, so that none decides for it; "" if none."""
    points = gate_points(model)
    for path, _ in model.named_modules():
        if path in points:
            return ""
        if path in adapted:
            return path
    return ""


class GatePoint(nn.Module):
    """The experts' Gaussian gates at one input of the base.

    An expert's score is its log-density of z = LN(x) times the noise's variance σ² = `NOISE`, up to a term that all
    experts share: ``z·m + Σ_j s_j (v_j·z - v_j·m)²/2 + b`` with the mean m, directions v_j of variance λ_j,
    s_j = 1 - σ²/(λ_j + σ²) and b = -(|m|² + σ² Σ_j log(1 + λ_j/σ²))/2. This is the negative squared distance to the
    expert's subspace, halved, for directions of large variance. Scores are computed in fp32.

    Parameters:
        mean: (E, d_in).
        directions: (E, R, d_in), R the largest number of directions; others are 0.
        scale: (E, R), the s_j.
        offset: (E, R), the v_j·m.
        bias: (E,).

    Args:
        index: of the decision, in order of execution.
        summed: decisions whose scores are added up to this one's, with its own.
        d_in: width of the input.
        experts: E.
        rank: R.
        pools: score the mean of LN(x) over an example's tokens, instead of each token.
        calls: the router's calls.
        like: dtype and device.
    """

    def __init__(
        self,
        index: int,
        summed: Sequence[int],
        d_in: int,
        experts: int,
        rank: int,
        pools: bool,
        calls: RoutingCalls,
        like: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.index, self.summed, self.pools, self.calls = index, list(summed), pools, calls
        like = like or {}
        self.mean = nn.Parameter(torch.zeros(experts, d_in, **like))
        self.directions = nn.Parameter(torch.zeros(experts, rank, d_in, **like))
        self.scale = nn.Parameter(torch.zeros(experts, rank, **like))
        self.offset = nn.Parameter(torch.zeros(experts, rank, **like))
        self.bias = nn.Parameter(torch.zeros(experts, **like))

    def slot(self, expert: int) -> tuple[torch.Tensor, ...]:
        """Views of one expert's gate: mean (d_in,), directions (R, d_in), scale (R,), offset (R,), bias ()."""
        return self.mean[expert], self.directions[expert], self.scale[expert], self.offset[expert], self.bias[expert]

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Scores (N, E) of standardised inputs (N, d_in)."""
        experts, rank, _ = self.directions.shape
        along = F.linear(z, self.directions.flatten(0, 1).float()).view(-1, experts, rank) - self.offset.float()
        return F.linear(z, self.mean.float(), self.bias.float()) + (along.square() * self.scale.float()).sum(-1) / 2

    @torch.no_grad()
    def decide(self, x: torch.Tensor) -> None:
        """Choose experts for the tokens of an input (B, ..., d_in), or for its examples if scores are pooled."""
        state: Routing = self.calls.routing()
        z = F.layer_norm(x.float(), x.shape[-1:])
        real = state.real(x)
        if self.pools:
            z = _means(z.reshape(-1, z.shape[-1]), real, state.examples or x.shape[0])
        else:
            z = z.reshape(-1, z.shape[-1])
            z = z if real is None else z.index_select(0, real)
        state.evidence[self.index] = self(z)
        scores = state.evidence[self.index]
        for other in self.summed:
            if other != self.index and other in state.evidence:
                scores = scores + state.evidence[other].to(scores.device)
        if state.context is not None and not self.pools:
            examples = state.examples or x.shape[0]
            scores = state.context.apply(self.index, scores, (examples, x.shape[:-1].numel() // examples), real)
        state.decisions[self.index] = state.weigh(scores)


def _means(z: torch.Tensor, real: torch.Tensor | None, examples: int) -> torch.Tensor:
    """Means (B, d) of each example's tokens that are not padding, of (N, d)."""
    if real is None:
        return z.view(examples, -1, z.shape[-1]).mean(1)
    example = real // (len(z) // examples)
    count = torch.bincount(example, minlength=examples).clamp(min=1)
    return z.new_zeros(examples, z.shape[-1]).index_add(0, example, z.index_select(0, real)) / count[:, None]


def decided(
    state: Routing, index: int, pools: bool, x: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights (N, k) of the N tokens of an input that are not padding, by a decision taken before.

    Raises:
        ValueError: there was no such decision, or it was for other tokens.
    """
    if index not in state.decisions:
        raise ValueError("a routed linear was called before the inputs that its experts are chosen by: call the model")
    choice, weight = (part.to(x.device) for part in state.decisions[index])
    tokens = x.shape[:-1].numel()
    if pools:
        positions = torch.arange(tokens, device=x.device) if real is None else real
        example = positions // (tokens // choice.shape[0])
        return choice[example], weight[example]
    count = tokens if real is None else real.shape[0]
    if choice.shape[0] != count:
        raise ValueError(
            f"an adapted linear reads {count} tokens where experts were chosen for {choice.shape[0]}: "
            "this base needs the paper's gates, train_gates(…, gates='paper')"
        )
    return choice, weight


def prepared(gaussian: Any) -> tuple[torch.Tensor, ...]:
    """An expert's gate as `GatePoint` stores it, fp32.

    Args:
        gaussian: with mean (d_in,), directions (r, d_in), orthonormal, and their variances (r,).
    """
    mean, directions, variances = (part.float() for part in gaussian)
    variances = variances.clamp(min=0)
    log = (1 + variances / NOISE).log().sum()
    bias = -(mean.square().sum() + NOISE * log) / 2
    return mean, directions, variances / (variances + NOISE), directions @ mean, bias


__all__ = ["NOISE", "POOLED_HEADS", "GatePoint", "before_points", "decided", "gate_points", "prepared"]
