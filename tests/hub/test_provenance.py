"""Names and hashes that published recipes have instead of local paths."""

from __future__ import annotations

import json

import pytest

from hf_fusion.hub.provenance import hash_folder, hash_folders, list_local_folders, strip_paths_from_recipe
from hf_fusion.recipe import Recipe, RecipeExpert, is_pinned
from hf_fusion.types import ModelRef


@pytest.mark.parametrize("name", ["expert", "ex@pert", "ex+pert", "a+b@c", "ex pert"])
def test_local_folder_is_identified_by_its_content(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    recipe = Recipe("linear", (RecipeExpert(str(folder)),))
    assert list_local_folders(recipe) == [str(folder)]
    names = hash_folders([str(folder)])
    public = strip_paths_from_recipe(recipe, names)
    (expert,) = public.experts
    base, ref = ModelRef.parse_pair(expert.model)
    assert base is None
    assert ref.revision == hash_folder(str(folder))
    assert is_pinned(expert.model)
    assert public.elsewhere
    assert str(tmp_path) not in public.to_yaml()
