"""Fuses experts into one model, saves it with its recipe, and loads it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload
from uuid import uuid4

from hf_fusion.errors import FusionError, disk_refusals, writing
from hf_fusion.families import STALE
from hf_fusion.fused_folders import (
    check_is_fused,
    explain_load_errors,
    family_class,
    read_processor,
    refuse_other_recipe,
)
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.provenance import (
    hash_folders,
    list_local_folders,
    read_recipe,
    recipe_from_model,
    strip_paths_from_recipe,
)
from hf_fusion.hub.remote_code import refuse_own_code
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.hub.task_heads import head_of_task
from hf_fusion.io.folders import recover_folder, refuse_to_replace, replace_folder
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.processes import is_main
from hf_fusion.merging.loaded_merges import fuse_static, load_merged, merged_model
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_checks import family_method
from hf_fusion.progress import phase
from hf_fusion.recipe import RECIPE_ATTRIBUTE, RECIPE_FILE, Recipe, RecipeExpert
from hf_fusion.types import Expert

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.models.modeling_foe import FoEModel
    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter
    from hf_fusion.models.modeling_wemoe import WEMoEModel

    BaseLike: TypeAlias = str | Path | PreTrainedModel


# what each family's methods return, for type checkers
@overload
def fuse(
    method: Literal["foe", "ensemble"], experts: Sequence[ExpertLike], base: BaseLike | None = None, **options: Any
) -> FoEModel: ...
@overload
def fuse(
    method: Literal["phatgoose"], experts: Sequence[ExpertLike], base: BaseLike | None = None, **options: Any
) -> PhatgooseRouter: ...
@overload
def fuse(
    method: Literal["wemoe"], experts: Sequence[ExpertLike], base: BaseLike | None = None, **options: Any
) -> WEMoEModel: ...
@overload
def fuse(
    method: str, experts: Sequence[ExpertLike | RecipeExpert], base: BaseLike | None = None, **options: Any
) -> PreTrainedModel: ...
def fuse(
    method: str,
    experts: Sequence[ExpertLike | RecipeExpert],
    base: BaseLike | None = None,
    *,
    task: str | None = None,
    dtype: torch.dtype | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    api: HfApi | None = None,
    **parameters: Any,
) -> PreTrainedModel:
    """Fuses several experts into one model.

    Under `accelerate launch` the processes share the work of a static merge, and each returns the model.

    Args:
        method: of a family, a key of `hf_fusion.families.METHODS`; or a static merging method, a key of
            `hf_fusion.merging.methods.MERGE_METHODS`.
        experts: as `load_experts` takes them; for static methods also `RecipeExpert`, with parameters per expert.
        base: the adapters' base, if not the recorded one; for methods that merge full fine-tunes, their base.
        task: pipeline tag that selects the experts' model class.
        dtype: dtype of the weights; default: that of the checkpoints.
        allow_pickle: see `load_experts`.
        trust_remote_code: see `load_experts`.
        api: the Hub's client.
        parameters: options of the method. For a static method, the parameters of its recipes, ``weights`` (one per
            expert) and ``device`` (see `merge`).

    Returns:
        The fused model; for a static method, of the class of its base or first expert. Its attribute ``fusion_recipe``
        is the recipe, with pinned commits.

    Raises:
        FusionError: an unknown method or option, or experts that cannot be loaded or fused.
    """
    if method in MERGE_METHODS:
        if task or allow_pickle:
            raise FusionError(
                f"{method} merges tensors of safetensors files, without {'task' if task else 'allow_pickle'}",
                f"omit {'task' if task else 'allow_pickle'}",
            )
        return fuse_static(
            method, experts, base, dtype=dtype, trust_remote_code=trust_remote_code, api=api, **parameters
        )
    family, sources = family_method(method, parameters), [_loadable(method, expert) for expert in experts]
    with _explained():
        if family.check:
            family.check(sources, **parameters)
    how: dict[str, Any] = {
        "dtype": dtype,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "api": api,
    }
    recorded, given = {"task": task, **parameters}, None
    if family.takes_base:
        parameters["base"] = None
        if base is not None:
            trunk = task if task and not head_of_task(task).has_labels else None  # a base may lack the experts' head
            [parameters["base"]] = load_experts([base], task=trunk, gates=False, **how)
            given, base = _named(base, parameters["base"]), parameters["base"]
    loaded = load_experts(sources, base=base, task=task, **how)
    from hf_fusion import fused_models  # noqa: F401 - registers the loaders of experts

    with _explained(), phase("Fusing"):
        model = family.build(loaded, **parameters)
    names = [_named(*pair) for pair in zip(sources, loaded, strict=True)]
    recipe = _recipe(method, names, loaded, recorded, dtype, given)
    setattr(model, RECIPE_ATTRIBUTE, recipe)
    model.config.recipe = strip_paths_from_recipe(
        recipe, hash_folders(list_local_folders(recipe))
    ).to_dict()  # saved with the model
    return model


@contextmanager
def _explained() -> Iterator[None]:
    """Turns the ValueErrors of `hf_fusion.models`, which does not import this package, into FusionErrors."""
    try:
        yield
    except ValueError as error:
        raise FusionError(str(error)) from error


def fuse_recipe(
    recipe: Recipe, *, allow_pickle: bool = False, trust_remote_code: bool = False, api: HfApi | None = None
) -> PreTrainedModel:
    """Fuses a model by a recipe; see `fuse`. `merge` writes static merges to a folder without loading them."""
    if recipe.method in MERGE_METHODS:
        return merged_model(recipe, trust_remote_code=trust_remote_code, api=api)
    if recipe.stages:
        raise FusionError(
            f"{recipe.method} takes no stages: they are for static merges", "fuse each in order, and name the folders"
        )
    parameters = dict(recipe.parameters)
    task = parameters.pop("task", None)
    method = family_method(recipe.method, parameters)
    weights = [expert.weight for expert in recipe.experts if expert.weight is not None]
    if weights and not method.takes_weights:
        raise FusionError(f"method {recipe.method} does not take weights", hint="remove weight: from the recipe")
    if weights:
        parameters["weights"] = weights
    return fuse(
        recipe.method,
        [expert.model for expert in recipe.experts],
        recipe.base,
        task=task,
        dtype=recipe.dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        api=api,
        **parameters,
    )


def save_fused(
    model: PreTrainedModel, folder: str | Path, recipe: Recipe | None = None, *, overwrite: bool = False
) -> Path:
    """Saves a fused model with its processor and ``fusion.yaml``, atomically.

    Everything is written beside the folder first and then moved into place. With ``overwrite``, files of an earlier
    save and its results are replaced; other files in the folder (a hand-written README) are kept. Under
    `accelerate launch` only the first process writes; the others do not wait for it.

    Args:
        model: from `fuse`, fitted or not.
        folder: created if missing.
        recipe: default: the model's.
        overwrite: whether to replace a model in the folder, with its results.

    Returns:
        The absolute path of the folder.

    Raises:
        FusionError: the model has no recipe, or the folder contains a model.
    """
    recipe = recipe or recipe_from_model(model)
    folder = Path(folder).resolve()
    if not is_main():
        return folder
    recover_folder(folder)
    refuse_to_replace(folder, overwrite)
    staging = folder.parent / f".{folder.name}-{uuid4().hex[:8]}"
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    try:
        with disk_refusals(folder):
            with phase(f"Writing {folder}"):
                model.save_pretrained(staging)  # includes the processor
            recipe.save(staging / RECIPE_FILE)
            replace_folder(staging, folder, STALE)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def load_fused(folder: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Recipe]:
    """Loads a model that `save_fused` or a static merge wrote, with this package's code instead of the folder's.

    Args:
        folder: contains ``fusion.yaml``, or a fused model's config with the recipe.
        trust_remote_code: whether custom code in the folder may run, for tokenizers, image processors and static merges
            that transformers does not know.

    Returns:
        The model, in evaluation mode, and its recipe.

    Raises:
        FusionError: the folder contains no fused model, a damaged one (the error names the file, the field or tensor,
            and the next step), or one that needs custom code that may not run.
    """
    folder = Path(folder)
    with explain_load_errors(folder):
        recover_folder(folder)
    check_is_fused(folder)
    with explain_load_errors(folder):
        check_snapshot(folder, str(folder))
        recipe = read_recipe(folder)
        if recipe.method in MERGE_METHODS:
            return load_merged(folder, trust_remote_code=trust_remote_code), recipe
        config = read_json(folder / "config.json", str(folder))
        model_class = family_class(folder, config, recipe)
        refuse_own_code(folder, config, agreed=trust_remote_code)
        is_whole = not config.get("base_by_reference")  # else the base is downloaded
        with phase(f"Reading {folder}"):
            where: dict[str, Any] = {"local_files_only": True} if is_whole else {}
            where["use_safetensors"] = True  # never pickles
            model = model_class.from_pretrained(folder, trust_remote_code=trust_remote_code, **where).eval()
        refuse_other_recipe(folder, recipe, model.config)
        read_processor(folder, model, trust_remote_code)
    setattr(model, RECIPE_ATTRIBUTE, recipe)
    return model, recipe


def _loadable(method: str, given: ExpertLike | RecipeExpert) -> ExpertLike:
    if isinstance(given, RecipeExpert):
        raise FusionError(
            f"{method} does not take a RecipeExpert, as for {given.model}", "pass the name of its model, and weights="
        )
    return given


def _named(given: ExpertLike, expert: Expert) -> str:
    """A reproducible reference: the id at the commit that was loaded, or the absolute folder."""
    if isinstance(given, (str, Path)) and expert.revision is None:
        return str(Path(given).resolve())
    return str(expert.ref)


def _recipe(
    method: str,
    names: Sequence[str],
    experts: Sequence[Expert],
    parameters: dict[str, Any],
    dtype: torch.dtype | str | None,
    base: str | None = None,
) -> Recipe:
    """The recipe of a fused model, with reproducible references."""
    weights = parameters.get("weights") or [None] * len(experts)
    bases = {str(e.adapter.base_ref) for e in experts if e.adapter and e.adapter.base}
    return Recipe(
        method=method,
        experts=tuple(RecipeExpert(name, weight) for name, weight in zip(names, weights, strict=True)),
        base=base or (bases.pop() if len(bases) == 1 else None),  # adapters record several bases
        parameters={key: _plain(v) for key, v in parameters.items() if key != "weights" and v is not None},
        dtype=str(dtype).removeprefix("torch.") if dtype and dtype != "auto" else None,
    )


def _plain(value: object) -> Any:
    """An option as a YAML value; folders are strings."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return str(value.resolve()) if isinstance(value, Path) else value
