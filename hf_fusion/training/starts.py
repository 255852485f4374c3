"""Chooses what training starts from, without labels: the static merge that agrees most with the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.merging.in_memory import merge_to_start_from
from hf_fusion.models.build_wemoe import WHOLE
from hf_fusion.models.configuration_wemoe import ARITHMETIC
from hf_fusion.models.linears_wemoe import UpscaledLinear
from hf_fusion.models.routing_wemoe import Router
from hf_fusion.progress import track
from hf_fusion.training.adamerging import CoefficientMerge
from hf_fusion.training.adaptation import diagnose, likeness
from hf_fusion.training.batches import Examples, class_logits, to_model
from hf_fusion.training.concrete import ConcreteMerge

if TYPE_CHECKING:
    from hf_fusion.training.adamerging import LearnedMerge

SCALINGS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""λ of task arithmetic that are compared."""
METHODS = ("ties", "tsv_m", "iso_c")
"""Other merges that are compared, with their defaults."""


@dataclass(frozen=True)
class Start:
    """A static merge that coefficients or routers start from.

    Attributes:
        method: name of the merging method.
        scaling: its λ.
        tensors: name → merged tensor; None for task arithmetic, which coefficients express.
    """

    method: str
    scaling: float
    tensors: Mapping[str, torch.Tensor] | None = None


@torch.no_grad()
def predict_rows(
    model: LearnedMerge, task: str, examples: Examples, indices: Sequence[int], batch_size: int
) -> torch.Tensor:
    """Class logits of some of a task's rows, (N, C), fp32, on the CPU.

    Args:
        model: predicts with the task's head.
        task: an expert's name.
        examples: the task's rows.
        indices: of the rows.
        batch_size: rows of a forward pass.
    """
    found = []
    for start in range(0, len(indices), batch_size):
        rows = [examples.rows[index] for index in indices[start : start + batch_size]]
        inputs = to_model(examples.collate(rows), model.backbone)
        found.append(class_logits(partial(model, task=task), inputs).cpu())
    return torch.cat(found)


@torch.no_grad()
def choose_start(
    model: LearnedMerge,
    reference: CoefficientMerge,
    examples: Mapping[str, Examples],
    rows: Mapping[str, Sequence[int]],
    expert_logits: Mapping[str, torch.Tensor],
    batch_size: int,
) -> Start:
    """The merge that predicts most like the experts: by `likeness`, on average over the tasks.

    Args:
        model: what is trained; it must be able to express the merge.
        reference: its experts; left as it is.
        examples: task → its rows.
        rows: task → indices of the rows to compare on.
        expert_logits: task → the expert's logits of these rows, (N, C).
        batch_size: rows of a forward pass.

    """
    best, most = None, float("-inf")
    count = len(SCALINGS) + (len(METHODS) if _takes_any_merge(model) else 0)
    for start, tensors in track(_candidates(model, reference), "Comparing merges to start from", count):
        with reference.showing(tensors):
            found = {
                task: diagnose(predict_rows(reference, task, examples[task], indices, batch_size), expert_logits[task])
                for task, indices in rows.items()
            }
        score = likeness(found)
        if best is None or score > most:
            best, most = start, score
    assert best is not None
    return best


def _takes_any_merge(model: LearnedMerge) -> bool:
    """Whether any merge can take the place of the base; a mask learns nothing where coefficients start from 0."""
    if isinstance(model, CoefficientMerge):
        return not isinstance(model, ConcreteMerge)
    return model.config.task_vectors in WHOLE


def _candidates(model: LearnedMerge, reference: CoefficientMerge) -> Iterator[tuple[Start, Mapping[str, torch.Tensor]]]:
    for scaling in SCALINGS:
        yield Start(ARITHMETIC, scaling), reference.task_arithmetic(scaling)
    if not _takes_any_merge(model):
        return
    base, experts = reference.states()
    for method in METHODS:
        merged, scaling = merge_to_start_from(method, None, base, experts)
        tensors = {name: merged[name].to(tensor) for name, tensor in base.items()}
        yield Start(method, scaling, tensors), tensors


@torch.no_grad()
def start_from(model: LearnedMerge, reference: CoefficientMerge, start: Start) -> None:
    """Makes a model that was not trained yet start from a merge.

    Args:
        model: its coefficients get their initial value, and a WEMoE's tensors that are merged once are those of the
            merge. A merge that is not task arithmetic takes the place of the base.
        reference: the model's experts; with `tensors` it holds them relative to these.
        start: the merge.
    """
    coefficient = start.scaling
    if start.tensors is not None:
        reference.rebase(start.tensors)
        coefficient = 0.0
    if isinstance(model, CoefficientMerge):
        model.config.scaling = coefficient
        model.coefficients.fill_(coefficient)
        return
    is_rebased = start.method != model.config.merge
    model.config.merge, model.config.scaling = start.method, start.scaling
    for module in model.modules():
        if isinstance(module, Router):
            module.reset(coefficient)
    modules: dict[str, Any] = dict(model.backbone.named_modules())
    targets = {**dict(model.backbone.named_parameters()), **dict(model.backbone.named_buffers())}
    merged, zero = reference.task_arithmetic(coefficient), reference.task_arithmetic(0.0)
    for name, vectors in reference.vectors().items():
        if name in targets:  # not up-scaled
            targets[name].copy_(merged[name])
        elif is_rebased:
            path, _, leaf = name.rpartition(".")
            linear: UpscaledLinear = modules[path]
            if leaf == "bias":
                linear.fill_biases(zero[name], list(vectors))
            elif linear.conv1d:
                linear.fill(zero[name].t(), vectors.transpose(1, 2))
            else:
                linear.fill(zero[name], vectors)


__all__ = ["METHODS", "SCALINGS", "Start", "choose_start", "predict_rows", "start_from"]
