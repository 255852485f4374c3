"""The Trainer's progress on stderr: one bar where somebody watches, else nothing."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.utils.logging import is_progress_bar_enabled


class _Bar(ProgressCallback):
    """The Trainer's bar without the figures it prints beside it."""

    def on_log(self, *args: Any, **_: Any) -> None:
        """Prints nothing."""


def set_progress(trainer: Trainer) -> None:
    """Makes a Trainer built with ``disable_tqdm=True`` print nothing, and show its bar on a terminal."""
    trainer.remove_callback(PrinterCallback)
    if sys.stderr.isatty() and is_progress_bar_enabled():
        trainer.add_callback(_Bar())
