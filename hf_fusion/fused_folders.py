"""Checks of the folders that `load_fused` reads, with an explanation of what else a folder contains."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import LocalEntryNotFoundError

from hf_fusion.errors import FusionError, is_fault, one_line, shown, suggestion
from hf_fusion.extras import MissingLibraryError
from hf_fusion.families import METHODS, family_of
from hf_fusion.hub.formats import IMAGE_FILES, PROCESSOR_FILES
from hf_fusion.hub.load import processor_of
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.task_heads import architectures
from hf_fusion.merging.methods import MERGE_METHODS, METHODS_LISTING
from hf_fusion.models.fused_checks import NewerFormatError
from hf_fusion.recipe import RECIPE_FILE, Recipe
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_fusion.models.fused import FusedPreTrainedModel
    from hf_fusion.models.fused_config import FusedConfig

_AGAIN = f"download the model again, or make it again: hf-fusion fuse {RECIPE_FILE} --output DIR"
_HINTS = (
    (NewerFormatError, None),  # its message has the next step
    (LocalEntryNotFoundError, "its base is downloaded from the Hub: check the network and HF_ENDPOINT"),
)
_OTHER_RECIPE = f"copy the {RECIPE_FILE} that the model was made from into the folder"


def check_is_fused(folder: Path) -> None:
    """Checks that a folder may contain a fused model.

    Raises:
        FusionError: it does not; says what the path is instead, and what to do with it.
    """
    name = shown(str(folder))
    try:
        kind = folder.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        ref = ModelRef.parse_repo(str(folder))
        is_id = ref.is_repo and "/" in ref.id
        hint = f"download it: hf download {ref.repo} --local-dir DIR" if is_id else "check the path"
        raise FusionError(f"there is no folder {name} ({one_line(error)})", hint) from None
    if not stat.S_ISDIR(kind):
        raise FusionError(f"{name} is a file, not the folder of a fused model", f"name the folder: {folder.parent}")
    try:
        files = {path.name: path for path in folder.iterdir()}
        odd = [file for file, path in files.items() if path.exists() and not (path.is_file() or path.is_dir())]
    except OSError as error:
        raise FusionError(f"{name} cannot be read ({one_line(error)})", "check its permissions") from None
    if odd:
        raise FusionError(f"{name}: {shown(odd[0])} is a pipe or a device, not a file", "remove it from the folder")
    if not files:
        raise FusionError(f"{name} is empty", "save a fused model to it: hf-fusion fuse --help")
    if "config.json" in files or {"adapter_config.json", RECIPE_FILE} <= files.keys():
        return
    if "adapter_config.json" in files:
        raise FusionError(
            f"{name} contains a LoRA adapter, not a fused model",
            f"fuse it with others: hf-fusion fuse --method phatgoose --experts {folder} … --output DIR; "
            "or load it alone: hf_fusion.load_experts",
        )
    if RECIPE_FILE in files:
        raise FusionError(
            f"{name} contains a recipe, but not its model: config.json is missing",
            f"make the model: hf-fusion fuse {folder / RECIPE_FILE} --output DIR",
        )
    raise FusionError(f"{name} contains no model: config.json is missing", "download the model again, or make it again")


def family_class(folder: Path, config: dict[str, Any], recipe: Recipe) -> type[PreTrainedModel]:
    """The package's class for a fused model.

    Args:
        folder: for messages.
        config: content of its ``config.json``.
        recipe: of the model.

    Raises:
        FusionError: recipe and config belong to different models, or the class is unknown.
    """
    if recipe.method not in METHODS:
        known = [*METHODS, *MERGE_METHODS]
        close = suggestion(recipe.method, known, METHODS_LISTING)
        hint = f"{close}; if a newer hf_fusion made the model: pip install -U hf_fusion"
        raise FusionError(f"{folder} was made by the unknown method {shown(recipe.method)}", hint)
    family = family_of(recipe.method)
    if config.get("model_type") != family.name:
        what = f"{RECIPE_FILE} says {recipe.method}, but config.json says {shown(config.get('model_type'))}"
        raise FusionError(f"{folder}: {what}; they belong to different models", _OTHER_RECIPE)
    name, classes = next(iter(architectures(config)), ""), family.classes()
    for found in (classes.model, classes.generation):
        if found.__name__ == name:
            return found
    raise FusionError(f"{folder}: architectures in config.json is {shown(name)}, which is not a class of {family.name}")


def refuse_other_recipe(folder: Path, recipe: Recipe, config: FusedConfig) -> None:
    """Raises if recipe and config differ in their number of experts."""
    if len(recipe.experts) != config.num_experts:
        what = f"{RECIPE_FILE} names {len(recipe.experts)} experts, but config.json names {config.num_experts}"
        raise FusionError(f"{folder}: {what}; they belong to different models", _OTHER_RECIPE)


def read_processor(folder: Path, model: FusedPreTrainedModel, agreed: bool) -> None:
    """Loads a model's tokenizer or image processor eagerly, so that errors are raised here.

    Args:
        folder: of the model.
        model: as loaded; gets the processor.
        agreed: whether custom code may run.

    Raises:
        FusionError: the processor's files cannot be read.
    """
    if any((folder / file).exists() for file in PROCESSOR_FILES + IMAGE_FILES) and model.processor is None:
        model._processor = processor_of(resolve(folder), agreed=agreed)


@contextmanager
def explain_load_errors(folder: Path) -> Iterator[None]:
    """Turns any error in reading a folder into a FusionError that names it and the next step."""
    try:
        yield
    except FusionError:
        raise
    except BaseException as error:  # a damaged folder may raise anything
        if not is_fault(error):
            raise
        if isinstance(error, ImportError):
            raise MissingLibraryError(
                f"{folder} needs a library that cannot be imported: {one_line(error)}", "install the library"
            ) from error
        text = one_line(error)
        reason = text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
        hint = next((hint for each in _causes(error) for kind, hint in _HINTS if isinstance(each, kind)), _AGAIN)
        raise FusionError(reason if str(folder) in reason else f"{folder} cannot be loaded: {reason}", hint) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes and contexts: loading a config wraps the errors of its checks."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
