"""Static merges as loaded models: `hf_fusion.fuse` for the methods of `MERGE_METHODS`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, disk_refusals, shown
from hf_fusion.hub.bases import resolve_base
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.headers import check_load_as, native_config
from hf_fusion.hub.load import in_memory, processor_of, refuse_keys
from hf_fusion.hub.lora import with_adapter
from hf_fusion.hub.manifests import local_named_files
from hf_fusion.hub.provenance import hash_folders, list_local_folders, strip_paths_from_recipe
from hf_fusion.hub.refs_to_files import recorded_base, resolve
from hf_fusion.hub.remote_code import Code, model_code, processor_class, processor_code, refuse_code, refuse_kernels
from hf_fusion.hub.silence import quiet_transformers
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.hub.task_heads import architectures, auto_class_of, model_class_of
from hf_fusion.io.files import own_file, read_file
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import INDEX
from hf_fusion.merging.engine.output import FACTS
from hf_fusion.merging.engine.processes import Processes, is_main
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_checks import check_recipe, stage_of
from hf_fusion.recipe import RECIPE_ATTRIBUTE, RECIPE_FILE, Recipe, RecipeExpert
from hf_fusion.types import Expert, ExpertInfo, ModelRef

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

logger = logging.getLogger(__name__)
HERE = {"local_files_only": True}

FILES_ATTRIBUTE = "fusion_files"
"""Attribute of a loaded merge with further files of its folder (tokenizer etc.): path -> content."""
CONTENTS_ATTRIBUTE = "fusion_contents"
"""Attribute of a loaded merge with hashes of its local inputs: path -> ``NAME@sha256:…``."""


def fuse_static(
    method: str,
    experts: Sequence[ExpertLike | RecipeExpert],
    base: str | Path | PreTrainedModel | Expert | ExpertInfo | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    api: HfApi | None = None,
    **parameters: Any,
) -> PreTrainedModel:
    """Merges models into one of their class; see `hf_fusion.fuse`.

    Args:
        method: a key of `MERGE_METHODS` that merges models.
        experts: ids, folders, `ExpertInfo`, loaded models, `Expert`, or `RecipeExpert` with parameters per expert.
        base: the model that they were fine-tuned from, in any of these forms.
        weights: each expert's ``weight``.
        dtype: of the merged weights; default: that of the checkpoints.
        device: for products and decompositions of matrices; see `merge`. The model is on the CPU.
        trust_remote_code: whether custom code of the models may run; see `load_merged`.
        api: the Hub's client.
        parameters: of the method, as in recipes.

    Returns:
        The model, with its recipe as ``fusion_recipe``.
    """
    if weights is not None and len(weights) != len(experts):
        raise FusionError(f"{len(weights)} weights for {len(experts)} experts", "pass one per expert")
    processes = Processes()
    with processes.folder() as held:
        names: dict[str, str] = {}  # temporary folder of a model in memory -> its name in recipes
        with processes.step():
            entries = [_entry(expert, held / f"expert-{i}", i, names) for i, expert in enumerate(experts)]
            start = None if base is None else _entry(base, held / "base", len(entries), names).model
        if weights is not None:
            entries = [replace(e, weight=float(w)) for e, w in zip(entries, weights, strict=True)]
        stored = str(dtype).removeprefix("torch.") if dtype is not None and dtype != "auto" else None
        recipe = Recipe(method, tuple(entries), start, parameters, stored)
        model = merged_model(recipe, device=device, trust_remote_code=trust_remote_code, api=api)
    files = getattr(model, FILES_ATTRIBUTE)
    for folder, name in names.items():  # replaces temporary folders by names
        files |= {FACTS: files[FACTS].replace(folder.encode(), name.encode())} if FACTS in files else {}
    pinned: Recipe = getattr(model, RECIPE_ATTRIBUTE)
    known = tuple(replace(expert, model=names.get(expert.model, expert.model)) for expert in pinned.experts)
    recipe = replace(pinned, experts=known, base=names.get(pinned.base or "", pinned.base))
    setattr(model, RECIPE_ATTRIBUTE, recipe)
    setattr(model, CONTENTS_ATTRIBUTE, hash_folders(list_local_folders(recipe)))
    return model


def merged_model(
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    api: HfApi | None = None,
) -> PreTrainedModel:
    """Merges into a temporary folder (in ``TMPDIR``) and loads the result, with its pinned recipe.

    Under `accelerate launch` the processes share the work, and each loads the model.
    """
    if MERGE_METHODS[recipe.method].merges == "adapters":
        raise FusionError(f"{recipe.method} gives an adapter, not a model", "hf_fusion.merge(recipe, folder)")
    if not recipe.stages:  # `merge` checks all of them
        check_recipe(recipe)
    _may_run(recipe, trust_remote_code, api)
    with Processes().folder() as held:
        report = merge(recipe, held / "merged", device=device, api=api)
        for warning in report.warnings:
            logger.warning(warning)
        return load_merged(report.folder, trust_remote_code=trust_remote_code)


def load_merged(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a static merge with its recipe, in evaluation mode.

    Args:
        folder: from `hf_fusion.merge`; an adapter is merged into its base.
        trust_remote_code: whether custom code in the folder may run, for models that transformers does not know.

    Raises:
        FusionError: there is no class for it, its code may not run, or weights are missing.
    """
    import transformers

    from hf_fusion.models.fused_checks import check_plain, check_sizes
    from hf_fusion.models.fused_loading import load_checked, read_headers, weight_files

    folder = Path(folder)
    check_snapshot(folder, str(folder))
    if (folder / ADAPTER_CONFIG).exists():  # a merged adapter: load it with its base
        return fuse_static("linear", [folder], trust_remote_code=trust_remote_code)
    config = read_json(folder / "config.json", str(folder))
    name = next(iter(architectures(config)), "no class")
    own, source, code = model_class_of(name), resolve(folder), False
    refuse_kernels(config, str(folder))
    check_plain(config)
    check_sizes(config)
    if own is None:
        if not (needed := _needed(config)):
            raise FusionError(f"{folder}: transformers has no {shown(name)}", "pip install -U transformers")
        refuse_code(source, needed, agreed=trust_remote_code)
        own, code = getattr(transformers, auto_class_of(config)), True
    else:  # compares the config with the files before memory is allocated
        shapes = {key: shape for key, (_, shape, _) in read_headers(weight_files(folder, HERE)).shapes.items()}
        promised = check_load_as(own, native_config(config, str(folder), len(shapes)), shapes)
        refuse_keys(str(folder), "missing", promised.missing)
        refuse_keys(str(folder), "of other shapes", promised.mismatched)
    with quiet_transformers():
        how = {"dtype": "auto", "trust_remote_code": code, **HERE}
        model: PreTrainedModel = load_checked(own.from_pretrained, folder, (), how, HERE, may_hold_more=True)[0]
    model.config.name_or_path = model.name_or_path = ""  # the folder may be temporary
    kept = [path.name for path in folder.iterdir() if own_file(path) and not path.name.endswith(".safetensors")]
    kept += local_named_files(folder, str(folder), code=True)
    apart = ("config.json", INDEX, RECIPE_FILE, "README.md", "results.json")
    setattr(model, RECIPE_ATTRIBUTE, Recipe.load(folder))
    model.processor = processor_of(source, agreed=trust_remote_code)
    setattr(model, FILES_ATTRIBUTE, {name: read_file(folder / name, folder) for name in kept if name not in apart})
    for method in (save_pretrained, push_to_hub):  # on the instance, since the class is transformers'
        setattr(model, method.__name__, MethodType(method, model))
    model.eval()
    return model


def save_pretrained(model: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Instance method of a loaded merge: also saves the recipe, the tokenizer and other files."""
    from hf_fusion.models.fused_saving import push_options, saved_whole

    pushed = push_options(save_directory, kwargs)
    with disk_refusals(save_directory), saved_whole(save_directory) as staging:
        type(model).save_pretrained(model, staging, *args, **kwargs)
        save_files(model, staging)
        getattr(model, RECIPE_ATTRIBUTE).save(staging / RECIPE_FILE)
    if pushed:
        model.push_to_hub(**pushed)


def push_to_hub(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Instance method of a loaded merge: pushes it with a recipe without local paths."""
    sent, recipe = copy.copy(model), getattr(model, RECIPE_ATTRIBUTE)  # the weights are shared
    known = getattr(model, CONTENTS_ATTRIBUTE, None)
    setattr(
        sent,
        RECIPE_ATTRIBUTE,
        strip_paths_from_recipe(recipe, hash_folders(list_local_folders(recipe)) if known is None else known),
    )
    setattr(sent, save_pretrained.__name__, MethodType(save_pretrained, sent))
    return type(model).push_to_hub(sent, *args, **kwargs)


def save_files(model: PreTrainedModel, folder: Path) -> None:
    """Writes the further files of a loaded merge, except those that the model has saved."""
    for name, raw in getattr(model, FILES_ATTRIBUTE, {}).items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)


def _entry(given: ExpertLike | RecipeExpert, folder: Path, number: int, names: dict[str, str]) -> RecipeExpert:
    """A model as an expert of a recipe; models in memory are saved to `folder`, and their names added to `names`."""
    if isinstance(given, RecipeExpert):
        return given
    if isinstance(given, (str, Path, ExpertInfo)):
        return RecipeExpert(given.pinned if isinstance(given, ExpertInfo) else str(given))
    expert = in_memory(given, number)
    model = expert.model if expert.adapter is None else with_adapter(expert.model, expert.adapter, expert.labels)
    for own in (model, expert.processor):
        if own is not None and is_main():
            own.save_pretrained(folder)
    names[str(folder.resolve())] = str(expert.ref)
    return RecipeExpert(str(folder))


def _may_run(recipe: Recipe, agreed: bool, api: HfApi | None) -> None:
    """Raises, before merging, if a model needs custom code that may not run."""
    for name in dict.fromkeys(stage.base or stage.experts[0].model for stage in (recipe, *recipe.stages.values())):
        if stage_of(name, recipe.stages) is None:
            _may_run_model(name, agreed, api)


def _may_run_model(name: str, agreed: bool, api: HfApi | None) -> None:
    base, model = ModelRef.parse_pair(name)
    source = resolve(base or model, api)
    if source.is_adapter:
        source = resolve_base(recorded_base(source), source, api)
    refuse_kernels(source.config, source.name)
    if not any(map(model_class_of, architectures(source.config))):
        refuse_code(source, _needed(source.config), agreed=agreed)
    if auto := processor_class(source):
        refuse_code(source, processor_code(source, auto), agreed=agreed)


def _needed(config: Mapping[str, Any]) -> list[Code]:
    """The custom code of a model class that transformers lacks, even if it knows the ``model_type``."""
    return model_code({**config, "model_type": None})
