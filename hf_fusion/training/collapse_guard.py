"""The guard of router training: checks on validation rows, the best routers, and a learning rate that adapts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback

from hf_fusion.io.saving import replacing
from hf_fusion.progress import track
from hf_fusion.training.adamerging import merged_once
from hf_fusion.training.adaptation import Adaptation, Diagnostics, diagnose, mean_of
from hf_fusion.training.batches import Examples
from hf_fusion.training.starts import predict_rows

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from hf_fusion.training.adamerging import LearnedMerge

STATE_FILE = "watch.pt"  # in a checkpoint: the best routers so far, and the history
PATIENCE = 2  # checks without improvement before training goes back to the best routers, at half the learning rate
RETURNS = 3  # to the best routers without improvement, after which training ends
# What the best check is chosen by, greater is better. Divergence is what "expert" minimises, and varies less from rows
# to rows than agreement. Entropy makes predictions more confident than the experts', so there divergence says little.
SCORES: dict[str, Callable[[Mapping[str, Diagnostics]], float]] = {
    "expert": lambda found: -mean_of(found, "divergence"),
    "entropy": lambda found: mean_of(found, "kappa"),
}


class CollapseGuard(TrainerCallback):
    """Keeps the routers that predict most like the experts, by checks on validation rows.

    A check is an improvement if its score is (`SCORES`) and the model agrees with the experts as often as before
    training, within the sampling error. After `PATIENCE` checks without improvement, or when a router becomes NaN or
    Inf, training goes back to the best routers and continues from there at half the learning rate; after `RETURNS`
    returns in a row it ends. A learning rate that is too high, a loss that collapses and a run that is too long are all
    mended by this, and the model is never left worse than it was before training.

    Args:
        model: the model in training.
        examples: task -> its rows.
        rows: task -> indices of its validation rows.
        report: is given ``before``, ``history``, ``stopped`` and ``steps``.
        trained: name -> parameter in training.
        expert_logits: task -> the expert's logits of its validation rows, (N, C).
        every: steps between two checks; None turns the checks off.
    """

    trainer: Trainer  # set once there is one: it is made with this

    def __init__(
        self,
        model: LearnedMerge,
        examples: Mapping[str, Examples],
        rows: Mapping[str, list[int]],
        report: Adaptation,
        trained: Mapping[str, nn.Parameter],
        expert_logits: Mapping[str, torch.Tensor],
        every: int | None,
    ) -> None:
        self.model, self.examples, self.rows, self.report = model, examples, rows, report
        self.trained, self.expert_logits, self.every = trained, expert_logits, every
        self.best_state = self._copy_state()
        self.best_step = 0
        self.best_score = -math.inf
        self.failed = 0  # checks without improvement since the last return
        self.returns = 0  # since the last improvement

    def _copy_state(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def start(self) -> None:
        """Records the model's predictions before training."""
        self.report.before = self.check()
        self.best_score = self._score(self.report.before)

    def check(self) -> dict[str, Diagnostics]:
        """Task -> diagnostics on its validation rows; empty without validation rows."""
        size, found = 4 * self.report.batch_size, {}
        with merged_once(self.model), self.trainer.accelerator.autocast():
            for task in track([task for task, rows in self.rows.items() if rows], "Checking predictions"):
                logits = predict_rows(self.model, task, self.examples[task], self.rows[task], size)
                found[task] = diagnose(logits, self.expert_logits[task])
        return found

    def _score(self, found: Mapping[str, Diagnostics]) -> float:
        """What `SCORES` says of a check; -inf where a prediction is NaN or the model agrees less than before training.

        Less is what one standard error of the agreement before training does not explain.
        """
        score = SCORES[self.report.loss](found) if self.report.loss in SCORES else 0.0
        before = self.report.before
        variance = sum(own.agreement * (1 - own.agreement) / len(self.rows[task]) for task, own in before.items())
        least = mean_of(before, "agreement") - math.sqrt(variance) / max(1, len(before))
        return score if mean_of(found, "agreement") >= least and score == score else -math.inf

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Saves the best routers beside a checkpoint."""
        if args.process_index == 0:
            content = {name: getattr(self, name) for name in SAVED} | {"history": self.report.history}
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
            self.report.history = content.pop("history")
            for name in SAVED:
                setattr(self, name, content[name])
        else:
            self.best_state, self.best_step = self._copy_state(), state.global_step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        **_: object,
    ) -> None:
        """Checks, before a checkpoint is written."""
        step = state.global_step
        is_finite = all(bool(parameter.isfinite().all()) for parameter in self.trained.values())
        is_last = step == state.max_steps
        if is_finite and (self.every is None or (step % self.every and not is_last)):
            return
        if is_finite:
            now = self.check()
            rate = optimizer.param_groups[0]["lr"]
            row = {task: asdict(values) for task, values in now.items()}
            self.report.history.append({"step": step, "learning_rate": rate, **row})
            if (score := self._score(now)) > self.best_score:
                self.best_state, self.best_step, self.best_score = self._copy_state(), step, score
                self.failed = self.returns = 0
                return
        self.failed += 1
        if not is_finite or self.failed >= PATIENCE:
            self.failed, self.returns = 0, self.returns + 1
            self._restore()
            if self.returns >= RETURNS or is_last:
                self._stop(control, step)
                return
            optimizer.state.clear()  # its moments led away from here
            lr_scheduler.base_lrs = [rate / 2 for rate in lr_scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] /= 2

    def _restore(self) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.best_state[name])

    def _stop(self, control: TrainerControl, step: int) -> None:
        if not self.best_step:
            cure = "raise diversity, or use loss='expert'" if self.report.loss == "entropy" else "lower learning_rate"
            self.report.stopped = f"no step up to {step} made the predictions more like the experts'; {cure}"
        control.should_training_stop, control.should_save = True, False

    def finish(self) -> None:
        """Restores the best routers if predictions were checked."""
        self.report.steps = self.trainer.state.global_step
        if self.every is not None:
            self.report.steps = self.best_step
            self._restore()


SAVED = ("best_state", "best_step", "best_score", "failed", "returns")


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}", STATE_FILE)


__all__ = ["CollapseGuard"]
