"""Routers of a merged model learn, without labels or with them; its weights stay as they are.

Without labels there are two ways. Each task's own expert is in the model, and can teach it. Or the answers are made
sure: the mean entropy of each task's predictions falls (test-time adaptation; AdaMerging, arXiv 2310.02575; WEMoE,
arXiv 2402.00433). That loss has a shortcut, one answer for everything; against it there are a term that keeps the
answers spread, and a watch that stops in time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_fusion.errors import FusionError
from hf_fusion.io.saving import replacing
from hf_fusion.progress import track
from hf_fusion.training.adamerging import merged_once, objective_of
from hf_fusion.training.batches import Examples, class_logits, read_examples, to_model, unlabelled
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.runs import Trained, digest, on_device, resumable, training_arguments
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

WATCHED = 64  # rows of each task that the watch looks at; none of them is trained on where there are enough
CHECKS = 10  # so often does it look
WATCH_FILE = "watch.pt"  # in a checkpoint: the best state so far
RUN_FILE = "router_training.json"  # says whose checkpoints lie in a folder


@dataclass(frozen=True)
class Health:
    """What a task's answers look like on some rows.

    Attributes:
        confidence: mean probability of the likeliest class.
        entropy: mean entropy of the predictions, in nats.
        classes: effective number of classes among the answers, exp of the entropy of their mean: as many as there are
            where all are given alike, 1 where one answer is given to everything.
        agreement: share of the rows that are answered as the task's own expert answers them.
    """

    confidence: float
    entropy: float
    classes: float
    agreement: float


@dataclass
class Adaptation:
    """What became of the routers.

    Attributes:
        loss: "expert", "entropy" or "labels".
        diversity: weight of the term that keeps the answers spread.
        learning_rate: the highest.
        batch_size: rows of each task a step and process.
        steps: after which the routers were taken; not more than were made.
        rows: task -> rows it learned from.
        stopped: why it ended before its last step, or None.
        before: task -> its answers at first; after: with the routers as they are now.
        history: what the watch saw: "step", and task -> `Health`.
    """

    loss: str
    diversity: float
    learning_rate: float
    batch_size: int
    steps: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    before: dict[str, Health] = field(default_factory=dict)
    after: dict[str, Health] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def for_config(self) -> dict[str, Any]:
        """What the model's config keeps of it, and its card tells."""
        names = ("loss", "diversity", "learning_rate", "batch_size", "steps", "rows", "stopped")
        return {name: value for name, value in asdict(self).items() if name in names}


def adapt_routers(
    model: Any,
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
    """The routers learn from rows without labels, several tasks at once; the loss is summed over the tasks.

    "expert": ``mean_x KL(p_k(y|x) ‖ p(y|x))``. The teacher p_k is this model with the task's own expert alone in all
    that is routed. A router, which is not told the task, learns to find out by its inputs whose they are.

    "entropy": ``mean_x H(p(y|x)) - diversity · H(mean_x p(y|x))``, the papers' test-time adaptation. With diversity 0
    it is their loss, known to collapse: every input gets one answer, surely. With 1 it is the mutual information of
    rows and answers (information maximisation: SHOT, arXiv 2002.08546), which wants all classes alike.

    A watch looks at `WATCHED` rows of each task that are not learned from, and at what the task's own expert, which is
    in the model, makes of them. Two things go wrong: the answers of a task narrow to fewer classes than they had at
    first and than the expert's have; or they agree less with the expert's than they did at first (classes that changed
    places are as sure and as spread as before). Where either falls by more than `tolerance`, training ends;
    `Adaptation.stopped` says so, and a warning. In any case the routers are in the end those of the look at which the
    answers to all tasks agreed most with the experts'.

    On transformers' Trainer, with Adam: `accelerate launch` spreads it over processes. The same seed gives the same
    routers.

    Args:
        model: a `WEMoEModel` of classifiers, or of CLIP; it is changed in place, and only its routers are.
        unlabelled_rows: task (the name of its expert) -> rows with column ``text`` (and ``text_pair``) or ``image``;
            labels are not looked at. For CLIP: `zero_shot_examples`.
        loss: "expert" or "entropy", see above.
        steps: optimizer steps; a step takes `batch_size` rows of every task.
        learning_rate: constant.
        batch_size: rows of each task, per process.
        diversity: of "entropy", see above.
        tolerance: share by which the effective number of classes, or the agreement with the expert, may fall before
            the watch stops; with 1 nobody watches, and the routers are those of the last step.
        max_length: the longest sequence, in tokens.
        seed: of the order of the rows.
        output_dir: checkpoints (of the routers alone) are kept there, and a run that was interrupted goes on from them.
        more: of transformers' ``TrainingArguments``, such as ``bf16=True`` or ``lr_scheduler_type="cosine"``.

    Returns:
        What became of it; ``model.config.adaptation`` keeps it for the card.

    Raises:
        FusionError: for a model without routers or classes, unknown tasks, rows it cannot read, a loss not finite.
    """
    if loss not in LOSSES:
        raise FusionError(f"loss={loss!r}", hint=f"one of {', '.join(LOSSES)}")
    if not diversity >= 0:
        raise FusionError(f"diversity={diversity}", hint="0, the papers' loss, or more")
    if not 0 < tolerance <= 1:
        raise FusionError(f"tolerance={tolerance}", hint="above 0, and 1 to let everything pass")
    examples = {task: _read(model, task, rows, max_length, labelled=False) for task, rows in unlabelled_rows.items()}
    facts = Adaptation(loss, diversity if loss == "entropy" else 0.0, learning_rate, batch_size)
    return _fit(
        model,
        examples,
        facts,
        partial(LOSSES[loss], model, diversity),
        steps,
        seed,
        output_dir,
        tolerance,
        WATCHED,
        **more,
    )


def fit_routers(
    model: Any,
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
    """The routers learn from rows with labels: each task's own loss, summed over the tasks.

    Args:
        model: a `WEMoEModel`; it is changed in place, and only its routers are.
        labelled_rows: task (the name of its expert) -> rows, columns ``prompt`` and ``target`` for language models,
            ``text`` (``text_pair``) or ``image`` with ``label`` for classifiers.
        steps, learning_rate, batch_size, max_length, seed, output_dir, more: see `adapt_routers`.

    Returns:
        See `adapt_routers`.

    Raises:
        FusionError: see `adapt_routers`.
    """
    examples = {task: _read(model, task, rows, max_length, labelled=True) for task, rows in labelled_rows.items()}
    loss = partial(_supervised, model, examples)
    facts = Adaptation("labels", 0.0, learning_rate, batch_size)
    return _fit(model, examples, facts, loss, steps, seed, output_dir, **more)


def _read(model: Any, task: str, rows: Any, max_length: int, labelled: bool) -> Examples:
    """Rows of a task as its head reads them."""
    if task not in model.experts:
        raise FusionError(f"there is no expert {task!r}", hint=f"its tasks are {', '.join(model.experts)}")
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


def _information(model: Any, diversity: float, batches: Mapping[str, Any]) -> torch.Tensor:
    """Sum over the tasks of mean entropy less diversity times the entropy of the mean."""
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


def _teaching(model: Any, diversity: float, batches: Mapping[str, Any]) -> torch.Tensor:
    """Sum over the tasks of the mean divergence from their own experts."""
    taught = {}
    with torch.no_grad():
        for task, inputs in batches.items():
            with model.using(task):
                taught[task] = class_logits(partial(model, task=task), inputs).log_softmax(-1)  # (B, C)
    losses = []
    with merged_once(model):
        for task, inputs in batches.items():
            log = class_logits(partial(model, task=task), inputs).log_softmax(-1)
            losses.append(nn.functional.kl_div(log, taught[task], reduction="batchmean", log_target=True))
    return torch.stack(losses).sum()


# what rows without labels teach: (model, diversity, task -> inputs) -> loss
LOSSES: dict[str, Callable[[Any, float, Mapping[str, Any]], torch.Tensor]] = {
    "expert": _teaching,
    "entropy": _information,
}


def _supervised(model: Any, examples: Mapping[str, Examples], batches: Mapping[str, Any]) -> torch.Tensor:
    """Sum over the tasks of their own losses."""
    with merged_once(model):
        losses = [examples[task].loss(partial(model, task=task), inputs) for task, inputs in batches.items()]
    return torch.stack(losses).sum()


def _fit(
    model: Any,
    examples: Mapping[str, Examples],
    facts: Adaptation,
    loss: Callable[[Any], torch.Tensor],
    steps: int,
    seed: int,
    output_dir: str | Path | None,
    tolerance: float = 1.0,
    watched: int = 0,
    **more: Any,
) -> Adaptation:
    """Trains what requires a gradient, and takes it back where the watch says so."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise FusionError("the model has no routers to train", hint="SMILE routes without; fuse with routing='wemoe'")
    if not examples:
        raise FusionError("there are no rows to learn from", hint="{task: rows}, a task for each expert")
    own = {"lr_scheduler_type": "constant", "dataloader_drop_last": True, **more}
    rows = _Rows(examples, watched, seed)
    facts.rows = {task: len(places) for task, places in rows.places.items()}
    with (
        training_arguments(output_dir, steps, facts.learning_rate, facts.batch_size, seed, **own) as arguments,
        on_device(model, arguments.device),
    ):
        rows.least = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        watch = _Watch(model, examples, rows.watched, facts, trained, tolerance, max(1, steps // CHECKS))
        trainer = Trainer(
            model=Trained(trained, objective_of(model, loss)),
            args=arguments,
            train_dataset=rows,
            data_collator=rows.collate,
            callbacks=[watch],
        )
        set_progress(trainer, "Training the routers")
        watch.trainer = trainer
        watch.start()
        checkpoint = None
        if output_dir:
            run = {"routers": digest(trained), "seed": seed, "tolerance": tolerance, **facts.for_config()}
            del run["steps"]
            checkpoint = resumable(Path(output_dir), RUN_FILE, run, steps)
        trainer.train(resume_from_checkpoint=checkpoint)
        watch.finish(trainer.state.global_step)
        facts.after = watch.look()
    model.zero_grad()
    if facts.stopped:
        logger.warning("%s", facts.stopped)
    model.config.adaptation = facts.for_config()
    return facts


class _Rows(torch.utils.data.Dataset[Any]):
    """Bundles of one row of each task; tasks with fewer rows begin anew.

    Args:
        examples: by task.
        watched: rows of each that are kept apart; of a task with few rows a quarter.
        seed: of their order.
    """

    def __init__(self, examples: Mapping[str, Examples], watched: int, seed: int) -> None:
        self.examples = examples
        self.least = 1  # rows of a step: an epoch has no fewer
        self.places: dict[str, list[int]] = {}
        self.watched: dict[str, list[int]] = {}
        for number, (task, own) in enumerate(examples.items()):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            order = torch.randperm(len(own.rows), generator=generator).tolist()
            kept = min(watched, len(order) // 4)
            self.watched[task] = order[:kept] or order[:watched]
            self.places[task] = order[kept:]

    def __len__(self) -> int:
        """So many that every row of the largest task is seen in an epoch, and that there is a step."""
        return max(self.least, *(len(places) for places in self.places.values()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row of each task."""
        return {task: self.examples[task].rows[own[index % len(own)]] for task, own in self.places.items()}

    def collate(self, bundles: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of each task."""
        return {task: own.collate([bundle[task] for bundle in bundles]) for task, own in self.examples.items()}


class _Watch(TrainerCallback):
    """Looks at the answers from time to time; stops training where a task's go wrong, and where the routers are NaN."""

    def __init__(
        self,
        model: Any,
        examples: Mapping[str, Examples],
        rows: Mapping[str, list[int]],
        facts: Adaptation,
        trained: Mapping[str, nn.Parameter],
        tolerance: float,
        every: int,
    ) -> None:
        self.model, self.examples, self.rows, self.facts = model, examples, rows, facts
        self.trained, self.tolerance, self.every = trained, tolerance, every
        self.trainer: Any = None
        self.good = self._state()
        self.good_step = 0
        self.best = 0.0  # mean agreement of the good state
        self.own: dict[str, torch.Tensor] = {}  # task -> logits of its expert

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def start(self) -> None:
        """What the experts answer, and the model before it learns."""
        for task in self.rows:
            with self.model.using(task):
                self.own |= self._logits([task])
        self.facts.before = self.look()
        self.best = _mean_agreement(self.facts.before)

    def look(self) -> dict[str, Health]:
        """The answers on the watched rows, by task; empty where nothing is watched."""
        with merged_once(self.model):
            return {task: health(own, self.own[task]) for task, own in self._logits(self.rows).items()}

    @torch.no_grad()
    def _logits(self, tasks: Iterable[str]) -> dict[str, torch.Tensor]:
        """Of the watched rows of some tasks, (N, C)."""
        found = {}
        size = 4 * self.facts.batch_size
        with self.trainer.accelerator.autocast():
            for task in track(list(tasks), "Checking answers"):
                logits = []
                for start in range(0, len(self.rows[task]), size):
                    rows = [self.examples[task].rows[place] for place in self.rows[task][start : start + size]]
                    inputs = to_model(self.examples[task].collate(rows), self.model.backbone)
                    logits.append(class_logits(partial(self.model, task=task), inputs))
                if logits:
                    found[task] = torch.cat(logits)
        return found

    def on_save(self, args: Any, state: Any, control: Any, **_: object) -> None:
        """The best state goes along with a checkpoint."""
        if args.process_index == 0:
            kept = {"good": self.good, "step": self.good_step, "best": self.best, "history": self.facts.history}
            with replacing(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WATCH_FILE) as partial:
                torch.save(kept, partial)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: object) -> None:
        """A run that goes on takes it up again; killed before it was written, it starts from the checkpoint itself."""
        if not state.global_step:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WATCH_FILE
        if file.exists():
            kept = torch.load(file, map_location=next(iter(self.good.values())).device, weights_only=True)
            self.good, self.good_step, self.best = kept["good"], kept["step"], kept["best"]
            self.facts.history = kept["history"]
        else:
            self.good, self.good_step = self._state(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        """Looks, before a checkpoint is written."""
        step = state.global_step
        if not all(parameter.isfinite().all() for parameter in self.trained.values()):
            self._stop(control, f"the routers became NaN or Inf at step {step}")
        elif self.tolerance < 1 and (step % self.every == 0 or step == state.max_steps):
            now = self.look()
            self.facts.history.append({"step": step, **{task: asdict(own) for task, own in now.items()}})
            wrong = next((why for task, own in now.items() if (why := self._wrong(task, own))), None)
            agreement = _mean_agreement(now)
            if wrong:
                self._stop(control, f"stopped at step {step}: {wrong}")
            elif agreement >= self.best:
                self.good, self.good_step, self.best = self._state(), step, agreement

    def _wrong(self, task: str, now: Health) -> str | None:
        """What has gone wrong with the answers to a task, or None."""
        first, expert, left = self.facts.before[task], health(self.own[task], self.own[task]), 1 - self.tolerance
        sure = f"with a confidence of {now.confidence:.2f} after {first.confidence:.2f}"
        if now.classes < left * min(first.classes, expert.classes):
            return (
                f"the answers to {task} collapse, {now.classes:.1f} effective classes instead of {first.classes:.1f} "
                f"at first ({expert.classes:.1f} from its expert), {sure}"
            )
        if now.agreement < left * first.agreement:
            return (
                f"the answers to {task} leave its expert, {now.agreement:.0%} agree instead of {first.agreement:.0%} "
                f"at first, {sure}"
            )
        return None

    def _stop(self, control: Any, why: str) -> None:
        cure = "raise diversity or lower learning_rate" if self.facts.loss == "entropy" else "lower learning_rate"
        self.facts.stopped = f"{why}; the routers are those of step {self.good_step}. To go further, {cure}"
        control.should_training_stop, control.should_save = True, False

    def finish(self, steps: int) -> None:
        """Goes back to the best state, where somebody watched or training was stopped."""
        self.facts.steps = steps
        if self.facts.stopped or self.tolerance < 1:
            self.facts.steps = self.good_step
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(self.good[name])


def _mean_agreement(found: Mapping[str, Health]) -> float:
    return sum(own.agreement for own in found.values()) / max(1, len(found))


def health(logits: torch.Tensor, expert: torch.Tensor) -> Health:
    """What answers look like, from their logits (N, C), beside the expert's (N, C)."""
    log = logits.float().log_softmax(-1)
    mean = log.exp().mean(0)
    return Health(
        float(log.exp().amax(-1).mean()),
        float(-(log.exp() * log).sum(-1).mean()),
        float(torch.special.entr(mean).sum().exp()),
        float((logits.argmax(-1) == expert.argmax(-1)).float().mean()),
    )


__all__ = ["Adaptation", "Health", "adapt_routers", "fit_routers", "health"]
