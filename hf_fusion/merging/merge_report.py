"""The report of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion.models.fused_html import facts_table
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

    def _repr_html_(self) -> str:
        return facts_table(
            {
                "folder": self.folder,
                "method": self.recipe.method,
                "base": self.recipe.base,
                "experts": [expert.model for expert in self.recipe.experts],
                "tensors": self.tensors,
                "MB": round(self.nbytes / 1e6, 1),
                "seconds": round(self.seconds, 1),
                "warnings": self.warnings,
            }
        )


__all__ = ["MergeReport"]
