"""Frugal Fusion of Experts: which expert to query next, and when to stop (FrugalFoE in arXiv 2310.01542).

After querying the set S, the policy picks the superset that minimises the expected loss plus its cost,

    E[loss(f_S'(X), Y) | outputs of S] + lambda * cost(S'),

where the expectation is the mean loss over the kappa validation points nearest to x in the outputs of S; for fusers
that weigh experts, in what the fuser believes after S. So it finds the expert that knows an input even where no two
know the same labels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import nn

MOST_ENUMERATED = 10  # with more experts, 2^K subsets are replaced by a sample of them
SAMPLED_SUBSETS = 1024


def candidate_subsets(num_experts: int, seed: int = 0) -> torch.Tensor:
    """The sets of experts that the policy chooses among, (M, K) bool: all subsets, for at most ten experts.

    For more than ten: the single experts, and prefixes of random orders (which include sets of every size, and the
    full set), 1,024 in all.
    """
    if num_experts <= MOST_ENUMERATED:
        chosen = [c for size in range(1, num_experts + 1) for c in combinations(range(num_experts), size)]
    else:
        generator = torch.Generator().manual_seed(seed)
        distinct = {(k,): None for k in range(num_experts)}
        while len(distinct) < SAMPLED_SUBSETS:
            order = torch.randperm(num_experts, generator=generator).tolist()
            distinct.update({tuple(sorted(order[:size])): None for size in range(2, num_experts + 1)})
        chosen = list(distinct)
    subsets = torch.zeros(len(chosen), num_experts, dtype=torch.bool)
    for row, members in enumerate(chosen):
        subsets[row, list(members)] = True
    return subsets


class FrugalPolicy(nn.Module):
    """Decides which experts to query, by their outputs on validation points and the loss of every candidate set there.

    Args:
        rows: V, number of validation points.
        num_experts: K.
        num_outputs: R, width of what an expert shows the fuser: its C outputs, for the fuser "mlp".
        subsets: M, number of candidate sets.
        neighbors: kappa.
    """

    outputs: torch.Tensor
    subsets: torch.Tensor
    losses: torch.Tensor

    def __init__(self, rows: int, num_experts: int, num_outputs: int, subsets: int, neighbors: int) -> None:
        super().__init__()
        self.neighbors = min(neighbors, rows)
        self.register_buffer("outputs", torch.zeros(rows, num_experts, num_outputs))  # (V, K, R)
        self.register_buffer("subsets", torch.zeros(subsets, num_experts, dtype=torch.bool))  # (M, K)
        self.register_buffer("losses", torch.zeros(subsets, rows))  # (M, V)

    @torch.no_grad()
    def run(
        self,
        query: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        batch: int,
        costs: torch.Tensor,
        cost_weight: float,
        budget: float = 1.0,
        exclude: torch.Tensor | None = None,
        position: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries experts for each example until another query would cost more than it gains.

        Args:
            query: (rows (n,), experts (n,)) -> what that expert shows of that row, (n, R).
            batch: B, number of examples.
            costs: (K,) shares of the cost of all experts, summing to 1.
            cost_weight: lambda, the loss that is worth the cost of all experts.
            budget: maximum cost of an example; if even the cheapest expert costs more, it alone is queried.
            exclude: (B,) for examples that are validation points: their indices, so that none is its own neighbour.
            position: (shown (n, K, R), queried (n, K)) -> (n, D), where an example lies for the search of neighbours;
                default: what was shown.

        Returns:
            what was shown (B, K, R), zero where not queried, and order (B, K): 1 for the first expert queried, 2
            for the second, 0 for those not queried.
        """
        device, dtype = self.losses.device, torch.float32  # distances are computed in fp32 even if the model is in bf16
        points, losses = self.outputs.to(dtype), self.losses.to(dtype)
        num_experts = self.subsets.shape[1]
        outputs = torch.zeros(batch, *self.outputs.shape[1:], device=device, dtype=dtype)
        order = torch.zeros(batch, num_experts, dtype=torch.long, device=device)
        distance = torch.zeros(batch, self.outputs.shape[0], device=device, dtype=dtype)  # (B, V)
        subset_costs = self.subsets.to(dtype) @ costs.to(device, dtype)  # (M,)
        affordable = subset_costs <= max(budget, float(subset_costs.min())) + 1e-6
        active = torch.arange(batch, device=device)
        for step in range(1, num_experts + 1):
            if step == 1:  # no outputs yet: all validation points are equally near
                expected = losses.mean(1).expand(len(active), -1)  # (A, M)
            else:
                near = (
                    distance[active] if position is None else self._apart(position, outputs[active], order[active] > 0)
                )
                expected = self._local_losses(losses, near, None if exclude is None else exclude[active])
            chosen = self._choose(expected, order[active] > 0, affordable, subset_costs * cost_weight)
            active, chosen = active[chosen >= 0], chosen[chosen >= 0]
            if not len(active):
                break
            by_expert = torch.argsort(chosen, stable=True)  # examples that query the same expert run together
            active, chosen = active[by_expert], chosen[by_expert]
            results = query(active, chosen).to(dtype)
            outputs[active, chosen] = results
            order[active, chosen] = step
            for expert in chosen.unique().tolist() if position is None else ():
                selected = chosen == expert
                distance[active[selected]] += torch.cdist(
                    results[selected], points[:, expert], compute_mode="donot_use_mm_for_euclid_dist"
                ).square()
        return outputs, order

    def _apart(
        self,
        position: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        shown: torch.Tensor,
        queried: torch.Tensor,
    ) -> torch.Tensor:
        """Distances between examples and validation points after the same queries, (A, V)."""
        distance = torch.zeros(len(shown), len(self.outputs), device=shown.device)
        sets, of_row = queried.unique(dim=0, return_inverse=True)
        for index, members in enumerate(sets):
            rows = of_row == index
            points = position(self.outputs.float() * members[:, None], members.expand(len(self.outputs), -1))
            distance[rows] = torch.cdist(
                position(shown[rows], queried[rows]), points, compute_mode="donot_use_mm_for_euclid_dist"
            )
        return distance

    def _local_losses(self, losses: torch.Tensor, distance: torch.Tensor, exclude: torch.Tensor | None) -> torch.Tensor:
        """Mean loss of each candidate set over the nearest validation points: (A, V) distances -> (A, M)."""
        if exclude is not None:
            distance = distance.scatter(1, exclude[:, None], float("inf"))
        nearest = distance.topk(self.neighbors, dim=1, largest=False).indices  # (A, kappa)
        return losses[:, nearest].mean(-1).T

    def _choose(
        self, expected: torch.Tensor, queried: torch.Tensor, affordable: torch.Tensor, penalty: torch.Tensor
    ) -> torch.Tensor:
        """The next expert of each example: the member of the best superset with the lowest local loss; -1 to stop."""
        missing = (
            queried.float() @ (~self.subsets).float().T
        )  # (A, M): number of queried experts that a candidate does not contain
        objective = (expected + penalty).masked_fill((missing > 0) | ~affordable, float("inf"))
        best = objective.argmin(1)
        candidates = self.subsets[best] & ~queried & objective.isfinite().any(1, keepdim=True)  # (A, K)
        single = self.subsets.sum(1) == 1
        members = self.subsets[single].float().argmax(1)  # the expert of each singleton
        singleton_objective = torch.empty_like(queried, dtype=expected.dtype)
        singleton_objective[:, members] = (expected + penalty)[:, single]
        chosen = singleton_objective.masked_fill(~candidates, float("inf")).argmin(1)
        return torch.where(candidates.any(1), chosen, -1)


def build_policy(config: Any, fuser: Any) -> FrugalPolicy:
    """The policy of a config, still without its validation points."""
    sizes = {name: config.frugal[name] for name in ("rows", "subsets", "neighbors")}
    return FrugalPolicy(num_experts=config.num_experts, num_outputs=fuser.shown_size, **sizes)


def run_policy(
    policy: FrugalPolicy | None,
    config: Any,
    fuser: Any,
    query: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch: int,
    budget: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FrugalPolicy.run` with a fuser, and the costs and the lambda of a config.

    Raises:
        ValueError: the model was not fitted for it, or the budget is not a share.
    """
    if policy is None or config.frugal is None:
        raise ValueError("this model was fitted without frugal=True, so it cannot keep to a budget")
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}; it is a share of the experts' cost in (0, 1]")
    costs = torch.tensor(config.cost_shares)
    return policy.run(query, batch, costs, config.frugal["cost_weight"], budget, position=fuser.position)
