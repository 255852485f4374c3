"""Recipes as files, whoever wrote them: ours, mergekit's and mergekit-moe's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_fusion.io.yaml_files import read_yaml
from hf_fusion.merging.mergekit.moe import from_mergekit_moe
from hf_fusion.merging.mergekit.recipes import from_mergekit
from hf_fusion.recipe import MERGEKIT, Recipe, recipe_file


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
        return Recipe.from_dict(content, str(path))
    is_mixture = "experts" in content and "merge_method" not in content
    return (from_mergekit_moe if is_mixture else from_mergekit)(content, str(path))


__all__ = ["load_recipe"]
