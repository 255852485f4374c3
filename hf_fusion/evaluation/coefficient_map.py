"""Which experts the rows of each task are merged from, layer by layer, as data for pictures and cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.data import match_experts_by_name
from hf_fusion.evaluation.routing_map import JsonFile, read_batches
from hf_fusion.models.configuration_wemoe import ARITHMETIC
from hf_fusion.progress import track
from hf_fusion.training.batches import Examples, unlabelled

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.models.modeling_wemoe import WEMoEModel

COEFFICIENT_FILE, COEFFICIENT_PICTURE = "coefficients.json", "coefficients.png"  # their names beside a model


@dataclass
class CoefficientMap(JsonFile):
    """Mean coefficient of every expert in every layer on each task.

    Attributes:
        experts: names, K of them.
        layers: names of the units that share a router, L of them, in the order in which they run.
        tasks: names, T of them.
        coefficients: T × L × K means over the task's rows.
        n: rows of each task.
        owners: task → the expert that was trained on it, where there is one.
        scaling: λ, the constant that task arithmetic has in place of all of them; None for a model that starts from
            another merge, and for SMILE, whose weights of a token add up to 1.
        example: text of the first row of the first task, or None for images.
    """

    experts: list[str]
    layers: list[str]
    tasks: list[str]
    coefficients: list[list[list[float]]]
    n: list[int]
    owners: dict[str, str]
    scaling: float | None
    example: str | None = None


@torch.no_grad()
def map_coefficients(
    model: WEMoEModel,
    suite: Mapping[str, Dataset | Examples],
    *,
    owners: Mapping[str, str] | None = None,
    batch_size: int = 16,
    max_length: int = 512,
) -> CoefficientMap:
    """Runs a model over tasks and averages the coefficients of its layers.

    Labels are not read. In a language model the routers read the prompts; those of a sequence-to-sequence decoder read
    what precedes the target's first token.

    Args:
        model: a `WEMoEModel`.
        suite: task → rows, as training takes them; of CLIP, `Examples` of `training.batches.zero_shot_examples`.
        owners: task → the expert that was trained on it, where `match_experts_by_name` does not find it.
        batch_size: rows per step.
        max_length: the longest sequence, in tokens.

    Raises:
        FusionError: for rows that the model cannot read.
    """
    owners = match_experts_by_name(suite, model.experts) | dict(owners or {})
    writes = model.config.head in ("causal-lm", "seq2seq-lm")
    coefficients, counts, layers = [], [], []
    for rows in track(suite.values(), "Tracing the coefficients of tasks"):
        count, total = 0, torch.zeros(())
        given = rows if isinstance(rows, Examples) else unlabelled(rows)
        for batch in read_batches(model, given, (), batch_size, max_length):
            labels = batch.pop("labels", None)
            trace = model.trace_forward(
                **batch, **({"labels": labels} if writes else {})
            )  # they tell where a prompt ends
            size = len(batch.get("pixel_values", next(iter(batch.values()))))  # of CLIP texts are classes, not rows
            layers = trace.layers
            means = torch.stack([trace.coefficients(layer).mean(0) for layer in layers])  # (L, K)
            total, count = total + size * means, count + size
        coefficients.append((total / count).tolist())
        counts.append(count)
    first: Any = next(iter(suite.values()))
    column = next((c for c in ("prompt", "text") if c in getattr(first, "column_names", ())), None)
    is_arithmetic = model.config.routing == "wemoe" and model.config.merge == ARITHMETIC
    return CoefficientMap(
        experts=list(model.experts),
        layers=layers,
        tasks=list(suite),
        coefficients=coefficients,
        n=counts,
        owners=owners,
        scaling=model.config.scaling if is_arithmetic else None,
        example=first[0][column] if column else None,
    )
