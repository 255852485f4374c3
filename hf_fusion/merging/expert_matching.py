"""Matches experts' tensors with the merged model's, and computes the merged share of every expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_fusion.errors import FusionError
from hf_fusion.hub.parameter_names import build_meta_model, loaded_names
from hf_fusion.merging.engine.open_models import Model, match_names


def match_tensors(first: Model, other: Model) -> dict[str, str]:
    """Maps tensor names of a model to those of another.

    If stored names leave tensors unmatched, the names of transformers' loader are used: checkpoints of one class exist
    in several layouts.

    Returns:
        Name in the first -> name in the other, for tensors that match.
    """
    found = match_names(first.entries, other.entries)
    if len(found) in (len(first.entries), len(other.entries)):
        return found
    sides = [_by_loaded_name(model) for model in (first, other)]
    if not all(sides):
        return found
    more = {sides[0][name]: sides[1][own] for name, own in match_names(*sides).items()}
    return more if len(more) > len(found) else found


def _by_loaded_name(model: Model) -> dict[str, str]:
    """Name in the loaded model -> name in its files; empty if transformers does not know the model."""
    known = build_meta_model(model.config, model.name, len(model.entries)).model
    if known is None:
        return {}
    modules = [name for name in model.entries if "/" in name]  # of sentence-transformers' modules
    named = loaded_names(known, (name for name in model.entries if "/" not in name))
    return {loaded: name for name, loaded in named.items()} | dict(zip(modules, modules, strict=True))


@dataclass(frozen=True)
class Share:
    """The share of an expert that is merged.

    Attributes:
        model: name of the expert.
        merged: number of its parameters that are merged; for an adapter, of those that it changes.
        parameters: number of its parameters; for an adapter, of those that it changes.
    """

    model: str
    merged: int
    parameters: int

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self.merged / self.parameters if self.parameters else 1.0

    def __str__(self) -> str:
        return f"{_percent(self.value)} of {self.model} is merged ({self.merged:,} of {self.parameters:,} parameters)"


def _percent(share: float) -> str:
    """Percentage, rounded without reaching 0 or 100."""
    for digits in (1, 3):
        if 0 < round(100 * share, digits) < 100:
            return f"{round(100 * share, digits):g} %"
    return "100 %" if share == 1 else "less than 0.001 %" if share < 0.5 else "nearly all"


def compute_shares(experts: Sequence[Model], merged: Sequence[set[str]]) -> list[Share]:
    """The merged share of every expert.

    Args:
        experts: in the recipe's order.
        merged: names of the merged tensors of each.
    """
    return [
        Share(expert.name, sum(size for name, size in sizes.items() if name in own), sum(sizes.values()))
        for expert, own, sizes in zip(experts, merged, map(_sizes, experts), strict=True)
    ]


def _sizes(model: Model) -> dict[str, int]:
    """Number of parameters by tensor; for an adapter, only of tensors that it changes."""
    names = [name for name, entry in model.entries.items() if entry.is_float]
    if model.adapter is not None:
        changed = {f"{path}.weight" for path in (*model.adapter.lora, *model.adapter.rows)} | model.adapter.saved.keys()
        changed |= {f"{path}.bias" for path in model.adapter.biases}
        names = [name for name in names if name in changed]
    return {name: math.prod(model.shape(name)) for name in names}


def refuse_unmatched(shares: Sequence[Share], first: Model) -> None:
    """Raises if no tensor of an expert would be merged.

    Raises:
        FusionError: naming the expert.
    """
    for share in shares:
        if share.parameters and not share.merged:
            raise FusionError(
                f"{share.model} would not be merged: no tensor of its {share.parameters:,} parameters matches"
                f" {first.name} by name and shape",
                "merge models of one architecture and size, or leave it out",
            )
