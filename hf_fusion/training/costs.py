"""Query costs of experts: parameter counts by default, measured latency, or costs that the user sets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import datasets
import torch

from hf_fusion.errors import FusionError
from hf_fusion.training.outputs import input_columns, prepare

if TYPE_CHECKING:
    from hf_fusion.models.modeling_foe import FoEModel


def set_costs(model: FoEModel, costs: Sequence[float] | str) -> None:
    """Writes the experts' query costs into the model's config, in any unit.

    Raises:
        FusionError: unless there is one positive number per expert.
    """
    names = [expert["name"] for expert in model.config.experts]
    if isinstance(costs, str) or len(costs) != len(names) or min(costs) <= 0:
        raise FusionError(f"costs must hold one positive number for each of {names}, or be 'latency'; got {costs!r}")
    for expert, cost in zip(model.config.experts, costs, strict=True):
        expert["cost"] = float(cost)


@torch.no_grad()
def measure_latency(model: FoEModel, dataset: datasets.Dataset, examples: int = 16, repeats: int = 3) -> list[float]:
    """Seconds per example of each expert of a FoE, the minimum of several runs on the model's device.

    Args:
        model: a FoE of classifiers or regressors.
        dataset: with the experts' input columns.
        examples: size of the timed batch.
        repeats: runs per expert, besides one for warm-up.
    """
    rows = dataset.select(range(min(examples, len(dataset))))
    inputs = prepare(model, rows[:], input_columns(rows))
    best = [float("inf")] * model.config.num_experts
    for _ in range(repeats + 1):  # the first round warms up; the minimum makes it harmless
        for expert in range(model.config.num_experts):
            start = time.perf_counter()
            model.expert_outputs(inputs, experts=[expert])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            best[expert] = min(best[expert], time.perf_counter() - start)
    return [seconds / len(rows) for seconds in best]
