"""What a merge tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion.recipe import Recipe


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        folder: where the merged model lies.
        recipe: what it was made of, pinned.
        tensors: how many it has.
        nbytes: bytes of its weights.
        seconds: of the merge itself, reading and writing included.
        facts: of what less than all was merged, and what is unlike what the models say; see `Plan.facts`.
        warnings: the same as sentences, and why it could not be checked whether the merged model loads.
    """

    folder: Path
    recipe: Recipe
    tensors: int
    nbytes: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict, kw_only=True)
    warnings: list[str] = field(default_factory=list, kw_only=True)


__all__ = ["MergeReport"]
