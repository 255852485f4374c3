"""What the runner gets from every kind of suite: systems that answer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.bench.cells import ALL, CLEAN
from hf_fusion.bench.scoring import Answered
from hf_fusion.evaluation.loop import run_batches

if TYPE_CHECKING:
    from hf_fusion.bench.suite import Suite, UnseenSplit

TEST, FIT = "test", "fit"


class NotApplicable(Exception):
    """A method cannot be run on this suite, split or task: its message is the cells' reason, and nothing has failed."""


@dataclass
class System:
    """A fused model.

    Attributes:
        answer: (task, condition, "test" or "fit") → what it answers to these rows.
        parameters: of the method, as they were used.
        stored: parameters that must be kept.
        active: parameters that one example meets.
        cost: multiplications of a forward as a multiple of the dense base's; where there is none, of the first
            expert's.
        retuned: parameters → the same model with others, where that is cheaper than to fuse anew.
    """

    answer: Callable[[str, str, str], Answered]
    parameters: dict[str, Any] = field(default_factory=dict)
    stored: int = 0
    active: int = 0
    cost: float = 1.0
    retuned: Callable[[Mapping[str, Any]], System] | None = None


def everything(suite: Suite) -> UnseenSplit:
    """The split in which all experts are fused and all tasks are measured."""
    from hf_fusion.bench.suite import UnseenSplit

    owned = tuple(task.name for task in suite.tasks.values() if task.expert)
    return UnseenSplit(ALL, owned if suite.kind == "merging" else tuple(suite.experts), tuple(suite.tasks))


def share_batches(batches: list[Any], run: Callable[[Any], tuple[list[Any], list[Any]]]) -> Answered:
    """Answers to batches, divided over the processes of `accelerate launch`; each gets all of them, in order.

    Args:
        batches: (row numbers, inputs) each.
        run: inputs → answers and what is right, of the rows of a batch.
    """
    found = [
        row
        for rows in run_batches(batches, lambda batch: list(zip(batch[0], *run(batch[1]), strict=True)))
        for row in rows
    ]
    found.sort(key=lambda row: row[0])
    return Answered([given for _, given, _ in found], [right for _, _, right in found])


def seed_of(*parts: object) -> int:
    """A number from names, the same on every machine and in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode())


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Torch's chance starts from names, and goes on as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(*parts))
        yield


__all__ = ["ALL", "CLEAN", "FIT", "TEST", "NotApplicable", "System", "everything", "seed_of", "seeded",
           "share_batches"]  # fmt: skip
