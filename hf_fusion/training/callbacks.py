"""Progress of transformers' Trainer: reported as a phase if a reporter is set, else as a bar on a terminal."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.logging import is_progress_bar_enabled

from hf_fusion.progress import Phase, is_reported, phase

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class _Bar(ProgressCallback):
    """The Trainer's progress bar without its log lines."""

    def on_log(self, *args: object, **_: object) -> None:
        """Prints nothing."""


class _StepReporter(TrainerCallback):
    """Reports optimizer steps as the progress of a phase."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = ExitStack()
        self._phase: Phase | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Opens the phase, with the number of steps as its total."""
        self._phase = self._open.enter_context(phase(self.name, state.max_steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Reports a finished step."""
        if self._phase:
            self._phase.reach(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Closes the phase, also after early stopping."""
        self._open.close()


def set_progress(trainer: Trainer, name: str) -> None:
    """Replaces the output of a Trainer built with ``disable_tqdm=True`` by a phase, or by a plain progress bar.

    Args:
        trainer: before ``train()``.
        name: of the phase, such as "Training gates".
    """
    trainer.remove_callback(PrinterCallback)
    if is_reported():
        trainer.add_callback(_StepReporter(name))
    elif sys.stderr.isatty() and is_progress_bar_enabled():
        trainer.add_callback(_Bar())
