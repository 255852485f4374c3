"""The demos of `hf-fusion demo`: experts and data from PyPI are fused, evaluated, published and loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fusion.cli.output import Out
    from hf_fusion.demo.workspace import Workspace


def _foe(workspace: Workspace, out: Out, seed: int) -> dict[str, Any]:
    from hf_fusion.demo.foe import run

    return run(workspace, out, seed)


def _phatgoose(workspace: Workspace, out: Out, seed: int) -> dict[str, Any]:
    from hf_fusion.demo.phatgoose import run

    return run(workspace, out, seed)


def _wemoe(workspace: Workspace, out: Out, seed: int) -> dict[str, Any]:
    from hf_fusion.demo.wemoe import run

    return run(workspace, out, seed)


DEMOS: dict[str, Callable[[Workspace, Out, int], dict[str, Any]]] = {
    "foe": _foe,
    "phatgoose": _phatgoose,
    "wemoe": _wemoe,
}
"""Name of a family, as in `families.FAMILIES` → runs its demo with a seed and returns a summary for JSON."""
