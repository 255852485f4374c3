"""`fuse` with WEMoE: full fine-tunes with their base, adapters, recipe, folder, and incompatible experts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from tiny_fused import TEXT, bert_base, clip, clip_vision, fine_tuned
from tiny_routed import save_base, save_lora

from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, fuse_recipe, load_fused, save_fused
from hf_fusion.recipe import Recipe


@pytest.fixture
def folders(tmp_path):
    """A classifier and three fine-tunes of it."""
    base = bert_base()
    for name, model in [("base", base), *((f"e{k}", fine_tuned(base, k)) for k in range(3))]:
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def experts(folders):
    return [folders / f"e{k}" for k in range(3)]


def test_fuse_pins_experts_and_base_and_its_recipe_makes_the_same_again(owner, folders):
    for name in ("base", "e0", "e1"):
        owner.push(name, folders / name)
    ids = [f"{owner.name}/e0", f"{owner.name}/e1"]
    model = fuse("wemoe", ids, base=f"{owner.name}/base", scaling=0.4, api=owner.api)
    shas = {name: owner.api.model_info(name).sha for name in (*ids, f"{owner.name}/base")}
    recipe = model.fusion_recipe
    assert [expert.model for expert in recipe.experts] == [f"{name}@{shas[name]}" for name in ids]
    assert recipe.base == f"{owner.name}/base@{shas[f'{owner.name}/base']}"
    assert recipe.parameters == {"scaling": 0.4}
    assert model.config.base == {"id": f"{owner.name}/base", "revision": shas[f"{owner.name}/base"]}
    save_fused(model, folders / "fused")
    assert (folders / "fused" / "tokenizer.json").is_file()
    owner.push("base", folders / "e2")  # it moves on; the recipe does not
    again = fuse_recipe(Recipe.load(folders / "fused"), api=owner.api)
    assert again.fusion_recipe == recipe
    read, _ = load_fused(folders / "fused")
    with torch.no_grad():
        want = model(**TEXT, task=ids[1]).logits
        assert torch.equal(again(**TEXT, task=ids[1]).logits, want)
        assert torch.equal(read(**TEXT, task=ids[1]).logits, want)


def test_adapters_know_their_base(tmp_path):
    base = save_base(tmp_path / "base")
    for seed, targets in enumerate((("up_proj", "down_proj"), ("q_proj", "gate_proj"))):
        save_lora(tmp_path / str(seed), str(base), seed=seed, targets=targets, gates=False)
    model = fuse("wemoe", [tmp_path / "0", tmp_path / "1"], task_vectors="low-rank", rank=4)
    assert model.fusion_recipe.base == str(base)
    assert min(model.summary()["energy"].values()) > 1 - 1e-6  # adapters of rank 4
    tokens = model.generate(**model.processor(["the quick fox"], return_tensors="pt"), max_new_tokens=4)
    assert tokens.shape[0] == 1


def old_layout(folder):
    """A vision tower as checkpoints before transformers 5 have it, below vision_model."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["new", "old"])
def test_both_layouts_of_clip(layout, tmp_path):
    base = clip()
    base.save_pretrained(tmp_path / "base")
    tower = clip_vision()
    tower.load_state_dict(base.vision_model.state_dict())
    for k in range(2):
        fine_tuned(tower, k).save_pretrained(tmp_path / f"e{k}")
        if layout == "old":
            old_layout(tmp_path / f"e{k}")
    model = fuse("wemoe", [tmp_path / "e0", tmp_path / "e1"], base=tmp_path / "base")
    assert type(model.backbone) is type(base)
    assert [unit.name for unit in model.units] == [f"vision_model.encoder.layers.{i}" for i in (0, 1)]
    path = "vision_model.encoder.layers.1.mlp.fc2.weight"
    own = fine_tuned(tower, 1).state_dict()[path.removeprefix("vision_model.")]
    assert torch.allclose(model.merge_for(task="e1").state_dict()[path], own, atol=1e-6)


def test_full_fine_tunes_need_their_base(folders):
    with pytest.raises(FusionError, match="e0 is a full model: pass base="):
        fuse("wemoe", experts(folders))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_layers": 5}, "router_layers is 5; it must be one of 0, 1, 2"),
        ({"router_layers": "two"}, "router_layers is 'two'"),
        ({"task_vectors": "low-rank", "rank": "r"}, "rank is 'r', expected a whole number"),
        ({"task_vectors": "low-rank", "energy": "all"}, "energy is 'all', expected a number"),
        ({"scaling": "much"}, "scaling is 'much', expected a number"),
        ({"modules": 3}, "modules is 3, expected a string"),
    ],
)
def test_wrong_options_are_named_before_anything_is_loaded(options, message):
    with pytest.raises(FusionError, match=message):
        fuse("wemoe", ["nobody/nothing", "nobody/nowhere"], base="nobody/base", **options)
    with pytest.raises(FusionError, match="has no parameter 'magic'"):
        fuse("wemoe", ["nobody/nothing"], magic=1)


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DENSE = "bert.encoder.layer.1.output.dense.weight"
MISFITS = {
    "missing": (lambda tensors: tensors.pop(DENSE), f"e1: 1 weights are missing: {DENSE}"),
    "extra": (lambda tensors: tensors.update(strange=torch.ones(3)), "e1: 1 weights are unexpected: strange"),
    "NaN": (lambda tensors: tensors[DENSE].fill_(float("nan")), f"e1 has NaN or Inf in {DENSE}"),
    "shape": (lambda tensors: tensors.update({DENSE: torch.ones(32, 10)}), f"{DENSE} is .32, 10., not .32, 64."),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MISFITS)
def test_checkpoints_that_do_not_fit_are_named(name, folders):
    edit, message = MISFITS[name]
    change(folders / "e1", edit)
    with pytest.raises(FusionError, match=message):
        fuse("wemoe", experts(folders), base=folders / "base")


def test_another_vocabulary_is_named(folders):
    model = fine_tuned(bert_base(), 1)
    model.resize_token_embeddings(420, mean_resizing=False)
    model.save_pretrained(folders / "e1")
    assert json.loads((folders / "e1" / "config.json").read_text())["vocab_size"] == 420
    with pytest.raises(FusionError, match=r"e1: .*word_embeddings.weight is \[420, 32\], in the base \[400, 32\]"):
        fuse("wemoe", experts(folders), base=folders / "base")
