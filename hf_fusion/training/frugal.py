"""The frugal variant of a Fusion of Experts: validation points, the loss of every set of experts there, and lambda."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fusion.models.frugal_foe import FrugalPolicy, candidate_subsets

if TYPE_CHECKING:
    from hf_fusion.models.gated_foe import GatedFuser
    from hf_fusion.models.modeling_foe import FoEModel

COST_WEIGHTS = (0.0, *(2.0 ** (power / 2) for power in range(-16, 11)))  # candidate lambdas for the default
MAX_VALIDATION_POINTS = 1500  # stored in a frugal model, for its nearest-neighbour search


@dataclass
class Points:
    """Validation points: rows with what a fuser that was not fitted on them makes of them.

    Attributes:
        shown: what the experts show of them, (V, K, R).
        losses: of each set of experts (M, V), in the order of `candidate_subsets`.
        targets: labels, values, or in selection experts, (V,).
        scores: of all experts together, (V, C).
    """

    shown: torch.Tensor
    losses: torch.Tensor
    targets: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def points_of(fuser: Any, features: torch.Tensor, targets: torch.Tensor, experts: int, frugal: bool = True) -> Points:
    """Validation points for the frugal variant.

    Args:
        fuser: fitted on other rows.
        features: of the rows, (V, F).
        targets: see `Points`.
        experts: K.
        frugal: whether more than their scores is wanted.
    """
    if not frugal:
        return Points(torch.empty(0), torch.empty(0), targets, fuser(features))
    shown = fuser.read(features)
    subsets = candidate_subsets(experts)
    losses = torch.zeros(len(subsets), len(shown))
    for index, subset in enumerate(subsets):
        scores = fuser.combine(shown * subset[:, None], subset.expand(len(shown), -1))
        losses[index] = (
            (scores.squeeze(-1) - targets).square()
            if targets.is_floating_point()
            else nn.functional.cross_entropy(scores, targets, reduction="none")
        )
    return Points(shown, losses, targets, fuser(features))


def out_of_fold(final: GatedFuser, parts: Sequence[tuple[GatedFuser, Points]], seed: int) -> Points:
    """The points of all folds, at most `MAX_VALIDATION_POINTS` of them, as the final fuser would be shown them.

    Args:
        final: fitted on all rows.
        parts: of each fold the fuser that was fitted without it, and its rows.
        seed: of the choice.
    """
    shown = []
    for fuser, points in parts:
        moved = points.shown.clone()  # the bias of a fold's fuser becomes part of what its experts show
        if final.evidence_size:
            moved[..., -final.evidence_size :] += (fuser.bias - final.bias).detach() / moved.shape[1]
        shown.append(moved)
    found = [points for _, points in parts]
    losses = torch.cat([points.losses for points in found], 1)
    kept = torch.randperm(losses.shape[1], generator=torch.Generator().manual_seed(seed))[:MAX_VALIDATION_POINTS]
    targets, scores = (torch.cat([getattr(p, name) for p in found])[kept] for name in ("targets", "scores"))
    return Points(torch.cat(shown)[kept], losses[:, kept], targets, scores)


@torch.no_grad()
def fit_frugal(
    model: FoEModel, fuser: Any, points: Points, neighbors: int, cost_weight: float | None, tolerance: float
) -> float:
    """Stores validation points in the model, with the loss of every subset of experts on them; returns lambda.

    Args:
        model: whose policy is replaced.
        fuser: the model's, on the CPU.
        points: at most `MAX_VALIDATION_POINTS` of them are stored.
        neighbors: see `fit_fuser`.
        cost_weight: see `fit_fuser`.
        tolerance: see `fit_fuser`.
    """
    shown, targets = points.shown[:MAX_VALIDATION_POINTS], points.targets[:MAX_VALIDATION_POINTS]
    subsets = candidate_subsets(model.config.num_experts)
    policy = FrugalPolicy(len(shown), shown.shape[1], shown.shape[2], len(subsets), neighbors)
    policy.outputs.copy_(shown)
    policy.subsets.copy_(subsets)
    policy.losses.copy_(points.losses[:, : len(shown)])
    costs = torch.tensor(model.config.cost_shares)
    if cost_weight is None:
        regression = targets.is_floating_point()
        cost_weight = 0.0 if regression else _largest_cost_weight(policy, fuser, costs, targets, tolerance)
    model.config.frugal = {
        "neighbors": policy.neighbors,
        "cost_weight": cost_weight,
        "rows": len(shown),
        "subsets": len(subsets),
    }
    model.policy = policy.to(model.device)
    return cost_weight


def _largest_cost_weight(
    policy: FrugalPolicy, fuser: Any, costs: torch.Tensor, targets: torch.Tensor, tolerance: float
) -> float:
    """The largest candidate lambda that lowers neither the accuracy nor the mean probability of the target too far.

    Accuracy alone changes in large steps where rows are few, and probability alone may rise while accuracy falls: a
    mixture of fewer experts is surer.
    """

    def quality(shown: torch.Tensor, queried: torch.Tensor) -> torch.Tensor:
        scores = fuser.combine(shown, queried)
        accuracy = (scores.argmax(1) == targets).float().mean()
        return torch.stack([accuracy, scores.softmax(1)[torch.arange(len(targets)), targets].mean()])

    everyone = torch.ones(policy.outputs.shape[:2], dtype=torch.bool)
    least = quality(policy.outputs, everyone) - tolerance
    best = 0.0
    for weight in COST_WEIGHTS:
        shown, order = replay(policy, fuser, policy.outputs, costs, weight, leave_one_out=True)
        if bool((quality(shown, order > 0) >= least).all()):
            best = weight
    return best


def replay(
    policy: FrugalPolicy,
    fuser: Any,
    shown: torch.Tensor,
    costs: torch.Tensor,
    cost_weight: float,
    budget: float = 1.0,
    leave_one_out: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Simulates frugal querying on what all experts show, without running a model.

    Args:
        policy: of the frugal variant.
        fuser: of the same model.
        shown: (N, K, R) of all experts: `read(features)` of the fuser.
        costs: (K,), shares of the total cost.
        cost_weight: lambda.
        budget: maximum share of the total cost per example.
        leave_one_out: whether the examples are the policy's validation points: each is then excluded from its own
            neighbours.

    Returns:
        See `FrugalPolicy.run`: what the queried experts show (N, K, R), and the order of the queries (N, K).
    """
    return policy.run(
        lambda rows, experts: shown[rows, experts],
        len(shown),
        costs,
        cost_weight,
        budget,
        torch.arange(len(shown)) if leave_one_out else None,
        fuser.position,
    )
