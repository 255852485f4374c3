"""Trains the routers of a merged model, with or without labels; all other weights stay fixed.

Without labels there are two losses. "expert" distils each task's expert, which the model contains, into the routed
model. "entropy" minimises the mean entropy of each task's predictions (test-time adaptation; AdaMerging, arXiv
2310.02575; WEMoE, arXiv 2402.00433). Entropy has a trivial minimum, one class for every input; a diversity term works
against it, and `CollapseGuard` stops training in time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.models.routing_wemoe import Router
from hf_fusion.training.adamerging import merged_once, training_objective
from hf_fusion.training.adaptation import Adaptation
from hf_fusion.training.batches import Examples, class_logits, read_examples, unlabelled
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.collapse_guard import CollapseGuard
from hf_fusion.training.runs import TrainedParameters, digest, find_checkpoint, on_device, training_arguments
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.models.modeling_wemoe import WEMoEModel
    from hf_fusion.training.adamerging import LearnedMerge

logger = logging.getLogger(__name__)

VALIDATION_ROWS = 64  # per task, for the collapse guard; not trained on, if the task has enough rows
CHECKS = 10  # per run
RUN_FILE = "router_training.json"  # identifies the run whose checkpoints a folder holds


def adapt_routers(
    model: LearnedMerge,
    unlabelled_rows: Mapping[str, Dataset | Examples],
    *,
    loss: str = "expert",
    steps: int = 100,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    diversity: float = 1.0,
    tolerance: float = 0.1,
    max_length: int = 512,
    seed: int = 0,
    output_dir: str | Path | None = None,
    **more: Any,
) -> Adaptation:
    """Trains the routers without labels, on all tasks at once; the loss is summed over the tasks.

    "expert": ``mean_x KL(p_k(y|x) ‖ p(y|x))``. The teacher p_k is this model with only the task's expert in every
    routed module. The routers do not see the task: they learn to recognise it from the input.

    "entropy": ``mean_x H(p(y|x)) - diversity · H(mean_x p(y|x))``, the papers' test-time adaptation. With diversity 0
    it is their loss, which is known to collapse: every input gets the same class with high confidence. With 1 it is
    the mutual information of inputs and predictions (information maximisation: SHOT, arXiv 2002.08546), which favours
    balanced classes.

    The collapse guard holds out `VALIDATION_ROWS` rows of each task and compares the model's predictions with those
    of the task's expert. It stops training when a task's predictions cover fewer classes than before training and
    than its expert's, or agree less with the expert than before training (permuted classes keep confidence and
    balance), by more than `tolerance`. `Adaptation.stopped` and a warning then say why. The routers that are kept are
    in any case those of the check with the highest mean agreement.

    Runs on transformers' Trainer with AdamW, without weight decay: `accelerate launch` distributes it over processes.
    The same seed gives the same routers.

    Args:
        model: a `WEMoEModel` of classifiers, or of CLIP, or a `CoefficientMerge`, whose coefficients are trained in
            the place of routers; changed in place.
        unlabelled_rows: task (the name of its expert) -> rows with column ``text`` (and ``text_pair``) or ``image``;
            labels are ignored. For CLIP: `zero_shot_examples`.
        loss: "expert" or "entropy", see above.
        steps: optimizer steps; each takes `batch_size` rows of every task.
        learning_rate: constant by default.
        batch_size: rows per task and process.
        diversity: weight of the diversity term of "entropy", at least 0.
        tolerance: share by which the effective number of classes, or the agreement with the expert, may fall before
            training stops, in (0, 1]; 1 turns the checks off and keeps the routers of the last step.
        max_length: longest sequence, in tokens.
        seed: for the order of the rows.
        output_dir: folder for checkpoints (of the routers alone); an interrupted run resumes from them.
        more: passed to transformers' ``TrainingArguments``, such as ``bf16=True`` or ``lr_scheduler_type="cosine"``.

    Returns:
        The report; ``model.config.adaptation`` keeps its main fields for the card.

    Raises:
        FusionError: for a model without routers or classes, unknown tasks, rows it cannot read, or options out of
            range.
    """
    if loss not in LOSSES:
        raise FusionError(f"there is no loss {loss!r}", suggestion(loss, LOSSES))
    if not diversity >= 0:
        raise FusionError(f"diversity={diversity}", hint="0, the papers' loss, or more")
    if not 0 < tolerance <= 1:
        raise FusionError(f"tolerance={tolerance}", hint="greater than 0 and at most 1, which turns the checks off")
    examples = {task: _read(model, task, rows, max_length, labelled=False) for task, rows in unlabelled_rows.items()}
    report = Adaptation(loss, diversity if loss == "entropy" else 0.0, learning_rate, batch_size)
    return _fit(
        model,
        examples,
        report,
        partial(LOSSES[loss], model, diversity),
        steps,
        seed,
        output_dir,
        tolerance,
        VALIDATION_ROWS,
        **more,
    )


def fit_routers(
    model: LearnedMerge,
    labelled_rows: Mapping[str, Dataset | Examples],
    *,
    steps: int = 100,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
    output_dir: str | Path | None = None,
    **more: Any,
) -> Adaptation:
    """Trains the routers with labels, on each task's own loss, summed over the tasks. Nothing is held out.

    Args:
        model: a `WEMoEModel` or `CoefficientMerge`; changed in place.
        labelled_rows: task (the name of its expert) -> rows, with columns ``prompt`` and ``target`` for language
            models, ``text`` (``text_pair``) or ``image`` with ``label`` for classifiers.
        steps: see `adapt_routers`.
        learning_rate: see `adapt_routers`.
        batch_size: see `adapt_routers`.
        max_length: see `adapt_routers`.
        seed: see `adapt_routers`.
        output_dir: see `adapt_routers`.
        more: see `adapt_routers`.

    Returns:
        The report, see `adapt_routers`.

    Raises:
        FusionError: see `adapt_routers`.
    """
    examples = {task: _read(model, task, rows, max_length, labelled=True) for task, rows in labelled_rows.items()}
    loss = partial(_supervised, model, examples)
    report = Adaptation("labels", 0.0, learning_rate, batch_size)
    return _fit(model, examples, report, loss, steps, seed, output_dir, **more)


def reset_routers(model: WEMoEModel) -> None:
    """Gives all routers their initial weights: every coefficient is λ again."""
    for module in model.modules():
        if isinstance(module, Router):
            module.reset(model.config.scaling)
    model.config.adaptation = None


def _read(model: LearnedMerge, task: str, rows: Dataset | Examples, max_length: int, labelled: bool) -> Examples:
    """Encodes a task's rows for its head."""
    if task not in model.experts:
        raise FusionError(f"there is no expert {task!r}", hint=suggestion(task, model.experts))
    if isinstance(rows, Examples):
        return rows
    if not labelled and model.config.head in ("causal-lm", "seq2seq-lm", "features"):
        raise FusionError(
            f"{type(model.backbone).__name__} has no classes that could be learned without labels",
            hint="fit_routers(model, rows) learns from targets" if model.config.head != "features" else None,
        )
    labels = model.config.experts[model.experts.index(task)]["labels"]
    if not labelled and len(labels) == 1:
        raise FusionError(f"{task} is a regression: it has no classes that could be learned without labels")
    expert = Expert(task, model.backbone, processor=model.processor, labels=list(labels))
    return read_examples(expert, rows if labelled else unlabelled(rows), max_length)


def _entropy_loss(model: LearnedMerge, diversity: float, batches: Mapping[str, Any]) -> torch.Tensor:
    """Σ over tasks: mean entropy - diversity · entropy of the mean prediction."""
    losses = []
    with merged_once(model):
        for task, inputs in batches.items():
            log = class_logits(partial(model, task=task), inputs).log_softmax(-1)  # (B, C)
            loss = -(log.exp() * log).sum(-1).mean()
            if diversity:
                mean = log.logsumexp(0) - math.log(len(log))  # (C,), log of the mean prediction
                loss = loss + diversity * (mean.exp() * mean).sum()
            losses.append(loss)
    return torch.stack(losses).sum()


def _distillation_loss(model: LearnedMerge, diversity: float, batches: Mapping[str, Any]) -> torch.Tensor:
    """Σ over tasks: mean KL divergence of the model's predictions from those of the task's expert."""
    teacher = {}
    with torch.no_grad():
        for task, inputs in batches.items():
            with model.using(task):
                teacher[task] = class_logits(partial(model, task=task), inputs).log_softmax(-1)  # (B, C)
    losses = []
    with merged_once(model):
        for task, inputs in batches.items():
            log = class_logits(partial(model, task=task), inputs).log_softmax(-1)
            losses.append(nn.functional.kl_div(log, teacher[task], reduction="batchmean", log_target=True))
    return torch.stack(losses).sum()


# losses without labels: (model, diversity, task -> inputs) -> loss
LOSSES: dict[str, Callable[[LearnedMerge, float, Mapping[str, Any]], torch.Tensor]] = {
    "expert": _distillation_loss,
    "entropy": _entropy_loss,
}


def _supervised(model: LearnedMerge, examples: Mapping[str, Examples], batches: Mapping[str, Any]) -> torch.Tensor:
    """Σ over tasks: the loss of the task's head on its labels."""
    with merged_once(model):
        losses = [examples[task].loss(partial(model, task=task), inputs) for task, inputs in batches.items()]
    return torch.stack(losses).sum()


def _fit(
    model: LearnedMerge,
    examples: Mapping[str, Examples],
    report: Adaptation,
    loss: Callable[[Any], torch.Tensor],
    steps: int,
    seed: int,
    output_dir: str | Path | None,
    tolerance: float = 1.0,
    validation_rows: int = 0,
    **more: Any,
) -> Adaptation:
    """Trains the parameters that require gradients, under a collapse guard."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise FusionError("the model has no routers to train", hint="SMILE routes without; fuse with routing='wemoe'")
    if not examples:
        raise FusionError("there are no rows to learn from", hint="{task: rows}, a task for each expert")
    options = {"lr_scheduler_type": "constant", "dataloader_drop_last": True, **more}
    rows = _TaskRows(examples, validation_rows, seed)
    report.rows = {task: len(indices) for task, indices in rows.train.items()}
    with (
        training_arguments(output_dir, steps, report.learning_rate, report.batch_size, seed, **options) as arguments,
        on_device(model, arguments.device),
    ):
        rows.min_length = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        guard = CollapseGuard(model, examples, rows.validation, report, trained, tolerance, max(1, steps // CHECKS))
        trainer = Trainer(
            model=TrainedParameters(trained, training_objective(model, loss)),
            args=arguments,
            train_dataset=rows,
            data_collator=rows.collate,
            callbacks=[guard],
        )
        set_progress(trainer, "Training the routers")
        guard.trainer = trainer
        guard.start()
        checkpoint = None
        if output_dir:
            run = {"routers": digest(trained), "seed": seed, "tolerance": tolerance, **report.for_config()}
            del run["steps"]
            checkpoint = find_checkpoint(Path(output_dir), RUN_FILE, run, steps)
        trainer.train(resume_from_checkpoint=checkpoint)
        guard.finish(trainer.state.global_step)
        report.after = guard.check()
    model.zero_grad()
    if report.stopped:
        logger.warning("%s", report.stopped)
    model.config.adaptation = report.for_config()
    return report


class _TaskRows(torch.utils.data.Dataset[Any]):
    """Items of one row per task; tasks with fewer rows are cycled through.

    Args:
        examples: by task.
        validation_rows: rows of each task to hold out; of a task with few rows at most a quarter.
        seed: for the order of the rows.
    """

    def __init__(self, examples: Mapping[str, Examples], validation_rows: int, seed: int) -> None:
        self.examples = examples
        self.min_length = 1  # rows of one optimizer step
        self.train: dict[str, list[int]] = {}
        self.validation: dict[str, list[int]] = {}
        for index, (task, task_examples) in enumerate(examples.items()):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            order = torch.randperm(len(task_examples.rows), generator=generator).tolist()
            count = min(validation_rows, len(order) // 4)
            self.validation[task] = order[:count] or order[:validation_rows]
            self.train[task] = order[count:]

    def __len__(self) -> int:
        """The rows of the largest task, and at least those of one optimizer step."""
        return max(self.min_length, *(len(indices) for indices in self.train.values()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Task -> a row."""
        return {task: self.examples[task].rows[rows[index % len(rows)]] for task, rows in self.train.items()}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Task -> a batch."""
        return {task: examples.collate([item[task] for item in items]) for task, examples in self.examples.items()}


__all__ = ["Adaptation", "adapt_routers", "fit_routers", "reset_routers"]
