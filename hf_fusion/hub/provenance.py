"""The provenance of fused models: reads recipes, and replaces local paths in them before they are published.

A recipe names folders by their paths, so that it can be run again on this machine. For others, a folder is named by its
name and the SHA-256 of its content: ``NAME@sha256:…``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.families import FAMILIES, MEASURED
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.manifests import local_named_files
from hf_fusion.io.files import open_file, own_file
from hf_fusion.io.json_files import read_json
from hf_fusion.recipe import RECIPE_ATTRIBUTE, RECIPE_FILE, Recipe
from hf_fusion.types import CONTENT, ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# files that belong to a model, unlike its card, results and files of training
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py")
_NOT_OF_IT = (*MEASURED, "trainer_state.json", "training_args.bin")


def has_recipe(folder: str | Path) -> bool:
    """Whether `read_recipe` finds a recipe or raises an error; False for a model that was not fused."""
    folder = Path(folder)
    if (folder / RECIPE_FILE).exists() or not (folder / "config.json").exists():
        return True
    return read_json(folder / "config.json", str(folder)).get("model_type") in FAMILIES


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe of the model in a folder: from ``fusion.yaml``, or else from its config.

    Raises:
        FusionError: the folder has no recipe.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if (folder / RECIPE_FILE).exists() or not config.exists():
        return Recipe.load(folder)
    content = read_json(config, str(folder))
    if content.get("model_type") not in FAMILIES:
        raise FusionError(
            f"{folder} has no {RECIPE_FILE}, and its config.json has no recipe",
            f"copy the {RECIPE_FILE} that the model was made from into the folder",
        )
    return _recorded(FAMILIES[content["model_type"]].classes().config.from_pretrained(folder))


def recipe_from_model(model: PreTrainedModel) -> Recipe:
    """The recipe of a model, as set by `fuse` or stored in its config.

    Raises:
        FusionError: the model has no recipe.
    """
    recipe: Recipe | None = getattr(model, RECIPE_ATTRIBUTE, None)
    if recipe is not None:
        return recipe
    if model.config.model_type not in FAMILIES:
        raise FusionError("this model has no recipe", hint="pass recipe=, or create the model with hf_fusion.fuse")
    return _recorded(model.config)


def _recorded(config: PreTrainedConfig) -> Recipe:
    return Recipe.from_dict(config.to_recipe(), "config.json")


def model_files(folder: Path) -> list[str]:
    """The files of the model in a folder, as relative paths: weights, configuration, tokenizer, code."""
    root = [
        path.name
        for path in folder.iterdir()
        if path.name.endswith(_MODEL_FILES) and path.name not in _NOT_OF_IT and path.name[0] != "." and own_file(path)
    ]
    return sorted([*root, *local_named_files(folder, str(folder), code=True)])


def hash_folder(folder: str | Path) -> str:
    """``sha256:…`` of a folder's model files: the hash of ``sha256sum``'s lines for them, by name."""
    lines = hashlib.sha256()
    for name in model_files(Path(folder)):
        digest = hashlib.sha256()
        with open_file(Path(folder, name), Path(folder)) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        lines.update(f"{digest.hexdigest()}  {name}\n".encode())
    return f"{CONTENT}{lines.hexdigest()}"


def list_local_folders(recipe: Recipe) -> list[str]:
    """The local folders that a recipe names as models, without duplicates."""
    refs = [ref for name in recipe.models for ref in ModelRef.parse_pair(name) if ref]
    return list(dict.fromkeys(ref.id for ref in refs if not ref.revision and Path(ref.id).is_absolute()))


def hash_folders(folders: Sequence[str]) -> dict[str, str]:
    """Folder -> ``NAME@sha256:…``."""

    def named(path: str) -> str:
        return str(
            ModelRef(re.sub(r"[@+]", "-", Path(path).name), hash_folder(path))
        )  # @ and + have a meaning in references

    return dict(zip(folders, in_parallel(named, folders), strict=True))


def strip_paths_from_recipe(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """Replaces local paths in a recipe.

    Args:
        recipe: with paths.
        names: path -> public name; other paths (of statistics, gates) are replaced by their last component.
    """
    ids = {
        Path(path).name: ModelRef.parse_repo(name).id for path, name in names.items()
    }  # options name experts by these
    content = _replace_paths({**recipe.to_dict(), "parameters": _rename_experts(recipe.parameters, ids)}, names)
    return Recipe.from_dict({key: value for key, value in content.items() if value})


def strip_local_paths(value: object, names: Mapping[str, str]) -> Any:
    """Replaces local paths in plain JSON values, commands included; `names` as for `strip_paths_from_recipe`."""
    if isinstance(value, dict):
        command = value.get("command")
        own = {key: strip_local_paths(inner, names) for key, inner in value.items()}
        if isinstance(command, str):
            own["command"] = " ".join(_replace_paths(word, names) for word in command.split(" "))
        return own
    if isinstance(value, list):
        return [strip_local_paths(inner, names) for inner in value]
    return _replace_paths(value, names)


def _replace_paths(value: object, names: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_paths(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_paths(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    if value in names:
        return names[value]
    parts = value.split("+")
    if any(part in names for part in parts):
        return "+".join(names.get(part, part) for part in parts)
    path = Path(value)
    is_path = path.is_absolute() and "\n" not in value and (len(path.parts) > 2 or path.exists())
    return path.name if is_path else value


def _rename_experts(value: object, ids: Mapping[str, str]) -> Any:
    """Options with experts renamed, in keys and in ``default_task``."""
    if not isinstance(value, Mapping):
        return value
    own = {ids.get(key, key): _rename_experts(inner, ids) for key, inner in value.items()}
    if isinstance(task := own.get("default_task"), str):
        own["default_task"] = ids.get(task, task)
    return own
