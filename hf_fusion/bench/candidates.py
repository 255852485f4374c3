"""Candidates: the fused models that the runner measures, whatever the kind of suite."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_fusion.bench.cells import ALL
from hf_fusion.evaluation.loop import TaskRows
from hf_fusion.evaluation.predictors import Predictor

if TYPE_CHECKING:
    from hf_fusion.bench.suite import Holdout, Suite

TEST, FIT = "test", "fit"


class Prepared(NamedTuple):
    """What `evaluation.loop.predict_task` takes.

    Attributes:
        predictor: a model, or what is made of several.
        rows: as it reads them.
        within: the context in which all of them are predicted.
    """

    predictor: Predictor
    rows: TaskRows
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Candidate:
    """A fused model to measure.

    Attributes:
        prepare: (task, corruption or "clean", "test" or "fit") → the predictor and the rows.
        parameters: of the method, as they were used.
        stored: number of parameters of the model.
        active: number of parameters that one example uses.
        cost: multiplications per forward pass, as a multiple of the dense base's; without a base, of the first
            expert's.
        retuned: parameters → the same model with these, where that is cheaper than fusing again.
    """

    prepare: Callable[[str, str, str], Prepared]
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


def seed_of(*parts: object) -> int:
    """A seed from names, the same on every machine and in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode())


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seeds torch from names within this context, and restores the generator's state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(*parts))
        yield
