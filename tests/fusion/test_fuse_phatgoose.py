"""`fuse` with PHATGOOSE: adapters from the Hub, their recipe and folder, and incompatible adapters."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_routed import save_base, save_lora

from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, fuse_recipe, load_fused, save_fused
from hf_fusion.hub.compat import check_compatibility
from hf_fusion.hub.discover import discover
from hf_fusion.hub.gates_file import save_gates
from hf_fusion.recipe import Recipe
from hf_fusion.training.gates import average_activation
from hf_fusion.types import Gates

TEXTS = ["the quick fox", "a dog, said the router to the gate"]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folders(tmp_path):
    """A base, and two adapters of it that differ in rank and targets."""
    base = save_base(tmp_path / "base")
    save_lora(tmp_path / "a", str(base))
    save_lora(tmp_path / "b", str(base), seed=1, rank=8, targets=("q_proj", "up_proj"))
    return tmp_path


@pytest.fixture
def ids(owner, tmp_path):
    """The same on the Hub."""
    owner.push("base", save_base(tmp_path / "base"))
    owner.push("a", save_lora(tmp_path / "a", f"{owner.name}/base"))
    owner.push("b", save_lora(tmp_path / "b", f"{owner.name}/base", seed=1, rank=8, targets=("q_proj", "up_proj")))
    return [f"{owner.name}/a", f"{owner.name}/b"]


def logits(model):
    with torch.no_grad():
        return model(**model.processor(TEXTS, padding=True, return_tensors="pt")).logits


def test_fuse_pins_adapters_and_base_and_its_recipe_makes_the_same_again(owner, ids, tmp_path):
    model = fuse("phatgoose", ids, top_k=1, api=owner.api)
    recipe = model.fusion_recipe
    shas = {name: owner.api.model_info(name).sha for name in [*ids, f"{owner.name}/base"]}
    assert [expert.model for expert in recipe.experts] == [f"{name}@{shas[name]}" for name in ids]
    assert recipe.base == f"{owner.name}/base@{shas[f'{owner.name}/base']}"
    assert recipe.parameters == {"top_k": 1}
    save_fused(model, tmp_path / "fused")
    assert (tmp_path / "fused" / "tokenizer.json").is_file()
    owner.push("base", save_base(tmp_path / "base", seed=9))  # all move on; the recipe does not
    save_gates(
        Gates({path: -v for path, v in load_file(tmp_path / "a" / "phatgoose_gates.safetensors").items()}),
        tmp_path / "a",
        overwrite=True,
    )
    owner.push("a", tmp_path / "a")
    again = fuse_recipe(Recipe.load(tmp_path / "fused"), api=owner.api)
    assert again.fusion_recipe == recipe
    assert torch.equal(logits(again), logits(model))


def test_save_and_load(folders):
    model = fuse("phatgoose", [folders / "a", folders / "b"])
    save_fused(model, folders / "fused")
    read, recipe = load_fused(folders / "fused")
    assert recipe == read.fusion_recipe == model.fusion_recipe
    assert read.experts == ["a", "b"]
    assert torch.equal(logits(read), logits(model))
    prompt = read.processor(TEXTS[:1], return_tensors="pt")
    assert torch.equal(*(each.generate(**prompt, max_new_tokens=5, do_sample=False) for each in (read, model)))


def test_another_base_of_the_same_shape_may_be_given(folders):
    save_base(folders / "tuned", seed=3)
    own, tuned = (fuse("phatgoose", [folders / "a", folders / "b"], base) for base in (None, folders / "tuned"))
    assert tuned.fusion_recipe.base == str(folders / "tuned")
    assert not torch.allclose(logits(own), logits(tuned))


def test_a_base_by_reference_needs_a_commit(folders):
    with pytest.raises(FusionError, match="needs a base with a pinned revision"):
        fuse("phatgoose", [folders / "a", folders / "b"], base_by_reference=True)


def test_missing_gates_are_refused_or_stood_in_for(folders):
    save_lora(folders / "bare", str(folders / "base"), seed=2, gates=False)
    experts = [folders / "a", folders / "bare"]
    with pytest.raises(FusionError, match="bare has no gates: train them"):
        fuse("phatgoose", experts)
    model = fuse("phatgoose", experts, missing_gates="arrow")
    assert [row["gates"] for row in model.config.experts] == ["trained", "arrow"]
    assert model.fusion_recipe.parameters == {"missing_gates": "arrow"}


def test_mixed_gates_are_recorded_and_reproduced(folders):
    """One expert brings its own, one gets average activations from a folder, one Arrow prototypes."""
    for seed, name in enumerate(("average", "bare"), 2):
        save_lora(folders / name, str(folders / "base"), seed=seed, gates=False)
    rows = Dataset.from_dict({"prompt": TEXTS, "target": TEXTS})
    save_gates(average_activation(folders / "average", rows), folders / "gates")
    experts = [folders / name for name in ("a", "average", "bare")]
    model = fuse("phatgoose", experts, missing_gates={"average": folders / "gates", "bare": "arrow"})
    assert [row["gates"] for row in model.config.experts] == ["trained", "average", "arrow"]
    save_fused(model, folders / "fused")
    assert torch.equal(logits(fuse_recipe(Recipe.load(folders / "fused"))), logits(model))
    for given, message in {
        "nobody": "missing_gates names nobody, but the experts are a, average, bare",
        "a": "missing_gates names a, which has gates",
    }.items():
        with pytest.raises(FusionError, match=message):
            fuse("phatgoose", experts, missing_gates={given: folders / "gates"})
    with pytest.raises(FusionError, match="base contains no gates for bare"):
        fuse("phatgoose", experts, missing_gates={"bare": folders / "base"})
    with pytest.raises(FusionError, match="bare has no gates"):  # those that are not named are refused still
        fuse("phatgoose", experts, missing_gates={"average": folders / "gates"})


@pytest.mark.parametrize("misfit", ["shapes", "targets"])
def test_an_adapter_that_does_not_fit_is_named_before_its_base_is_loaded(folders, misfit):
    """The base's weights are NaN, but have not been loaded yet."""
    options, harm, message = MISFITS[misfit]
    save_lora(folders / "bad", str(folders / "base"), **options)
    harm(folders / "bad")
    file = folders / "base" / "model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(FusionError, match=message):
        fuse("phatgoose", [folders / "a", folders / "bad"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, "top_k=3, but there are only 2 experts"),
        ({"top_k": 0}, "at least one expert"),
        ({"top_k": "two"}, "top_k is 'two', expected a whole number"),
        ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"temperature": 0}, "must be above 0"),
        ({"routing": "magic"}, "must be one of phatgoose, arrow, uniform"),
        ({"missing_gates": "magic"}, "neither 'arrow' nor {expert: folder of its gates}"),
    ],
)
def test_wrong_options_are_named_before_anything_is_loaded(options, message):
    with pytest.raises(FusionError, match=message):
        fuse("phatgoose", ["nobody/nothing", "nobody/nowhere"], **options)


def test_an_empty_list_is_named():
    with pytest.raises(FusionError, match="at least one expert; the list is empty"):
        fuse("phatgoose", [])


def edit_tensors(folder, change):
    """Rewrites an adapter's tensors by a function of name and tensor."""
    file = folder / "adapter_model.safetensors"
    renamed = (change(name, tensor) for name, tensor in load_file(file).items())
    save_file({name: tensor.contiguous() for name, tensor in renamed}, file)


def set_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_nan(folder):
    edit_tensors(folder, lambda name, tensor: (name, tensor * float("nan") if f"{Q0}.lora_A" in name else tensor))


def narrower(folder):
    edit_tensors(folder, lambda name, tensor: (name, tensor[:, :20] if f"{Q0}.lora_A" in name else tensor))


def without_rank(folder):
    edit_tensors(folder, lambda name, tensor: (name, tensor[:0] if "lora_A" in name else tensor[:, :0]))
    set_config(folder, r=0)


def renamed(folder):
    edit_tensors(folder, lambda name, tensor: (name.replace("q_proj", "queries"), tensor))


def with_other_gates(folder):
    save_gates(Gates({"x": torch.ones(3)}), folder, overwrite=True)


# an adapter that does not fit: its options, what is done to its folder, what is said
MISFITS = {
    "nan": ({}, with_nan, f"adapter bad has NaN or Inf in {Q0}.lora_A.weight"),
    "shapes": ({}, narrower, f"{Q0} maps 32 to 32 features in the base, 20 to 32 in the adapter"),
    "rank 0": ({}, without_rank, "bad cannot be fused: r=0: the rank must be at least 1"),
    "huge rank": ({"rank": 500}, None, f"bad: rank 500 of {Q0} is not within 1 and 32"),
    "a rank that is promised": ({"r": 10**9}, None, "the ranks of .* disagree: A is .4, 32.*config says 1000000000"),
    "targets": ({}, renamed, "bad does not fit its base: adapts .*queries, which the base does not"),
    "no gates": ({"gates": False}, None, "bad has no gates"),
    "gates of others": ({}, with_other_gates, "bad: .* lacks a gate for"),
    "dora": ({"use_dora": True}, None, "bad cannot be fused: use_dora=True"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_named_with_the_reason(folders, misfit):
    options, harm, message = MISFITS[misfit]
    save_lora(folders / "bad", str(folders / "base"), **options)
    if harm:
        harm(folders / "bad")
    with pytest.raises(FusionError, match=message) as error:
        fuse("phatgoose", [folders / "a", folders / "bad"])
    assert "\n" not in error.value.message


def test_experts_that_cannot_be_together_are_named(folders):
    with pytest.raises(FusionError, match="there are two experts called a"):
        fuse("phatgoose", [folders / "a", folders / "a"])
    with pytest.raises(FusionError, match="base is a full model; PHATGOOSE routes among LoRA adapters"):
        fuse("phatgoose", [folders / "a", folders / "base"])
    wide = save_base(folders / "wide", hidden=48)
    save_lora(folders / "other", str(wide), hidden=48)
    with pytest.raises(FusionError, match=f"other adapts {wide}, the others {folders / 'base'}"):
        fuse("phatgoose", [folders / "a", folders / "other"])
    with pytest.raises(FusionError, match="adapter a does not fit its base"):
        fuse("phatgoose", [folders / "a", folders / "b"], base=wide)


def test_discovery_by_the_tag_and_a_reason_for_each_that_lacks_gates(owner, ids, tmp_path, anyone):
    base = f"{owner.name}/base"
    owner.push("bare", save_lora(tmp_path / "bare", base, gates=False))
    owner.push("huge", save_lora(tmp_path / "huge", base, rank=500))
    owner.push("foreign", save_lora(tmp_path / "foreign", "somebody/else"))
    tagged = discover(tags="phatgoose-gates", author=owner.name, api=anyone)
    assert {info.id.partition("/")[2] for info in tagged} == {"a", "b", "huge", "foreign"}
    assert all(info.has_gates and info.is_adapter for info in tagged)
    everyone = discover(author=owner.name, api=anyone)
    verdict = check_compatibility(everyone, base_model=base, need_gates=True, api=anyone)
    assert {info.id for info in verdict.accepted} == set(ids)
    reasons = {entry.info.id.partition("/")[2]: str(entry.reasons[0]) for entry in verdict.rejected}
    assert reasons == {
        "bare": "gates: has no phatgoose_gates.safetensors",
        "huge": f"lora: rank 500 of {Q0} is more than its width",
        "foreign": f"base: was made from somebody/else, not {base}",
    }
    unasked = check_compatibility(everyone, base_model=base, api=anyone)
    assert {f"{owner.name}/bare", f"{owner.name}/huge"} <= {info.id for info in unasked.accepted}


def test_a_full_model_among_adapters_is_named(folders):
    with pytest.raises(FusionError, match=r"base is a full model; PHATGOOSE routes among LoRA adapters"):
        fuse("phatgoose", [folders / "base", folders / "base"])
