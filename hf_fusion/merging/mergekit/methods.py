"""mergekit's methods and what their parameters are called here, with the defaults of mergekit 0.1.4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """What one of mergekit's parameters is called here.

    Attributes:
        ours: our name.
        default: mergekit's; None: there is none.
        kind: of its values: float, int or bool.
        per_model: whether every model may have its own.
        value: ours, of mergekit's.
    """

    ours: str
    default: Any = None
    kind: type = float
    per_model: bool = False
    value: Callable[[Any], Any] = lambda value: value


def _flag(ours: str, default: bool, on: Any = True, off: Any = False) -> Parameter:
    return Parameter(ours, default, bool, value=lambda value: on if value else off)


_WEIGHT = {"weight": Parameter("weight", per_model=True)}
_TASK = {**_WEIGHT, "lambda": Parameter("scaling", 1.0)}
_DENSITY = {"density": Parameter("density", 1.0, per_model=True)}
_DROPPED = {"density": Parameter("drop_rate", 1.0, per_model=True, value=lambda kept: 1 - kept)}
_CRUMBS = {**_TASK, **_DENSITY, "gamma": Parameter("gamma", 0.01, per_model=True)}
_DELLA = {**_TASK, **_DENSITY, "epsilon": Parameter("epsilon", 0.15, per_model=True)}
_RESCALED = {"rescale": _flag("rescale", True, on="norm", off="none")}
_NOT_RESCALED = {"rescale": _flag("rescale", False, on="norm", off="none")}


def _summed(divide: bool) -> dict[str, Parameter]:
    return {"normalize": _flag("normalize", divide)}


def _elected(divide: bool) -> dict[str, Parameter]:
    return {"normalize": _flag("merge", divide, on="mean", off="sum")}


# mergekit's method -> ours of the same name: its parameters. A new one is one more row.
METHODS: dict[str, dict[str, Parameter]] = {
    "linear": _WEIGHT | _summed(True),
    "slerp": {"t": Parameter("t")},
    "nuslerp": {
        **_WEIGHT,
        "nuslerp_flatten": _flag("per", True, on="tensor", off="row"),
        "nuslerp_row_wise": _flag("per", False, on="column", off="row"),
    },
    "multislerp": _WEIGHT | {"normalize_weights": _flag("normalize", True)},
    "karcher": {"max_iter": Parameter("max_iter", 10, int), "tol": Parameter("tol", 1e-5)},
    "nearswap": {"t": Parameter("t")},
    "arcee_fusion": {},
    "model_stock": {"filter_wise": _flag("per", False, on="row", off="tensor")},
    "passthrough": {"scale": Parameter("scale", 1.0, per_model=True)},
    "task_arithmetic": _TASK | _summed(False),
    "ties": _TASK | _DENSITY | _elected(True) | _NOT_RESCALED,
    "dare_linear": _TASK | _DROPPED | _summed(False) | _RESCALED,
    "dare_ties": _TASK | _DROPPED | _elected(False) | _RESCALED,
    "breadcrumbs": _CRUMBS | _summed(False) | _NOT_RESCALED,
    "breadcrumbs_ties": _CRUMBS | _elected(False) | _NOT_RESCALED,
    "della": _DELLA | _elected(True) | _RESCALED,
    "della_linear": _DELLA | _summed(False) | _RESCALED,
    "sce": {"select_topk": Parameter("density", 1.0)},
}
# what mergekit's methods always do, where ours can do otherwise
ALWAYS: dict[str, dict[str, Any]] = {
    "della": {"rank": "row"},
    "della_linear": {"rank": "row"},
}
# mergekit reads these for any method; where a method has no use for one, it is left out
KNOWN = {"int8_mask", "eps", "embed_slerp"} | {name for method in METHODS.values() for name in method}
