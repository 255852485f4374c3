"""Which tensor of an expert belongs to which of the merged model, and how much of every expert is merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_fusion.errors import FusionError
from hf_fusion.hub.parameter_names import build_meta_model, loaded_names
from hf_fusion.merging.engine.open_models import Model, match_names


def match_tensors(first: Model, other: Model) -> dict[str, str]:
    """The other model's tensors by the names they have in the first.

    Where names alone leave something out, both are named as transformers' loader names them: checkpoints of one class
    come in several layouts.

    Returns:
        Name in the first -> name in the other, of those that agree.
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
    """Names in the loaded model -> names in its files; empty where transformers does not know the model."""
    known = build_meta_model(model.config, model.name, len(model.entries)).model
    if known is None:
        return {}
    modules = [name for name in model.entries if "/" in name]  # sentence-transformers' own, beside the model
    named = loaded_names(known, (name for name in model.entries if "/" not in name))
    return {loaded: name for name, loaded in named.items()} | dict(zip(modules, modules, strict=True))


@dataclass(frozen=True)
class Share:
    """How much of an expert is merged.

    Attributes:
        model: the expert's name.
        merged: parameters that the merged model takes from it; of an adapter, those that it changes.
        parameters: all that it has, or changes.
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
    """Neither 0 nor 100 where it is only near to them."""
    for digits in (1, 3):
        if 0 < round(100 * share, digits) < 100:
            return f"{round(100 * share, digits):g} %"
    return "100 %" if share == 1 else "less than 0.001 %" if share < 0.5 else "nearly all"


def compute_shares(experts: Sequence[Model], merged: Sequence[set[str]]) -> list[Share]:
    """How much of every expert is merged.

    Args:
        experts: in the recipe's order.
        merged: of each, the names of its tensors that are merged.
    """
    return [
        Share(expert.name, sum(size for name, size in sizes.items() if name in own), sum(sizes.values()))
        for expert, own, sizes in zip(experts, merged, map(_sizes, experts), strict=True)
    ]


def _sizes(model: Model) -> dict[str, int]:
    """Parameters that are a model's own, by tensor."""
    names = [name for name, entry in model.entries.items() if entry.is_float]
    if model.adapter is not None:
        changed = {f"{path}.weight" for path in (*model.adapter.lora, *model.adapter.rows)} | model.adapter.saved.keys()
        names = [name for name in names if name in changed]
    return {name: math.prod(model.shape(name)) for name in names}


def refuse_unmatched(shares: Sequence[Share], first: Model) -> None:
    """Raises where nothing of an expert would be merged: no option makes a merge of that.

    Raises:
        FusionError: naming the expert.
    """
    for share in shares:
        if share.parameters and not share.merged:
            raise FusionError(
                f"nothing of {share.model} would be merged: no tensor of its {share.parameters:,} parameters fits"
                f" {first.name} by name and shape",
                "merge models of one architecture and size, or leave it out",
            )
