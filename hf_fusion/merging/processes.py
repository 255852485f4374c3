"""Work divided over the processes that `accelerate launch` starts: what fails on one of them fails on all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from hf_fusion.errors import FusionError, one_line

PATIENCE = timedelta(days=7)
"""How long one process waits for another; the launcher ends all of them when one dies."""


class Processes:
    """This process among those that were launched together; alone where none were.

    Attributes:
        number: of this process, from 0.
        count: how many there are.
        here: how many of them this machine runs.
    """

    def __init__(self) -> None:
        self.number, self.count, self.here = 0, 1, 1
        # torchrun's words, by which accelerate too knows that it was launched
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ:
            from accelerate import PartialState

            state = PartialState(cpu=True, timeout=PATIENCE)
            self.number, self.count = state.process_index, state.num_processes
            self.here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

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
            told = self._gather(told)
        if failed is not None:
            raise failed
        for number, reason in enumerate(told):
            if reason is not None:
                raise FusionError(f"process {number} of {self.count} failed: {reason}")

    def _gather(self, own: list[str | None]) -> list[str | None]:
        """What every process has to tell, in all of them."""
        from accelerate.utils import gather_object

        try:
            return gather_object(own)
        except RuntimeError as error:  # torch's word for a connection that is gone
            reason = f"another of {self.count} processes is gone ({one_line(error)})"
            raise FusionError(reason, "see what it said; run it again") from None
