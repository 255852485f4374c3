"""Early stopping of router training: ends a run whose predictions collapse, and restores the best routers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback

from hf_fusion.io.saving import replacing
from hf_fusion.progress import track
from hf_fusion.training.adamerging import merged_once
from hf_fusion.training.adaptation import Adaptation, Diagnostics, diagnose
from hf_fusion.training.batches import Examples, class_logits, to_model

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from hf_fusion.training.adamerging import LearnedMerge

STATE_FILE = "watch.pt"  # in a checkpoint: the best routers so far, and the history


class CollapseGuard(TrainerCallback):
    """Checks the predictions on validation rows; stops training where they degrade, or where a router is NaN or Inf.

    Args:
        model: the model in training.
        examples: task -> its rows.
        rows: task -> indices of its validation rows.
        report: is given ``before``, ``history``, ``stopped`` and ``steps``.
        trained: name -> parameter in training.
        tolerance: share by which the effective number of classes, or the agreement with the expert, may fall; 1 turns
            the checks off.
        every: steps between two checks.
    """

    trainer: Trainer  # set once there is one: it is made with this

    def __init__(
        self,
        model: LearnedMerge,
        examples: Mapping[str, Examples],
        rows: Mapping[str, list[int]],
        report: Adaptation,
        trained: Mapping[str, nn.Parameter],
        tolerance: float,
        every: int,
    ) -> None:
        self.model, self.examples, self.rows, self.report = model, examples, rows, report
        self.trained, self.tolerance, self.every = trained, tolerance, every
        self.best_state = self._copy_state()
        self.best_step = 0
        self.best_agreement = 0.0  # mean over the tasks
        self.expert_logits: dict[str, torch.Tensor] = {}

    def _copy_state(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def start(self) -> None:
        """Records the experts' predictions, and the model's before training."""
        for task in self.rows:
            with self.model.using(task):
                self.expert_logits |= self._predict([task])
        self.report.before = self.check()
        self.best_agreement = _mean_agreement(self.report.before)

    def check(self) -> dict[str, Diagnostics]:
        """Task -> diagnostics on its validation rows; empty without validation rows."""
        with merged_once(self.model):
            logits = self._predict(self.rows)
        return {task: diagnose(values, self.expert_logits[task]) for task, values in logits.items()}

    @torch.no_grad()
    def _predict(self, tasks: Iterable[str]) -> dict[str, torch.Tensor]:
        """Task -> logits of its validation rows, (N, C)."""
        found = {}
        size = 4 * self.report.batch_size
        with self.trainer.accelerator.autocast():
            for task in track(list(tasks), "Checking predictions"):
                logits = []
                for start in range(0, len(self.rows[task]), size):
                    rows = [self.examples[task].rows[index] for index in self.rows[task][start : start + size]]
                    inputs = to_model(self.examples[task].collate(rows), self.model.backbone)
                    logits.append(class_logits(partial(self.model, task=task), inputs))
                if logits:
                    found[task] = torch.cat(logits)
        return found

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Saves the best routers beside a checkpoint."""
        if args.process_index == 0:
            content = {
                "good": self.best_state,
                "step": self.best_step,
                "best": self.best_agreement,
                "history": self.report.history,
            }
            with replacing(_state_file(args, state)) as partial:
                torch.save(content, partial)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Restores the best routers of a resumed run; without their file, those of the checkpoint count as the best."""
        if not state.global_step:
            return
        file = _state_file(args, state)
        if file.exists():
            device = next(iter(self.best_state.values())).device
            content = torch.load(file, map_location=device, weights_only=True)
            self.best_state, self.best_step, self.best_agreement = content["good"], content["step"], content["best"]
            self.report.history = content["history"]
        else:
            self.best_state, self.best_step = self._copy_state(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Checks, before a checkpoint is written."""
        step = state.global_step
        if not all(parameter.isfinite().all() for parameter in self.trained.values()):
            self._stop(control, f"the routers became NaN or Inf at step {step}")
        elif self.tolerance < 1 and (step % self.every == 0 or step == state.max_steps):
            now = self.check()
            self.report.history.append({"step": step, **{task: asdict(values) for task, values in now.items()}})
            problem = next((why for task, values in now.items() if (why := self.find_problem(task, values))), None)
            agreement = _mean_agreement(now)
            if problem:
                self._stop(control, f"stopped at step {step}: {problem}")
            elif agreement >= self.best_agreement:
                self.best_state, self.best_step, self.best_agreement = self._copy_state(), step, agreement

    def find_problem(self, task: str, now: Diagnostics) -> str | None:
        """What is wrong with the predictions for a task, or None."""
        first, least = self.report.before[task], 1 - self.tolerance
        expert = diagnose(self.expert_logits[task], self.expert_logits[task])
        confidence = f"with a confidence of {now.confidence:.2f} after {first.confidence:.2f}"
        if now.classes < least * min(first.classes, expert.classes):
            return (
                f"the predictions for {task} collapse to {now.classes:.1f} effective classes, from {first.classes:.1f} "
                f"before training ({expert.classes:.1f} for its expert), {confidence}"
            )
        if now.agreement < least * first.agreement:
            return (
                f"the predictions for {task} drift from its expert, {now.agreement:.0%} agree, from "
                f"{first.agreement:.0%} before training, {confidence}"
            )
        return None

    def _stop(self, control: TrainerControl, why: str) -> None:
        cure = "raise diversity or lower learning_rate" if self.report.loss == "entropy" else "lower learning_rate"
        self.report.stopped = f"{why}; the routers are those of step {self.best_step}. To train further, {cure}"
        control.should_training_stop, control.should_save = True, False

    def finish(self, steps: int) -> None:
        """Restores the best routers if predictions were checked or training was stopped."""
        self.report.steps = steps
        if self.report.stopped or self.tolerance < 1:
            self.report.steps = self.best_step
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(self.best_state[name])


def _mean_agreement(found: Mapping[str, Diagnostics]) -> float:
    return sum(values.agreement for values in found.values()) / max(1, len(found))


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}", STATE_FILE)


__all__ = ["CollapseGuard"]
