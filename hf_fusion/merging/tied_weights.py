"""Heads that are tied to embeddings: which models have one of their own, and what becomes of both kinds in one merge.

A tied model stores one tensor for two places. An adapter that trains one of the places alone unties them, since PEFT
leaves the other as the base has it; so does a merge with a model that has a head of its own. The merged model then
stores both, and its ``config.json`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_fusion.errors import FusionError
from hf_fusion.hub.heads import architectures
from hf_fusion.hub.parameter_names import build_meta_model, loaded_names
from hf_fusion.merging.engine.checkpoint import OpenFiles, TensorEntry

if TYPE_CHECKING:
    from hf_fusion.merging.engine.open_models import Model
    from hf_fusion.recipe import Recipe
    from hf_fusion.types import Adapter

_COMPARED = 1 << 22  # bytes at a time


def find_tied_pairs(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """What a model ties: name of a tensor -> the stored tensor that it is tied to, by their names in its files.

    Args:
        config: content of its ``config.json``.
        name: what errors call it.
        entries: its tensors.

    Returns:
        Nothing where it ties nothing, or transformers does not know it.
    """
    promise = build_meta_model(config, name, len(entries))
    if promise.model is None or not promise.tied:
        return {}
    stored = {loaded: own for own, loaded in loaded_names(promise.model, entries).items()}
    pairs = {}
    for target, source in promise.tied.items():
        if source in stored:
            pairs[stored.get(target, target)] = stored[source]
        elif target in stored:  # the loader takes what is there
            pairs[source] = stored[target]
    return pairs


def missing_tied_entries(model: Model) -> dict[str, TensorEntry]:
    """What a model ties and does not store, as further tensors at the place of those that it stores."""
    pairs = find_tied_pairs(model.config, model.name, model.entries)
    return {
        target: replace(model.entries[source], name=target)
        for target, source in pairs.items()
        if target not in model.entries
    }


def drop_tied_copies(model: Model, added: Mapping[str, TensorEntry]) -> Model:
    """An adapter's model, without the tied tensors that were `added` to its base where it leaves them tied."""
    adapter, pairs = model.adapter, find_tied_pairs(model.config, model.name, model.entries)
    if adapter is None or not all(target in model.entries for target in added):
        return model
    if any(not _is_same(adapter, target, source) for target, source in pairs.items() if target in added):
        return model
    entries = {name: entry for name, entry in model.entries.items() if name not in added}
    paths = {name.removesuffix(".weight") for name in added}
    lora = {path: pair for path, pair in adapter.lora.items() if path not in paths}
    saved = {name: tensor for name, tensor in adapter.saved.items() if name not in added}
    return replace(model, entries=entries, adapter=replace(adapter, lora=lora, saved=saved))


def _is_same(adapter: Adapter, target: str, source: str) -> bool:
    """Whether an adapter does to one tensor what it does to the other."""
    one, other = adapter.saved.get(target), adapter.saved.get(source)
    if (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other)):
        return False
    first, second = (adapter.lora.get(name.removesuffix(".weight")) for name in (target, source))
    if first is None or second is None:
        return first is second
    return all(torch.equal(half, their) for half, their in zip(first, second, strict=True))


@dataclass(frozen=True)
class TiedHeads:
    """Models that are merged, all of them tied or all untied.

    Attributes:
        base: the base, where there is one.
        experts: in the recipe's order.
        untied: whether the merged model is untied, though the first model's configuration ties.
        note: what there is to tell of that; "" where there is nothing.
    """

    base: Model | None
    experts: list[Model]
    untied: bool = False
    note: str = ""


def align_tied_heads(recipe: Recipe, base: Model | None, experts: Sequence[Model]) -> TiedHeads:
    """Unties models where one of them has a head of its own, so that there is something to merge it with.

    An adapter that unties its base has that done unasked, since nothing else is what it was trained for. Where a full
    model has a head of its own and another is tied, the parameter ``untie`` asks for it, and ``mismatch`` gives it up.

    Raises:
        FusionError: tied models meet untied ones, and the recipe does not say what to do about it.
    """
    unique = list({id(model): model for model in [*([base] if base else []), *experts]}.values())
    pairs = {id(model): find_tied_pairs(model.config, model.name, model.entries) for model in unique}
    targets = {target for own in pairs.values() for target in own}
    if not targets:
        return TiedHeads(base, list(experts))
    kinds = [architectures(model.config) for model in unique if pairs[id(model)]]
    unique = [model for model in unique if architectures(model.config) in kinds]  # others do not fit anyway
    stored = {id(model): {target for target in targets if target in model.entries} for model in unique}
    untied = [model for model in unique if stored[id(model)] and not _stores_copies(model, pairs[id(model)])]
    tied = [model for model in unique if pairs[id(model)] and model not in untied]
    wanted = bool(recipe.parameters.get("untie"))
    if not untied and not wanted:
        has_copies = {bool(stored[id(model)]) for model in tied}
        changed = {id(m): _without(m, stored[id(m)]) for m in tied} if len(has_copies) > 1 else {}
        return _replaced(base, experts, changed)
    by_adapters = all(model.adapter is not None and pairs[id(model)] for model in untied)
    if untied and tied and not wanted and not by_adapters:
        if recipe.parameters.get("mismatch"):
            return TiedHeads(base, list(experts))
        target = min(stored[id(untied[0])])
        raise FusionError(
            f"{untied[0].name} has a {target} of its own, {tied[0].name} ties it to {pairs[id(tied[0])][target]}",
            "set the parameter untie to true: the merged model has a head of its own; or mismatch to skip: models"
            " without a head leave it as the first has it, and a tied first model stays tied",
        )
    changed = {id(model): _untied(model, pairs[id(model)]) for model in tied}
    first = base or experts[0]
    note = ""
    if pairs[id(first)]:
        target, source = next(iter(pairs[id(first)].items()))
        reason = f": {untied[0].name} has both" if untied and not wanted else ""
        note = f"the merged model has a {target} of its own, which {first.name} ties to {source}{reason}"
    return replace(_replaced(base, experts, changed), untied=bool(pairs[id(first)]), note=note)


def _replaced(base: Model | None, experts: Sequence[Model], changed: Mapping[int, Model]) -> TiedHeads:
    return TiedHeads(base and changed.get(id(base), base), [changed.get(id(expert), expert) for expert in experts])


def _untied(model: Model, pairs: Mapping[str, str]) -> Model:
    """A tied model with all tensors that it ties."""
    added = missing_tied_entries(model)
    if (adapter := model.adapter) is None:
        return replace(model, entries=model.entries | added)
    saved, lora, rows = dict(adapter.saved), dict(adapter.lora), dict(adapter.rows)
    for target in added:
        source = pairs[target]
        path, other = (name.removesuffix(".weight") for name in (target, source))
        saved |= {target: saved[source]} if source in saved else {}
        lora |= {path: lora[other]} if other in lora else {}
        rows |= {path: rows[other]} if other in rows else {}
    return replace(model, entries=model.entries | added, adapter=replace(adapter, lora=lora, saved=saved, rows=rows))


def _without(model: Model, names: set[str]) -> Model:
    return replace(model, entries={name: entry for name, entry in model.entries.items() if name not in names})


def _stores_copies(model: Model, pairs: Mapping[str, str]) -> bool:
    """Whether all that a model stores of what it ties is a copy of what it is tied to."""
    if not pairs or (model.adapter and any(not _is_same(model.adapter, *pair) for pair in pairs.items())):
        return False
    files = OpenFiles()
    try:
        return all(
            _are_equal(model.entries[target], model.entries[source], files)
            for target, source in pairs.items()
            if target in model.entries
        )
    finally:
        files.close()


def _are_equal(one: TensorEntry, other: TensorEntry, files: OpenFiles) -> bool:
    """Whether two stored tensors are the same, byte for byte."""
    if (one.file, one.start) == (other.file, other.start):
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = max(1, _COMPARED // one.itemsize)
    for start in range(0, one.numel, step):
        size = min(step, one.numel - start) * one.itemsize
        first, second = np.empty(size, np.uint8), np.empty(size, np.uint8)
        files.read(one, start, first)
        files.read(other, start, second)
        if not np.array_equal(first, second):
            return False
    return True


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that ties no head, here and in its nested parts.

    That of an encoder and decoder stays as it is: some of them scale by it what the head gets, and the loader leaves
    stored tensors apart that are not the same.
    """
    if config.get("is_encoder_decoder"):
        return dict(config)
    changed = {
        key: untie_config(value) if isinstance(value, dict) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    }
    return changed | {"tie_word_embeddings": False}
