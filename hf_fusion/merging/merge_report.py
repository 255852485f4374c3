"""The report of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion.recipe import Recipe


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        folder: of the merged model.
        recipe: with pinned commits.
        tensors: number of merged tensors.
        nbytes: bytes of the merged weights.
        seconds: duration, including reading and writing.
        facts: experts that were merged only in part, and notes; see `Plan.facts`.
        warnings: the facts as sentences, and why loading could not be checked.
    """

    folder: Path
    recipe: Recipe
    tensors: int
    nbytes: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict, kw_only=True)
    warnings: list[str] = field(default_factory=list, kw_only=True)


__all__ = ["MergeReport"]
