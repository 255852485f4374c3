"""Reads recipe files in three formats: this package's, mergekit's and mergekit-moe's; several stages in one file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hf_fusion.errors import FusionError, shown
from hf_fusion.io.yaml_files import read_documents
from hf_fusion.merging.mergekit.moe import from_mergekit_moe
from hf_fusion.merging.mergekit.recipes import from_mergekit
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_checks import check_parameters, family_method, stage_of
from hf_fusion.recipe import Recipe, recipe_file

# keys that a recipe of mergekit has and ours has not
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A stage's name, which is also that of its folder."""
MERGEKIT = {"merge_method", "models", "base_model", "modules"}


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe: ``fusion.yaml`` or a recipe of mergekit or mergekit-moe, told apart by their keys.

    A file of several YAML documents is one recipe of several stages, as for mergekit-multi: each document has a
    ``name``, by which others use its result. The recipe is the one without a name, or else the last that no other uses.

    Args:
        path: a file, or a folder that holds ``fusion.yaml``.

    Returns:
        The recipe, as `merge` and `fuse_recipe` take it.

    Raises:
        FusionError: naming the file, the key and the reason.
    """
    path = recipe_file(path)
    documents = read_documents(path)
    if len(documents) < 2:
        return recipe_of(documents[0] if documents else None, path)
    stages: dict[str | None, Recipe] = {}
    for document in documents:
        if document is None:  # after a last line of dashes
            continue
        name = document.get("name") if isinstance(document, Mapping) else None
        if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
            raise FusionError(f"{path}: {shown(name)} is not the name of a stage", "use letters, digits, - and _")
        if name in stages:
            called = "have no name" if name is None else f"are called {name}"
            raise FusionError(f"{path}: two documents {called}", "name each but the last by name: NAME")
        content = {key: value for key, value in document.items() if key != "name"} if name else document
        stages[name] = recipe_of(content, path)
    used = {stage_of(model, list(filter(None, stages))) for stage in stages.values() for model in stage.models}
    ends = [name for name in stages if name is None or name not in used]
    if not ends:
        raise FusionError(f"{path}: its documents use each other in a circle", "one of them must be the result")
    last = stages.pop(None if None in stages else ends[-1])
    if last.stages or any(stage.stages for stage in stages.values()):
        raise FusionError(f"{path}: stages are given both as documents and by stages:", "write all as documents")
    return replace(last, stages={str(name): stage for name, stage in stages.items()})


def recipe_of(content: object, path: Path, quiet: bool = False) -> Recipe:
    """The recipe that plain values are: ours, or one of mergekit or mergekit-moe.

    Args:
        content: one document of a file.
        path: the file, for errors.
        quiet: whether what mergekit reads without a use for it is left out of the log.

    Raises:
        FusionError: naming the file, the key and the reason.
    """
    if _has_range(content) or (isinstance(content, Mapping) and "genome" in content):
        raise FusionError(f"{path} has ranges to search, not numbers", f"hf-fusion search {path} --data ROWS")
    if not isinstance(content, Mapping) or not MERGEKIT & content.keys():
        recipe = Recipe.from_dict(content, str(path))
    else:
        is_mixture = "experts" in content and "merge_method" not in content
        recipe = from_mergekit_moe(content, str(path)) if is_mixture else from_mergekit(content, str(path), quiet)
    for stage in recipe.stages.values():
        check_parameters(stage, str(path))
    if recipe.method in MERGE_METHODS:
        check_parameters(recipe, str(path))
    else:
        options = {name: value for name, value in recipe.parameters.items() if name != "task"}  # of any method
        family_method(recipe.method, options, str(path))
    return recipe


def is_range(value: object) -> bool:
    """Whether a value is a range of numbers, for `hf_fusion.search`: a mapping with ``search: [low, high]``."""
    ends = value.get("search") if isinstance(value, Mapping) else None
    return isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)


def _has_range(content: object) -> bool:
    inner = content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ()
    return is_range(content) or any(map(_has_range, inner))


__all__ = ["is_range", "load_recipe", "recipe_of"]
