"""What mergekit's parameters are called here, with the defaults of mergekit 0.1.4.

Each merging method names its own in its decorator: ``mergekit=TASK | summed(False)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MergekitParameter:
    """What one of mergekit's parameters is called here.

    Attributes:
        ours: our name.
        default: mergekit's; None: there is none.
        kind: of its values: float, int or bool.
        per_model: whether every model may have its own.
        value: ours, of mergekit's.
    """

    ours: str
    default: object = None
    kind: type = float
    per_model: bool = False
    value: Callable[[Any], Any] = lambda value: value


def flag(ours: str, default: bool, on: object = True, off: object = False) -> MergekitParameter:
    """A boolean of mergekit's, and what its two values are here."""
    return MergekitParameter(ours, default, bool, value=lambda value: on if value else off)


WEIGHT = {"weight": MergekitParameter("weight", per_model=True)}
TASK = {**WEIGHT, "lambda": MergekitParameter("scaling", 1.0)}
DENSITY = {"density": MergekitParameter("density", 1.0, per_model=True)}
DROPPED = {"density": MergekitParameter("drop_rate", 1.0, per_model=True, value=lambda kept: 1 - kept)}
CRUMBS = {**TASK, **DENSITY, "gamma": MergekitParameter("gamma", 0.01, per_model=True)}
DELLA = {**TASK, **DENSITY, "epsilon": MergekitParameter("epsilon", 0.15, per_model=True)}
RESCALED = {"rescale": flag("rescale", True, on="norm", off="none")}
NOT_RESCALED = {"rescale": flag("rescale", False, on="norm", off="none")}


def summed(divide: bool) -> dict[str, MergekitParameter]:
    """``normalize`` of a weighted sum, with its default."""
    return {"normalize": flag("normalize", divide)}


def elected(divide: bool) -> dict[str, MergekitParameter]:
    """``normalize`` after signs were elected, with its default."""
    return {"normalize": flag("merge", divide, on="mean", off="sum")}
