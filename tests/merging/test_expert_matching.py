"""Matching of an expert's tensors, by the loader's names; experts without a match are refused."""

import json

import pytest
import torch
from on_disk import OF_MODELS, recipe_for, tree
from peft_adapters import SIZES, loaded, logits, save_adapter, save_bert, save_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_fusion import FusionError, Recipe, fuse
from hf_fusion.cards.card import write_card
from hf_fusion.cli.app import main
from hf_fusion.merging.expert_matching import Share
from hf_fusion.merging.merge import merge, plan_merge

METHODS = [name for name in OF_MODELS if name != "moe"]  # which says by itself what it takes of dense models


def with_options(recipe, **parameters):
    return Recipe(recipe.method, recipe.experts, recipe.base, {**recipe.parameters, **parameters})


# ---------------------------------------------------------------- nothing in common


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Two Llamas, and a GPT-2."""
    folder = tmp_path_factory.mktemp("strangers")
    save_llama(folder / "base")
    save_llama(folder / "llama", 1)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)).save_pretrained(folder / "gpt2")
    save_adapter(folder / "adapter", folder / "base", 1)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_has_nothing_in_common(method, strangers, tmp_path):
    recipe = recipe_for(method, [strangers / "gpt2", strangers / "llama"], strangers / "base")
    if recipe.base is None and len(recipe.experts) == 1:
        return  # passed on as it is
    for parameters in ({}, *({"mismatch": option} for option in ("base", "skip", "resize"))):
        with pytest.raises(FusionError, match=".* would not be merged: no tensor of its") as caught:
            merge(with_options(recipe, **parameters), tmp_path / "out")
        assert "mismatch" not in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_an_adapter_whose_every_layer_has_another_size(strangers, tmp_path, capsys):
    save_llama(tmp_path / "wide", vocabulary=40, num_key_value_heads=1)
    save_adapter(tmp_path / "narrow", tmp_path / "wide", 1, target_modules=["k_proj", "v_proj"])
    before = tree(tmp_path)
    words = ["fuse", "--method", "task_arithmetic", "--base", str(strangers / "base"), "--set", "mismatch=skip"]
    expert = f"{tmp_path / 'wide'}+{tmp_path / 'narrow'}"
    assert main([*words, "--experts", expert, "-o", str(tmp_path / "out")]) == 1
    assert f"{expert} would not be merged" in capsys.readouterr().err
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A vision-language model and two fine-tunes, one saved as before its class was rearranged, one as it is now."""
    folder = tmp_path_factory.mktemp("layouts")
    parts = {"text_config": LlamaConfig(**SIZES, vocab_size=40).to_dict(), "image_token_index": 5}
    parts["vision_config"] = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4).to_dict()
    for seed, name in enumerate(("base", "old", "other")):
        torch.manual_seed(seed)
        found = LlavaForConditionalGeneration(LlavaConfig(**parts))
        found.save_pretrained(folder / name)
    found.save_pretrained(folder / "new")
    tensors = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    save_file(tensors, folder / "new" / "model.safetensors", metadata={"format": "pt"})
    assert not tensors.keys() & load_file(folder / "old" / "model.safetensors").keys() - {"lm_head.weight"}
    return folder


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_old_and_new_names_are_one(method, layouts, tmp_path):
    mixed, alike = (
        recipe_for(method, [layouts / name, layouts / "old"], layouts / "base") for name in ("new", "other")
    )
    if mixed.base is None:  # names are the first expert's: its values, and random numbers by name, are the same
        mixed, alike = (recipe_for(method, [layouts / "old", layouts / name]) for name in ("new", "other"))
    assert merge(mixed, tmp_path / "mixed").warnings == []
    merge(alike, tmp_path / "alike")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "alike"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded(tmp_path / "mixed", LlavaForConditionalGeneration)


def test_new_names_first(layouts, tmp_path):
    found = fuse("linear", [layouts / "new", layouts / "old"]).state_dict()
    sides = [loaded(layouts / name, LlavaForConditionalGeneration).state_dict() for name in ("new", "old")]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (sides[0][name] + sides[1][name]) / 2)


# ---------------------------------------------------------------- counts


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """A classifier, a fine-tune of it, one with more tokens and its body alone; one of other layers; one more layer."""
    folder = tmp_path_factory.mktemp("partly")
    for seed, name in enumerate(("base", "one", "more", "layers", "wide")):
        save_bert(folder / name, seed=seed)
    torch.manual_seed(7)
    body = BertModel(BertConfig(**SIZES, vocab_size=40))
    body.save_pretrained(folder / "body")
    file = folder / "more" / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.embeddings.word_embeddings.weight"] = torch.randn(44, 16)
    save_file(tensors, file, metadata={"format": "pt"})
    BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 3}, vocab_size=40)).save_pretrained(folder / "layers")
    BertModel(BertConfig(**{**SIZES, "intermediate_size": 32}, vocab_size=40)).save_pretrained(folder / "wide")
    return folder


def test_less_than_all_of_an_expert(partly, tmp_path, capsys):
    words = ["fuse", "--method", "task_arithmetic", "--base", str(partly / "base"), "--set", "mismatch=skip"]
    words += ["--experts", str(partly / "one"), str(partly / "more"), "-o", str(tmp_path / "out")]
    total = sum(tensor.numel() for tensor in load_file(partly / "more" / "model.safetensors").values())
    told = f"of {partly / 'more'} is merged ({total - 44 * 16:,} of {total:,} parameters)"
    for more in (["--dry-run"], ["--dry-run", "--format", "json"], []):
        assert main([*words, *more]) == 0
        said = capsys.readouterr()
        assert [line for line in said.err.splitlines() if "Warning" in line and told in line]
        if "json" in more:
            row = {"model": str(partly / "more"), "merged": total - 44 * 16, "parameters": total}
            assert json.loads(said.out)["partly_merged"] == [row]
    share = f"{100 * (total - 44 * 16) / total:.3g} %"
    assert f"- {share} of the parameters of more are merged" in (tmp_path / "out" / "README.md").read_text()
    facts = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert facts == {"partly_merged": [row]}
    damaged = {"partly_merged": [{**row, "merged": "most"}]}
    (tmp_path / "out" / "merge.json").write_text(json.dumps(damaged))
    with pytest.raises(
        FusionError, match=r"merge\.json: partly_merged\[0\]\.merged is 'most', expected a whole number"
    ):
        write_card(tmp_path / "out")
    (tmp_path / "out" / "merge.json").write_text(json.dumps(facts))
    report = merge(recipe_for("linear", [partly / "one", tmp_path / "out"]), tmp_path / "again")
    assert report.facts == {} and not (tmp_path / "again" / "merge.json").exists()  # it was the other's


def test_less_than_all_of_a_model_in_memory(partly, caplog):
    more = AutoModelForSequenceClassification.from_pretrained(partly / "base")
    more.resize_token_embeddings(44, mean_resizing=False)
    found = fuse("task_arithmetic", [partly / "one", more], partly / "base", mismatch="skip")
    [row] = json.loads(found.fusion_files["merge.json"])["partly_merged"]
    assert row["model"] == found.fusion_recipe.experts[1].model
    assert row["parameters"] - row["merged"] == 44 * 16
    assert "is merged (" in caplog.text


def test_shares_in_words():
    assert str(Share("it", 1, 3)).startswith("33.3 % of it is merged (1 of 3")
    assert str(Share("it", 1, 10**4)).startswith("0.01 % of")
    assert str(Share("it", 1, 10**9)).startswith("less than 0.001 % of")
    assert str(Share("it", 10**9 - 1, 10**9)).startswith("nearly all of")


# ---------------------------------------------------------------- options that errors offer


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("more", {"base", "skip", "resize"}),  # rows alone
        ("body", {"base", "skip"}),  # a head is missing
        ("layers", {"base", "skip"}),  # and a layer is left over
        ("wide", {"base", "skip"}),  # sizes within the layers, of which some differ in rows alone
    ],
)
def test_options_offered_by_the_error_resolve_it(method, name, offered, partly, tmp_path):
    experts = [partly / "one", partly / name] if OF_MODELS[method].experts[1] != 1 else [partly / name]
    recipe = recipe_for(method, experts, partly / "base")
    if recipe.base is None and len(experts) == 1:
        return
    with pytest.raises(FusionError, match="do not match") as caught:
        plan_merge(recipe)
    hint = caught.value.hint.partition(" (")[0].removeprefix("set the parameter mismatch to ")
    assert set(hint.split(" or ")) == offered
    for option in offered:
        report = merge(with_options(recipe, mismatch=option), tmp_path / option)
        assert [row["model"] for row in report.facts.get("partly_merged", [])] or option == "resize" or name == "body"
        found = loaded(tmp_path / option, AutoModelForSequenceClassification)
        assert logits(found).isfinite().all()


@pytest.mark.parametrize(("method", "more"), [("emr", {"expert": 1}), ("ties", {"trim": "model"})])
@pytest.mark.parametrize(("name", "offered"), [("more", {"base", "resize"}), ("body", {"base"}), ("layers", {"base"})])
def test_options_offered_for_methods_over_whole_models(method, more, name, offered, partly, tmp_path):
    recipe = with_options(recipe_for(method, [partly / "one", partly / name], partly / "base"), **more)
    with pytest.raises(FusionError, match="do not match") as caught:
        plan_merge(recipe)
    hint = caught.value.hint.partition(" (")[0].removeprefix("set the parameter mismatch to ")
    assert set(hint.split(" or ")) == offered
    for option in offered:
        merge(with_options(recipe, mismatch=option), tmp_path / option)
        loaded(tmp_path / option, AutoModelForSequenceClassification)


def test_left_over_tensors_alone(partly, tmp_path):
    recipe = recipe_for("task_arithmetic", [partly / "one"], partly / "body")
    with pytest.raises(FusionError, match=r"classifier.weight +1 +\S+ +extra +base \| skip\n") as caught:
        plan_merge(recipe)
    assert caught.value.hint.startswith("set the parameter mismatch to base or skip (")
    merge(with_options(recipe, mismatch="skip"), tmp_path / "out")
    loaded(tmp_path / "out", AutoModel)
