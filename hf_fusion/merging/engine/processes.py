"""Work divided over the processes that `accelerate launch` starts: what fails on one of them fails on all."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_fusion.errors import FusionError, one_line

PATIENCE = timedelta(days=7)
"""How long one process waits for another; the launcher ends all of them when one dies."""


class Processes:
    """This process among those that were launched together; alone where none were.

    Attributes:
        number: of this process, from 0.
        count: how many there are.
        here: how many of them this machine runs.
        local: number of this process among those.
    """

    def __init__(self) -> None:
        self.number, self.count, self.here, self.local = 0, 1, 1, 0
        # torchrun's words, by which accelerate too knows that it was launched
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ:
            from accelerate import PartialState

            state = PartialState(cpu=True, timeout=PATIENCE)
            self.number, self.count = state.process_index, state.num_processes
            self.here, self.local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), state.local_process_index

    @property
    def is_main(self) -> bool:
        """Whether this process does what is done once."""
        return self.number == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step that no process leaves before all have done it.

        Raises:
            FusionError: it failed in another process; in the one where it did, the error itself.
        """
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        told = [None if failed is None else one_line(getattr(failed, "message", failed))]
        if self.count > 1:
            try:
                told = self._gather(told)
            except FusionError:
                if failed is None:
                    raise
        if failed is not None:
            raise failed
        for number, reason in enumerate(told):
            if reason is not None:
                raise FusionError(f"process {number} of {self.count} failed: {reason}")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A temporary folder (``TMPDIR`` says where) that all processes see, until all are done with it.

        Raises:
            FusionError: another machine's process does not see it.
        """
        with ExitStack() as held:
            with self.step():
                own = held.enter_context(TemporaryDirectory(prefix="hf-fusion-")) if self.is_main else ""
            shared = Path(self._gather([own])[0] if self.count > 1 else own)
            with self.step():
                if not shared.is_dir():
                    raise FusionError(f"{shared} is not here", "set TMPDIR to a folder that all machines see")
                yield shared

    def _gather(self, own: list[Any]) -> list[Any]:
        """What every process has to tell, in all of them."""
        from accelerate.utils import gather_object

        try:
            gathered: list[Any] = gather_object(own)
            return gathered
        except RuntimeError as error:  # torch's word for a connection that is gone
            reason = f"another of {self.count} processes is gone ({one_line(error)})"
            raise FusionError(reason, "see what it said; run it again") from None


@atexit.register
def _leave() -> None:
    """A process that ends while the threads of its group still talk would abort, though its work is done."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the first of those launched together; does not wait for the others."""
    return int(os.environ.get("RANK", 0)) == 0
