"""Merges models with tied heads (shared with embeddings) and with separate heads.

A tied model stores one tensor for two parameters. An adapter that trains only one of them unties them, since PEFT keeps
the base's value for the other; so does a merge with a model that has a separate head. The merged model then stores both
tensors, and its ``config.json`` sets ``tie_word_embeddings`` to false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_fusion.errors import FusionError
from hf_fusion.hub.parameter_names import build_meta_model, loaded_names
from hf_fusion.hub.task_heads import architectures
from hf_fusion.merging.engine.checkpoint import OpenFiles, TensorEntry

if TYPE_CHECKING:
    from hf_fusion.merging.engine.open_models import Model
    from hf_fusion.recipe import Recipe
    from hf_fusion.types import Adapter

_COMPARED = 1 << 22  # bytes compared at once


def find_tied_pairs(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Tied tensors of a model: name -> name of the stored tensor that it is tied to, as in its files.

    Args:
        config: content of its ``config.json``.
        name: of the model, for errors.
        entries: its tensors.

    Returns:
        Empty if it has no tied tensors, or transformers does not know it.
    """
    promise = build_meta_model(config, name, len(entries))
    if promise.model is None or not promise.tied:
        return {}
    stored = {loaded: name for name, loaded in loaded_names(promise.model, entries).items()}
    pairs = {}
    for target, source in promise.tied.items():
        if source in stored:
            pairs[stored.get(target, target)] = stored[source]
        elif target in stored:  # the loader uses the one that is stored
            pairs[source] = stored[target]
    return pairs


def missing_tied_entries(model: Model) -> dict[str, TensorEntry]:
    """Entries for tied tensors that a model does not store, at the location of those that it stores."""
    pairs = find_tied_pairs(model.config, model.name, model.entries)
    return {
        target: replace(model.entries[source], name=target)
        for target, source in pairs.items()
        if target not in model.entries
    }


def drop_tied_copies(model: Model, added: Mapping[str, TensorEntry]) -> Model:
    """An adapter's model without the tied tensors that were `added` to its base, if the adapter keeps them tied."""
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
    """Whether an adapter changes both tensors in the same way."""
    one, other = adapter.saved.get(target), adapter.saved.get(source)
    if (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other)):
        return False
    first, second = (adapter.lora.get(name.removesuffix(".weight")) for name in (target, source))
    if first is None or second is None:
        return first is second
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class TiedHeads:
    """The models of a merge, all of them tied or all untied.

    Attributes:
        base: the base, or None.
        experts: in the recipe's order.
        untied: whether the merged model is untied although the first model's configuration ties.
        note: for the report, or "".
    """

    base: Model | None
    experts: list[Model]
    untied: bool = False
    note: str = ""


def align_tied_heads(recipe: Recipe, base: Model | None, experts: Sequence[Model]) -> TiedHeads:
    """Unties tied models if another model has a separate head, so that the heads can be merged.

    Adapters that untie their base cause this without a parameter. If a full model has a separate head and another is
    tied, the recipe must set the parameter ``untie``, or ``mismatch`` to leave the head out.

    Raises:
        FusionError: tied and untied models are combined, and the recipe has neither parameter.
    """
    unique = list({id(model): model for model in [*([base] if base else []), *experts]}.values())
    pairs = {id(model): find_tied_pairs(model.config, model.name, model.entries) for model in unique}
    targets = {target for tied_to in pairs.values() for target in tied_to}
    if not targets:
        return TiedHeads(base, list(experts))
    kinds = [architectures(model.config) for model in unique if pairs[id(model)]]
    unique = [model for model in unique if architectures(model.config) in kinds]  # others cannot be merged anyway
    stored = {id(model): {target for target in targets if target in model.entries} for model in unique}
    untied = [model for model in unique if stored[id(model)] and not _stores_copies(model, pairs[id(model)])]
    tied = [model for model in unique if pairs[id(model)] and model not in untied]
    is_requested = bool(recipe.parameters.get("untie"))
    if not untied and not is_requested:
        has_copies = {bool(stored[id(model)]) for model in tied}
        changed = {id(m): _without(m, stored[id(m)]) for m in tied} if len(has_copies) > 1 else {}
        return _replaced(base, experts, changed)
    by_adapters = all(model.adapter is not None and pairs[id(model)] for model in untied)
    if untied and tied and not is_requested and not by_adapters:
        if recipe.parameters.get("mismatch"):
            return TiedHeads(base, list(experts))
        target = min(stored[id(untied[0])])
        raise FusionError(
            f"{untied[0].name} has a separate {target}, {tied[0].name} ties it to {pairs[id(tied[0])][target]}",
            "set the parameter untie to true: the merged model gets a separate head; or mismatch to skip: models"
            " without a head are left out of it, and a tied first model stays tied",
        )
    changed = {id(model): _untied(model, pairs[id(model)]) for model in tied}
    first = base or experts[0]
    note = ""
    if pairs[id(first)]:
        target, source = next(iter(pairs[id(first)].items()))
        reason = f": {untied[0].name} has both" if untied and not is_requested else ""
        note = f"the merged model has a separate {target}, which {first.name} ties to {source}{reason}"
    return replace(_replaced(base, experts, changed), untied=bool(pairs[id(first)]), note=note)


def _replaced(base: Model | None, experts: Sequence[Model], changed: Mapping[int, Model]) -> TiedHeads:
    return TiedHeads(base and changed.get(id(base), base), [changed.get(id(expert), expert) for expert in experts])


def _untied(model: Model, pairs: Mapping[str, str]) -> Model:
    """A tied model with separate entries for all tied tensors."""
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
    """Whether all tied tensors that a model stores are copies."""
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
    """Whether two stored tensors are equal, byte for byte."""
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
    """A configuration with ``tie_word_embeddings`` false, also in nested configurations.

    Unchanged for encoder-decoder models: some scale the head's input by this setting, and the loader does not tie
    stored tensors that differ.
    """
    if config.get("is_encoder_decoder"):
        return dict(config)
    changed = {
        key: untie_config(value) if isinstance(value, dict) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    }
    return changed | {"tie_word_embeddings": False}
