"""Merges LoRA adapters of one base into one adapter that PEFT loads, without reading weights of the base."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch

from hf_fusion.errors import FusionError
from hf_fusion.families import STALE
from hf_fusion.hub.adapter_placement import place_in_files, refuse_sizes, rename_to_current
from hf_fusion.hub.bases import base_ref, warn_of_other_bases
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.download import download
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.headers import Shapes, hub_shapes, local_shapes
from hf_fusion.hub.lora import read_adapter
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.selection import pick_modules, pick_small, safe_files
from hf_fusion.io.files import own_file, read_file
from hf_fusion.io.folders import refuse_to_replace, replace_folder
from hf_fusion.merging.engine.open_models import layer_depths
from hf_fusion.merging.engine.output import explain_disk_errors
from hf_fusion.merging.merge_report import MergeReport
from hf_fusion.merging.methods.linear import shares
from hf_fusion.merging.methods.lora import Factors, lora
from hf_fusion.merging.settings import arguments_at, check_settings
from hf_fusion.recipe import RECIPE_FILE, Recipe
from hf_fusion.schema import KeyPath, parameters_of
from hf_fusion.types import Adapter, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
# keys of the first adapter's configuration that also hold for the merged one
_KEPT = ("auto_mapping", "fan_in_fan_out", "task_type")


@dataclass(frozen=True)
class AdapterReport(MergeReport):
    """The result of `merge_adapters`.

    Attributes:
        ranks: module path -> rank.
        errors: module path -> relative error ‖Σ w_i ΔW_i - ΔW‖ / ‖Σ w_i ΔW_i‖, for modules truncated to a rank.
        error: the relative error over all those modules; 0 for an exact merge.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


@dataclass(frozen=True)
class _Opened:
    """An input adapter."""

    name: str  # reproducible reference
    source: Source
    tensors: Adapter
    config: Mapping[str, Any] = field(repr=False)


def merge_adapters(
    recipe: Recipe,
    folder: str | Path,
    *,
    overwrite: bool = False,
    api: HfApi | None = None,
    record: Callable[[Recipe], Recipe] = lambda pinned: pinned,
) -> AdapterReport:
    """Merges LoRA adapters into one: Σ w_i ΔW_i, exact by concatenation or truncated; see `methods.lora.lora`.

    The adapters may differ in rank, alpha, rsLoRA, patterns and modules. Modules saved in full (PEFT's
    ``modules_to_save``: heads) are kept if they are equal in all adapters; else they become Σ w_i θ_i, which requires
    every adapter to have them and the weights to sum to 1: then it equals θ0 + Σ w_i (θ_i - θ0) for any base.

    Args:
        recipe: ``method: lora`` with adapters as experts. ``base`` names their base, if not the recorded one; its
            shapes are then read from headers. ``weight`` and ``rank`` may vary by module and layer, as other parameters
            of static methods. Weights are stored as fp32 unless ``dtype`` is set.
        folder: created if missing.
        overwrite: whether to replace an adapter in the folder.
        api: the Hub's client.
        record: gives the recipe that is saved, from the one with pinned models.

    Raises:
        FusionError: an expert is not an adapter of the form W + B A; bases, shapes or saved modules of the adapters
            differ; or a parameter is unknown or out of range.
    """
    began = time.perf_counter()
    folder = Path(folder).resolve()
    known = parameters_of(lora)
    check_settings("lora", known, recipe.parameters, KeyPath("", "parameters"))
    for expert in recipe.experts:
        check_settings("lora", known, expert.settings, KeyPath(expert.model), of_expert=True)
    if recipe.slices or recipe.tokenizer or recipe.chat_template:
        raise FusionError("adapters are merged without slices, tokenizer and chat_template", "leave them out")
    opened = _opened(recipe, api)
    for adapter in opened:
        own = adapter.source.folder.resolve() if adapter.source.folder else folder
        if own == folder or folder in own.parents or own in folder.parents:
            raise FusionError(f"the output {folder} overlaps the input {own}", "choose another --output")
    refuse_to_replace(folder, overwrite)
    base = _base(recipe, opened, api)
    opened = _in_one_layout(opened, base, bool(recipe.base), api)
    factors = _factors(recipe, opened)
    saved = _saved(recipe, opened)
    dtype = getattr(torch, recipe.dtype or "float32")
    experts = tuple(replace(e, model=o.name) for e, o in zip(recipe.experts, opened, strict=True))
    pinned = record(replace(recipe, base=base, experts=experts))
    nbytes = _write(folder, pinned, opened, factors, saved, dtype)
    cut = {path: found for path, found in factors.items() if found.norm}
    total = sum(found.norm for found in cut.values())
    return AdapterReport(
        folder,
        pinned,
        2 * len(factors) + len(saved),
        nbytes,
        time.perf_counter() - began,
        ranks={path: len(found.a) for path, found in factors.items()},
        errors={path: math.sqrt(found.lost / found.norm) for path, found in cut.items()},
        error=math.sqrt(sum(found.lost for found in cut.values()) / total) if total else 0.0,
    )


def _opened(recipe: Recipe, api: HfApi | None) -> list[_Opened]:
    """Opens all adapters, downloading missing files."""
    names = [expert.model for expert in recipe.experts]
    sources = in_parallel(lambda name: resolve(name, api), names)
    for source in sources:
        if not source.is_adapter:
            raise FusionError(
                f"{source.name} is not an adapter", "method: linear merges it with an adapter's whole model"
            )
        if WEIGHTS not in source.sizes:
            raise FusionError(f"{source.name} has no {WEIGHTS}", "only safetensors are merged: load and save it")
    for source in sources:
        if modules := pick_modules(source):
            raise FusionError(f"{source.name} has weights of a module in {modules[0]}", "method: linear merges it too")
    download([(source, [WEIGHTS, *pick_small(source, code=False)]) for source in sources], api)
    found = []
    for source in sources:
        assert source.folder is not None
        name = str(source.ref)
        adapter = read_adapter(source.folder, source.name, embeddings=True)
        if adapter.rows:
            raise FusionError(
                f"{source.name} replaces rows of {min(adapter.rows)}, which a LoRA cannot express",
                "method: linear merges it with an adapter's whole model",
            )
        if adapter.biases:
            raise FusionError(
                f"{source.name} changes the bias of {min(adapter.biases)}, which merged adapters cannot express",
                "method: linear merges it with an adapter's whole model",
            )
        found.append(_Opened(name, source, adapter, source.adapter))
    return found


def _base(recipe: Recipe, opened: Sequence[_Opened], api: HfApi | None) -> str | None:
    """The common base of all adapters, ``owner/name[@revision]``: the recipe's, if it fits them, or the recorded one.

    Raises:
        FusionError: they record several bases, or do not fit the recipe's.
    """
    if recipe.base:
        base = resolve(recipe.base, api)
        if base.is_adapter:
            raise FusionError(
                f"{recipe.base} is an adapter, not the base of one", "base: owner/name of the whole model"
            )
        name = str(base.ref)
        shapes = {} if base.config.get("quantization_config") else _shapes(base)  # packed weights have other shapes
        for adapter in opened if shapes else ():
            settings = adapter.config
            placed = place_in_files(adapter.tensors, settings, base.config, shapes, called=adapter.name, base=name)
            refuse_sizes(placed, shapes, adapter.name, name)
        warn_of_other_bases((adapter.source, base_ref(base)) for adapter in opened)
        return name
    recorded = {o.tensors.base: o.name for o in opened}
    if len(recorded) > 1:
        listed = ", ".join(f"{name} of {base or 'nothing'}" for base, name in recorded.items())
        raise FusionError(f"the adapters record several bases: {listed}", "name the common one: base: owner/name")
    first = opened[0].tensors.base_ref
    return str(first) if first else None


def _in_one_layout(opened: list[_Opened], base: str | None, is_known: bool, api: HfApi | None) -> list[_Opened]:
    """Renames the modules of adapters from different transformers versions to those of the installed one.

    The base's configuration is only read if the recipe names the base, or if adapters have no module name in common;
    without it, paths are unchanged.
    """
    kinds = [{re.sub(r"\.\d+(?=\.)", ".*", path) for path in o.tensors.lora} for o in opened]
    if not base or not (is_known or any(not kinds[0] & kind for kind in kinds)):
        return opened
    try:
        config = resolve(base, api).config
    except FusionError as error:
        logger.debug("%s", error)
        return opened
    return [replace(o, tensors=rename_to_current(o.tensors, o.config, config, o.name)) for o in opened]


def _shapes(base: Source) -> Shapes:
    """Tensor shapes of a base, from the headers of its safetensors."""
    files = [file for file in safe_files(base) if file.endswith(".safetensors")]
    return local_shapes(base.folder, files) if base.folder and base.is_local else hub_shapes(base, files)


def _factors(recipe: Recipe, opened: Sequence[_Opened]) -> dict[str, Factors]:
    """Module path -> merged factors, for every module that an adapter adapts."""
    paths = list(dict.fromkeys(path for o in opened for path in o.tensors.lora))
    own = [[expert.settings] for expert in recipe.experts]
    merged = {}
    for name, depth in layer_depths({f"{path}.weight": None for path in paths}).items():
        path = name.removesuffix(".weight")
        pairs = [o.tensors.lora.get(path) for o in opened]
        sizes = {o.name: [p[1].shape[0], p[0].shape[1]] for o, p in zip(opened, pairs, strict=True) if p}
        if len({tuple(size) for size in sizes.values()}) > 1:
            listed = ", ".join(f"{size} in {adapter}" for adapter, size in sizes.items())
            raise FusionError(f"{path} has different sizes [out, in]: {listed}: the adapters have different bases")
        merged[path] = lora(pairs, **arguments_at(parameters_of(lora), [recipe.parameters], own, name, depth))
    return merged


def _saved(recipe: Recipe, opened: Sequence[_Opened]) -> dict[str, torch.Tensor]:
    """Merged tensors that adapters saved in full, by parameter name in the base."""
    names = dict.fromkeys(name for o in opened for name in o.tensors.saved)
    own = [[expert.settings] for expert in recipe.experts]
    found = {}
    for name, depth in layer_depths(names).items():
        tensors = [o.tensors.saved.get(name) for o in opened]
        beneath = [name.removesuffix(".weight") in o.tensors.lora for o in opened]
        if None in tensors and all(under or own is None for under, own in zip(beneath, tensors, strict=True)):
            continue  # the base's weight, which PEFT saves with a LoRA on embeddings or a head
        if lacking := [o.name for o, tensor in zip(opened, tensors, strict=True) if tensor is None]:
            has = next(o.name for o, tensor in zip(opened, tensors, strict=True) if tensor is not None)
            raise FusionError(f"{has} saves {name} in full, {lacking[0]} does not", "leave one of them out")
        given = [tensor for tensor in tensors if tensor is not None]
        if shapes := {str(list(tensor.shape)) for tensor in given} - {str(list(given[0].shape))}:
            raise FusionError(f"{name}, which the adapters save in full, is {list(given[0].shape)} and {min(shapes)}")
        if all(torch.equal(tensor, given[0]) for tensor in given):
            found[name] = given[0]
            continue
        arguments = arguments_at(parameters_of(lora), [recipe.parameters], own, name, depth)
        weights = shares(arguments["weight"], arguments["normalize"])
        if abs(sum(weights) - 1) > 1e-6:
            raise FusionError(
                f"the adapters save different values of {name}, and their weights sum to {sum(weights):g}, not 1: the"
                " value of the base would be needed, which is not read",
                "set the parameter normalize: true, or weights that sum to 1",
            )
        found[name] = sum((t.double() * w for t, w in zip(given, weights, strict=True)), torch.zeros(())).float()
    return found


def _write(
    folder: Path,
    recipe: Recipe,
    opened: Sequence[_Opened],
    factors: Mapping[str, Factors],
    saved: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> int:
    """Writes the adapter atomically, and returns the bytes of its weights."""
    from safetensors.torch import save_file

    tensors = {}
    for path, found in factors.items():
        a, b, names = found.a, found.b, ("lora_A.weight", "lora_B.weight")
        if any(path in o.tensors.embeddings for o in opened):  # which PEFT stores transposed
            a, b, names = b.t(), a.t(), ("lora_embedding_A", "lora_embedding_B")
        for name_of_half, half in zip(names, (a, b), strict=True):
            tensors[f"base_model.model.{path}.{name_of_half}"] = half.to(dtype).contiguous()
    for name, tensor in saved.items():
        module, _, own = name.rpartition(".")
        wrapped = ".base_layer" if module in factors else ""  # a head with a LoRA on it
        tensors[f"base_model.model.{module}{wrapped}.{own}"] = tensor.to(dtype).contiguous()
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise FusionError(f"{broken} becomes NaN or Inf in this merge", "choose smaller weights, or dtype: float32")
    staging_folder = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    with explain_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging_folder.mkdir()
    try:
        with explain_disk_errors(folder.parent):
            first = opened[0].source
            for file in pick_small(first, code=False):
                if (
                    file not in (ADAPTER_CONFIG, RECIPE_FILE)
                    and first.folder is not None
                    and own_file(first.folder / file, first.folder)
                ):
                    (staging_folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (staging_folder / file).write_bytes(read_file(first.folder / file, first.folder))
            config = _config(recipe, opened, {path: len(found.a) for path, found in factors.items()})
            (staging_folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, staging_folder / WEIGHTS, metadata={"format": "pt"})
            recipe.save(staging_folder / RECIPE_FILE)
            read_adapter(staging_folder, str(folder), embeddings=True)  # checks that config and weights agree
            replace_folder(staging_folder, folder, STALE)
    finally:
        shutil.rmtree(staging_folder, ignore_errors=True)
    return sum(tensor.nbytes for tensor in tensors.values())


def rank_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The part of ``adapter_config.json`` that says which modules are adapted; alpha = rank, since B has the scaling.

    Args:
        ranks: full path of a module -> its rank.
    """
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(path)}$": own for path, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }


def _config(recipe: Recipe, opened: Sequence[_Opened], ranks: Mapping[str, int]) -> dict[str, Any]:
    """``adapter_config.json``."""
    first = opened[0].config
    base = ModelRef.parse(recipe.base) if recipe.base else None
    modules = {module for o in opened for module in o.config.get("modules_to_save") or ()}
    if modules and any(o.config.get("ensure_weight_tying") for o in opened):  # both tied tensors are stored
        modules |= {name.rpartition(".")[0] for o in opened for name in o.tensors.saved}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base.id if base else None,
        "revision": base.revision if base else None,
        "inference_mode": True,
        **rank_config(ranks),
        "modules_to_save": sorted(modules) or None,
        **{key: first[key] for key in _KEPT if key in first},
    }
