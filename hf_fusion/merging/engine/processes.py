"""Distributes a merge over the processes of `accelerate launch`; an error in one is raised in all."""

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

TIMEOUT = timedelta(days=7)
"""How long a process waits for another; the launcher ends all of them if one dies."""


class Processes:
    """The process group of a launch; a single process without a launcher.

    Attributes:
        rank: of this process.
        count: number of processes.
        local_count: number of processes on this machine.
        local_rank: rank of this process among those.
    """

    def __init__(self) -> None:
        self.rank, self.count, self.local_count, self.local_rank = 0, 1, 1, 0
        # torchrun's variables, by which accelerate detects a launch
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ:
            from accelerate import PartialState

            state = PartialState(cpu=True, timeout=TIMEOUT)
            self.rank, self.count = state.process_index, state.num_processes
            self.local_count, self.local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), state.local_process_index

    @property
    def is_main(self) -> bool:
        """Whether this process does the work that must be done once."""
        return self.rank == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within this context all processes do a step; none leaves it before all have finished.

        Raises:
            FusionError: the step failed in another process. In the process where it failed, its error is raised.
        """
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        reasons = [None if failed is None else one_line(getattr(failed, "message", failed))]
        if self.count > 1:
            try:
                reasons = self._gather(reasons)
            except FusionError:
                if failed is None:
                    raise
        if failed is not None:
            raise failed
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise FusionError(f"process {rank} of {self.count} failed: {reason}")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A temporary folder (in ``TMPDIR``) that all processes share, removed when all have left the context.

        Raises:
            FusionError: the folder does not exist on another machine.
        """
        with ExitStack() as stack:
            with self.step():
                created = stack.enter_context(TemporaryDirectory(prefix="hf-fusion-")) if self.is_main else ""
            shared = Path(self._gather([created])[0] if self.count > 1 else created)
            with self.step():
                if not shared.is_dir():
                    raise FusionError(f"{shared} does not exist here", "set TMPDIR to a folder that all machines share")
                yield shared

    def _gather(self, values: list[Any]) -> list[Any]:
        """Concatenates the lists of all processes, in all of them."""
        from accelerate.utils import gather_object

        try:
            gathered: list[Any] = gather_object(values)
            return gathered
        except RuntimeError as error:  # raised by torch for a lost connection
            reason = f"one of {self.count} processes has ended ({one_line(error)})"
            raise FusionError(reason, "see its output, then run it again") from None


@atexit.register
def _leave() -> None:
    """Closes the group: a process that exits while its communication threads run would abort."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the first of those launched together; does not wait for the others."""
    return int(os.environ.get("RANK", 0)) == 0
