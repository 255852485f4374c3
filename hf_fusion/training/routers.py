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
from hf_fusion.progress import track
from hf_fusion.training.adamerging import CoefficientMerge, merged_once, training_objective
from hf_fusion.training.adaptation import Adaptation
from hf_fusion.training.batches import Examples, class_logits, read_examples, unlabelled
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.collapse_guard import CollapseGuard
from hf_fusion.training.runs import TrainedParameters, digest, find_checkpoint, on_device, training_arguments
from hf_fusion.training.starts import choose_start, predict_rows, start_from
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.models.modeling_wemoe import WEMoEModel
    from hf_fusion.training.adamerging import LearnedMerge

logger = logging.getLogger(__name__)

VALIDATION_ROWS = 64  # per task, for the collapse guard; not trained on, if the task has enough rows
START_ROWS = 128  # per task, on which merges to start from are compared
CHECKS = 10  # per run
RUN_FILE = "router_training.json"  # identifies the run whose checkpoints a folder holds


def adapt_routers(
    model: LearnedMerge,
    unlabelled_rows: Mapping[str, Dataset | Examples],
    *,
    loss: str = "expert",
    steps: int = 100,
    learning_rate: float | None = None,
    batch_size: int = 8,
    diversity: float = 1.0,
    guard: bool = True,
    experts: Sequence[ExpertLike] | None = None,
    base: ExpertLike | None = None,
    max_length: int = 512,
    seed: int = 0,
    output_dir: str | Path | None = None,
    **more: Any,
) -> Adaptation:
    """Trains the routers without labels, on all tasks at once; the loss is summed over the tasks.

    "expert": ``mean_x KL(p_k(y|x) ‖ p(y|x))``. The teacher p_k is the task's expert, from `experts`; without them it is
    this model with only the expert's coefficients at 1, which for a WEMoE lacks what the expert changed elsewhere. The
    routers do not see the task: they learn to recognise it from the input.

    "entropy": ``mean_x H(p(y|x)) - diversity · H(mean_x p(y|x))``, the papers' test-time adaptation. With diversity 0
    it is their loss, which is known to collapse: every input gets the same class with high confidence. With 1 it is
    the mutual information of inputs and predictions (information maximisation: SHOT, arXiv 2002.08546), which favours
    balanced classes.

    With `guard`, `VALIDATION_ROWS` rows of each task are held out, and every tenth of the steps the model's
    predictions for them are compared with the experts': see `CollapseGuard`. The routers that are kept are those of
    the best check, which may be that before training; the learning rate is halved where checks get worse.

    Runs on transformers' Trainer with AdamW, without weight decay: `accelerate launch` distributes it over processes.
    The same seed gives the same routers.

    Args:
        model: a `WEMoEModel` of classifiers, or of CLIP, or a `CoefficientMerge`, whose coefficients are trained in
            the place of routers; changed in place.
        unlabelled_rows: task (the name of its expert) -> rows with column ``text`` (and ``text_pair``) or ``image``;
            labels are ignored. For CLIP: `zero_shot_examples`.
        loss: "expert" or "entropy", see above.
        steps: optimizer steps; each takes `batch_size` rows of every task.
        learning_rate: constant; default: 5e-4 for routers, 1e-2 for coefficients, which each step moves by at most the
            rate.
        batch_size: rows per task and process.
        diversity: weight of the diversity term of "entropy", at least 0.
        guard: whether predictions are checked; otherwise the routers are those of the last step.
        experts: what the model was fused from, as for `fuse`; the teachers of "expert". A `CoefficientMerge` holds
            them already.
        base: of `experts`, if they are full models.
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
    examples = {task: _read(model, task, rows, max_length, labelled=False) for task, rows in unlabelled_rows.items()}
    rate = _learning_rate(model, learning_rate)
    report = Adaptation(loss, diversity if loss == "entropy" else 0.0, rate, batch_size)
    return _fit(
        model,
        examples,
        report,
        partial(LOSSES[loss], model, diversity),
        steps,
        seed,
        output_dir,
        VALIDATION_ROWS,
        guard,
        _reference(model, experts, base),
        **more,
    )


def fit_routers(
    model: LearnedMerge,
    labelled_rows: Mapping[str, Dataset | Examples],
    *,
    steps: int = 100,
    learning_rate: float | None = None,
    batch_size: int = 8,
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
    report = Adaptation("labels", 0.0, _learning_rate(model, learning_rate), batch_size)
    return _fit(model, examples, report, loss, steps, seed, output_dir, **more)


def reset_routers(model: WEMoEModel) -> None:
    """Gives all routers their initial weights: every coefficient is λ again."""
    for module in model.modules():
        if isinstance(module, Router):
            module.reset(model.config.start)
    model.config.adaptation = None


def _learning_rate(model: LearnedMerge, given: float | None) -> float:
    return given if given is not None else 1e-2 if isinstance(model, CoefficientMerge) else 5e-4


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


def _reference(
    model: LearnedMerge, experts: Sequence[ExpertLike] | None, base: ExpertLike | None
) -> CoefficientMerge | None:
    """The complete weights of the model's experts, to learn from; None if the model itself is the teacher."""
    if experts is None or isinstance(model, CoefficientMerge):
        return None
    reference = CoefficientMerge(experts, base)
    if reference.experts != list(model.experts):
        raise FusionError(
            f"the experts are {', '.join(reference.experts)}, those of the model {', '.join(model.experts)}",
            hint="pass the experts that the model was fused from, in their order",
        )
    return reference


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
    losses = []
    with merged_once(model):
        for task, inputs in batches.items():
            teacher = inputs["expert_logits"].log_softmax(-1)  # (B, C)
            log = class_logits(partial(model, task=task), _without(inputs, "expert_logits")).log_softmax(-1)
            losses.append(nn.functional.kl_div(log, teacher, reduction="batchmean", log_target=True))
    return torch.stack(losses).sum()


def _without(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != name}


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
    validation_rows: int = 0,
    is_guarded: bool = False,
    teacher: LearnedMerge | None = None,
    **more: Any,
) -> Adaptation:
    """Trains the parameters that require gradients, under a collapse guard."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise FusionError("the model has no routers to train", hint="SMILE routes without; fuse with routing='wemoe'")
    if not examples:
        raise FusionError("there are no rows to learn from", hint="{task: rows}, a task for each expert")
    options = {"lr_scheduler_type": "constant", "dataloader_drop_last": True, **more}
    teacher = teacher or model
    with (
        training_arguments(output_dir, steps, report.learning_rate, report.batch_size, seed, **options) as arguments,
        on_device(model, arguments.device),
        on_device(teacher, arguments.device),
    ):
        per_step = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        rows = _TaskRows(examples, validation_rows, per_step, steps, seed)
        report.rows = {task: len(indices) for task, indices in rows.train.items()}
        size = 4 * report.batch_size
        if is_guarded and isinstance(teacher, CoefficientMerge) and not model.config.adaptation:
            some = {task: (rows.validation[task] + rows.train[task])[:START_ROWS] for task in examples}
            start = choose_start(model, teacher, examples, some, _expert_logits(teacher, examples, some, size), size)
            start_from(model, teacher, start)
            report.merge, report.scaling = start.method, start.scaling
        validation = _expert_logits(teacher, examples, rows.validation, size)
        if report.loss == "expert":
            rows.expert_logits = _expert_logits(teacher, examples, rows.train, size)
        every = max(1, steps // CHECKS) if is_guarded else None
        guard = CollapseGuard(model, examples, rows.validation, report, trained, validation, every)
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
            run = {"routers": digest(trained), "seed": seed, "guard": is_guarded, **report.for_config()}
            del run["steps"]
            checkpoint = find_checkpoint(Path(output_dir), RUN_FILE, run, steps)
        trainer.train(resume_from_checkpoint=checkpoint)
        guard.finish()
        report.after = guard.check()
    model.zero_grad()
    if report.stopped:
        logger.warning("%s", report.stopped)
    model.config.adaptation = report.for_config()
    return report


def _expert_logits(
    teacher: LearnedMerge, examples: Mapping[str, Examples], rows: Mapping[str, Sequence[int]], batch_size: int
) -> dict[str, torch.Tensor]:
    """Task -> its expert's logits of some of its rows, (N, C); tasks without rows are left out."""
    found = {}
    for task in track([task for task in examples if rows[task]], "Reading the experts' predictions"):
        with teacher.using(task):
            found[task] = predict_rows(teacher, task, examples[task], rows[task], batch_size)
    return found


class _TaskRows(torch.utils.data.Dataset[Any]):
    """Items of one row per task; tasks with fewer rows are cycled through.

    Args:
        examples: by task.
        validation_rows: rows of each task to hold out; of a task with few rows at most a quarter.
        per_step: rows of each task that an optimizer step takes.
        steps: optimizer steps; rows that they do not reach are left out.
        seed: for the order of the rows.

    Attributes:
        expert_logits: task -> its expert's logits of the training rows, (N, C), if they are learned from.
    """

    def __init__(
        self, examples: Mapping[str, Examples], validation_rows: int, per_step: int, steps: int, seed: int
    ) -> None:
        self.examples, self.per_step = examples, per_step
        self.train: dict[str, list[int]] = {}
        self.validation: dict[str, list[int]] = {}
        self.expert_logits: dict[str, torch.Tensor] = {}
        for index, (task, task_examples) in enumerate(examples.items()):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            order = torch.randperm(len(task_examples.rows), generator=generator).tolist()
            count = min(validation_rows, len(order) // 4)
            self.validation[task] = order[:count] or order[:validation_rows]
            self.train[task] = order[count : count + per_step * steps]

    def __len__(self) -> int:
        """The rows of the largest task, and at least those of one optimizer step."""
        return max(self.per_step, *(len(indices) for indices in self.train.values()))

    def __getitem__(self, index: int) -> dict[str, int]:
        """Task -> position of a row among its training rows."""
        return {task: index % len(rows) for task, rows in self.train.items()}

    def collate(self, items: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Task -> a batch of inputs, with the ``expert_logits`` of its rows if they are learned from."""
        batches = {}
        for task, examples in self.examples.items():
            positions = [item[task] for item in items]
            batches[task] = dict(examples.collate([examples.rows[self.train[task][each]] for each in positions]))
            if task in self.expert_logits:
                batches[task]["expert_logits"] = self.expert_logits[task][positions]
        return batches


__all__ = ["Adaptation", "adapt_routers", "fit_routers", "reset_routers"]
