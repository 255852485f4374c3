"""`fuse`, its recipe and its folder: from ids on the Hub to a model that loads."""

import shutil
import threading

import pytest
import torch
from tiny_experts import save_adapter, save_bert
from transformers import AutoModel

import hf_fusion
from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, fuse_recipe, load_fused, save_fused
from hf_fusion.recipe import Recipe, RecipeExpert

TEXTS = ["good film", "bad bad film"]


@pytest.fixture
def ids(owner, tmp_path):
    """A full expert and an adapter, both on the Hub, named without their commits."""
    owner.push("full", save_bert(tmp_path / "full", card="license: mit"))
    base_sha = owner.push("base", save_bert(tmp_path / "base", auto=AutoModel))
    save_adapter(tmp_path / "yes-no", tmp_path / "base", base_name=f"{owner.name}/base", revision=base_sha)
    owner.push("yes-no", tmp_path / "yes-no")
    return [f"{owner.name}/full", f"{owner.name}/yes-no"]


def logits(model):
    with torch.no_grad():
        return model(**model.processor(TEXTS)).logits


def test_command_function_is_public():
    assert hf_fusion.fuse is fuse


def test_fuse_pins_its_experts(owner, ids):
    model = fuse("foe", ids, labels=["no", "yes", "maybe"], api=owner.api)
    recipe = model.fusion_recipe
    shas = [owner.api.model_info(name).sha for name in [*ids, f"{owner.name}/base"]]
    assert [expert.model for expert in recipe.experts] == [
        f"{name}@{sha}" for name, sha in zip(ids, shas, strict=False)
    ]
    assert recipe.base == f"{owner.name}/base@{shas[2]}"
    assert recipe.parameters == {"labels": ["no", "yes", "maybe"]}
    assert recipe.unpinned == []


def test_recipe_makes_the_same_model_again(owner, ids, tmp_path):
    torch.manual_seed(0)
    model = fuse("foe", ids, api=owner.api)
    save_fused(model, tmp_path / "fused")
    owner.push("full", save_bert(tmp_path / "full", seed=9))  # the expert moves on; the recipe does not
    torch.manual_seed(0)
    again = fuse_recipe(Recipe.load(tmp_path / "fused"), api=owner.api)
    assert again.fusion_recipe == model.fusion_recipe
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_recipe_keeps_the_task_but_not_consent(owner, ids):
    recipe = fuse("foe", ids, task="text-classification", api=owner.api).fusion_recipe
    assert recipe.parameters == {"task": "text-classification"}
    assert fuse_recipe(recipe, api=owner.api).fusion_recipe == recipe
    with pytest.raises(FusionError, match="no parameter 'trust_remote_code'"):
        fuse_recipe(Recipe("foe", recipe.experts, parameters={"trust_remote_code": True}), api=owner.api)


def test_save_and_load(owner, ids, tmp_path):
    model = fuse("foe", ids, api=owner.api)
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "README.md").write_text("by hand")
    (tmp_path / "fused" / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier save")
    with pytest.raises(FusionError, match="fused already contains a model: model-00001-of-00002.safetensors"):
        save_fused(model, tmp_path / "fused")
    save_fused(model, tmp_path / "fused", overwrite=True)
    read, recipe = load_fused(tmp_path / "fused")
    assert recipe == model.fusion_recipe == read.fusion_recipe
    assert torch.equal(logits(read), logits(model))
    names = {path.name for path in (tmp_path / "fused").iterdir()}
    assert {"fusion.yaml", "config.json", "model.safetensors", "README.md"} <= names
    assert "model-00001-of-00002.safetensors" not in names
    assert (tmp_path / "fused" / "README.md").read_text() == "by hand"
    assert not list(tmp_path.glob(".fused*"))


def test_a_failed_save_leaves_the_old_one(owner, ids, tmp_path):
    model = fuse("foe", ids, api=owner.api)
    save_fused(model, tmp_path / "fused")
    expected = logits(model)
    model.config.unwritable = threading.Lock()  # no JSON has a word for it
    with pytest.raises(TypeError):
        save_fused(model, tmp_path / "fused", overwrite=True)
    assert torch.equal(logits(load_fused(tmp_path / "fused")[0]), expected)
    assert not list(tmp_path.glob(".fused*"))


def test_mistakes(owner, ids, tmp_path):
    with pytest.raises(FusionError, match="no method 'alchemy'") as caught:
        fuse("alchemy", ids, api=owner.api)
    assert caught.value.hint == "hf-fusion methods lists all"
    with pytest.raises(FusionError, match="method foe has no parameter 'temperature'"):
        fuse("foe", ids, temperature=3, api=owner.api)
    with pytest.raises(FusionError, match="does not take weights"):
        fuse_recipe(Recipe("foe", (RecipeExpert(ids[0], 1.0),)), api=owner.api)
    with pytest.raises(FusionError, match="labels"):
        fuse("foe", ids, labels=["no"], api=owner.api)
    shutil.copytree(tmp_path / "full", tmp_path / "plain")
    with pytest.raises(FusionError, match="plain has no fusion.yaml"):
        load_fused(tmp_path / "plain")
