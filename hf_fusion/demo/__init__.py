"""What `hf-fusion demo` runs: real experts and real data from PyPI, fused, measured, published and loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fusion.cli.output import Out
    from hf_fusion.demo.place import Place


def _foe(place: Place, out: Out, seed: int) -> dict[str, Any]:
    from hf_fusion.demo.foe import run

    return run(place, out, seed)


def _phatgoose(place: Place, out: Out, seed: int) -> dict[str, Any]:
    from hf_fusion.demo.phatgoose import run

    return run(place, out, seed)


def _wemoe(place: Place, out: Out, seed: int) -> dict[str, Any]:
    from hf_fusion.demo.wemoe import run

    return run(place, out, seed)


DEMOS: dict[str, Callable[[Place, Out, int], dict[str, Any]]] = {"foe": _foe, "phatgoose": _phatgoose, "wemoe": _wemoe}
"""Name of a family, as in `families.FAMILIES` → runs its demo with a seed and returns a summary for JSON."""
