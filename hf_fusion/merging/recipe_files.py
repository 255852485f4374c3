"""Reads recipe files in three formats: this package's, mergekit's and mergekit-moe's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_fusion.io.yaml_files import read_yaml
from hf_fusion.merging.mergekit.moe import from_mergekit_moe
from hf_fusion.merging.mergekit.recipes import from_mergekit
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_checks import check_parameters, family_method
from hf_fusion.recipe import Recipe, recipe_file

# keys that a recipe of mergekit has and ours has not
MERGEKIT = {"merge_method", "models", "base_model", "modules"}


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe: ``fusion.yaml`` or a recipe of mergekit or mergekit-moe, told apart by their keys.

    Args:
        path: a file, or a folder that holds ``fusion.yaml``.

    Returns:
        The recipe, as `merge` and `fuse_recipe` take it.

    Raises:
        FusionError: naming the file, the key and the reason.
    """
    path = recipe_file(path)
    content = read_yaml(path)
    if not isinstance(content, Mapping) or not MERGEKIT & content.keys():
        recipe = Recipe.from_dict(content, str(path))
    else:
        is_mixture = "experts" in content and "merge_method" not in content
        recipe = (from_mergekit_moe if is_mixture else from_mergekit)(content, str(path))
    if recipe.method in MERGE_METHODS:
        check_parameters(recipe, str(path))
    else:
        options = {name: value for name, value in recipe.parameters.items() if name != "task"}  # of any method
        family_method(recipe.method, options, str(path))
    return recipe


__all__ = ["load_recipe"]
