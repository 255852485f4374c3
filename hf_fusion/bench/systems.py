"""Candidates: the fused models that the runner measures, whatever the kind of suite."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.bench.cells import ALL, CLEAN
from hf_fusion.evaluation.loop import run_batches
from hf_fusion.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from hf_fusion.bench.suite import Holdout, Suite

TEST, FIT = "test", "fit"


class NotApplicable(Exception):
    """A method cannot be run on this suite, split or task: its message is the cells' reason, and nothing has failed."""


@dataclass
class Candidate:
    """A fused model, as it is measured.

    Attributes:
        predict: (task, corruption or "clean", "test" or "fit") → predictions for these rows.
        parameters: of the method, as they were used.
        stored: parameters that must be kept.
        active: parameters that one example meets.
        cost: multiplications of a forward as a multiple of the dense base's; where there is none, of the first
            expert's.
        retuned: parameters → the same model with others, where that is cheaper than fusing again.
    """

    predict: Callable[[str, str, str], Predictions]
    parameters: dict[str, Any] = field(default_factory=dict)
    stored: int = 0
    active: int = 0
    cost: float = 1.0
    retuned: Callable[[Mapping[str, Any]], Candidate] | None = None


def everything(suite: Suite) -> Holdout:
    """All experts fused and all tasks measured: nothing is held out."""
    from hf_fusion.bench.suite import Holdout

    owned = tuple(task.name for task in suite.tasks.values() if task.expert)
    return Holdout(ALL, owned if suite.kind == "merging" else tuple(suite.experts), tuple(suite.tasks))


def share_batches(batches: list[Any], run: Callable[[Any], Predictions]) -> Predictions:
    """Predictions for batches, divided over the processes of `accelerate launch`; each gets all of them, in order.

    Args:
        batches: (row indices, inputs) each.
        run: inputs → predictions and references of the rows of a batch.
    """

    def rows_of(batch: Any) -> list[tuple[int, Any, Any]]:
        own = run(batch[1])
        return list(zip(batch[0], own.predictions, own.references, strict=True))

    found = [row for rows in run_batches(batches, rows_of) for row in rows]
    found.sort(key=lambda row: row[0])
    return Predictions([predicted for _, predicted, _ in found], [reference for _, _, reference in found])


def seed_of(*parts: object) -> int:
    """A seed from names, the same on every machine and in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode())


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seeds torch from names; afterwards its generator is where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(*parts))
        yield


__all__ = ["ALL", "CLEAN", "FIT", "TEST", "NotApplicable", "Candidate", "everything", "seed_of", "seeded",
           "share_batches"]  # fmt: skip
