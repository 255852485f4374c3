"""The Trainer's progress: a phase for whoever is told of them, else its own bar on a terminal, else nothing."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.logging import is_progress_bar_enabled

from hf_fusion.progress import Phase, is_reported, phase


class _Bar(ProgressCallback):
    """The Trainer's bar without the figures it prints beside it."""

    def on_log(self, *args: Any, **_: object) -> None:
        """Prints nothing."""


class _Steps(TrainerCallback):
    """Tells of the optimizer's steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = ExitStack()
        self._phase: Phase | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: object) -> None:
        """A phase with a known number of steps."""
        self._phase = self._open.enter_context(phase(self.name, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        """One more is done."""
        if self._phase:
            self._phase.reach(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        """The phase is over; it may have ended early."""
        self._open.close()


def set_progress(trainer: Trainer, name: str) -> None:
    """Makes a Trainer built with ``disable_tqdm=True`` print nothing, and tell of its steps as a phase.

    Args:
        trainer: not yet training.
        name: of the phase, "Training gates".
    """
    trainer.remove_callback(PrinterCallback)
    if is_reported():
        trainer.add_callback(_Steps(name))
    elif sys.stderr.isatty() and is_progress_bar_enabled():
        trainer.add_callback(_Bar())
