"""Tied embeddings: the merged model equals PEFT's model of the adapter."""

import json

import pytest
import torch
from on_disk import OF_MODELS, recipe_for
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import CLOSE, IDS, KINDS, loaded, logits, save_adapter, save_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_fusion import FusionError, Recipe, fuse
from hf_fusion.cli.app import main
from hf_fusion.merging.engine.open_models import open_models
from hf_fusion.merging.merge import merge, plan_merge


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request, tmp_path_factory):
    """A base, and an adapter of each kind with what PEFT makes of it."""
    folder = tmp_path_factory.mktemp("made")
    save_llama(folder / "base", tied=request.param)
    models = {}
    for seed, (name, (options, _)) in enumerate(KINDS.items(), 1):
        models[name] = save_adapter(folder / name, folder / "base", seed, **options)
    return folder, models, request.param


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_equals_peft(kind, made, tmp_path):
    folder, models, tied = made
    report = merge(recipe_for("linear", [folder / kind]), tmp_path / "out")
    found = loaded(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(models[kind]), **CLOSE)
    stays = tied and KINDS[kind][1]
    assert found.config.tie_word_embeddings == stays
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not stays)
    assert bool(report.warnings) == (tied and not stays)
    if report.warnings:
        told = f"the merged model has a separate lm_head.weight, which {folder / kind} ties to model.embed_tokens"
        assert report.warnings[0].startswith(told)
        assert json.loads((tmp_path / "out" / "merge.json").read_text())["notes"] == report.warnings


def weights_of(model: PeftModel, tied: bool) -> dict[str, torch.Tensor]:
    """All weights with the adapter in them, by hand from PEFT's layers: its own merge ties what is not tied."""
    base, found = model.get_base_model(), {}
    for path, module in base.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            found[f"{path}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
        elif hasattr(module, "modules_to_save"):
            found[f"{path}.weight"] = module.modules_to_save["default"].weight
        elif hasattr(module, "token_adapter"):
            found[f"{path}.weight"] = module.token_adapter.get_merged_weights(["default"])
        elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            found.setdefault(f"{path}.weight", module.weight)
    names = set(AutoModelForCausalLM.from_config(base.config).state_dict())
    return {name: tensor.detach() for name, tensor in found.items() if name in names}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "grown" not in kind])
def test_two_adapters_equal_the_mean_of_peft_models(kind, made, tmp_path):
    """With one that leaves the embeddings as they are: the tied one counts in both places."""
    folder, models, tied = made
    merge(recipe_for("linear", [folder / "neither", folder / kind]), tmp_path / "out")
    sides = [weights_of(models[name], tied) for name in ("neither", kind)]
    expected = AutoModelForCausalLM.from_pretrained(folder / "base")
    expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.detach().clone())  # untied
    expected.load_state_dict({name: (sides[0][name] + sides[1][name]) / 2 for name in sides[0]})
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(expected.eval()), **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("method", OF_MODELS)
def test_each_method_merges_an_untied_head(method, made, tmp_path):
    """As it merges the same model with its head stored, whose every tensor is known."""
    folder, _, tied = made
    names = ("save embeddings", "LoRA on the head")
    recipe = recipe_for(method, [folder / name for name in names], folder / "base")
    merge(recipe, tmp_path / "out")
    for name in names:
        merge(recipe_for("linear", [folder / name]), tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.save_pretrained(tmp_path / "base")
    merge(recipe_for(method, [tmp_path / name for name in names], tmp_path / "base"), tmp_path / "plain")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert one.keys() == other.keys() and "lm_head.weight" in one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **CLOSE)
    assert loaded(tmp_path / "out").config.tie_word_embeddings is False


# ---------------------------------------------------------------- full models


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    save_llama(folder / "tied", 0, tied=True)
    save_llama(folder / "also tied", 1, tied=True)
    save_llama(folder / "untied", 2)
    save_llama(folder / "also untied", 3)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("method", OF_MODELS)
@pytest.mark.parametrize("order", [("tied", "untied", "also tied"), ("untied", "tied", "also untied")])
def test_tied_and_untied_models(method, order, full, tmp_path, capsys):
    recipe = recipe_for(method, [full / name for name in order[1:]], full / order[0])
    if not recipe.base:
        recipe = recipe_for(method, [full / name for name in order[:2]])
    if len(recipe.experts) == 1 and not recipe.base:
        return
    with pytest.raises(FusionError, match="has a separate lm_head.weight, .* ties it to model.embed_tokens") as caught:
        plan_merge(recipe)
    assert "untie to true" in caught.value.hint and "mismatch to skip" in caught.value.hint
    report = merge(Recipe(method, recipe.experts, recipe.base, {**recipe.parameters, "untie": True}), tmp_path / "out")
    assert loaded(tmp_path / "out").config.tie_word_embeddings is False
    assert bool(report.warnings) == (order[0] == "tied")
    if method != "moe":
        merge(Recipe(method, recipe.experts, recipe.base, {**recipe.parameters, "mismatch": "skip"}), tmp_path / "tied")
        assert loaded(tmp_path / "tied").config.tie_word_embeddings == (order[0] == "tied")


def test_the_head_that_is_kept(full, tmp_path):
    found = fuse("linear", [full / "tied", full / "untied"], untie=True)
    sides = [loaded(full / name) for name in ("tied", "untied")]
    mean = (sides[0].model.embed_tokens.weight + sides[1].lm_head.weight) / 2
    torch.testing.assert_close(found.lm_head.weight, mean)
    words = ["fuse", "--method", "linear", "--experts", str(full / "tied"), str(full / "untied"), "--set", "untie=true"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert torch.equal(loaded(tmp_path / "out").lm_head.weight, found.lm_head.weight)


def test_tied_models_that_also_store_their_head(full, tmp_path):
    for number, name in enumerate(("tied", "also tied")):
        tensors = load_file(full / name / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((full / name / "config.json").read_text())
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        for i, experts in enumerate(([tmp_path / name, full / "tied"], [full / "tied", tmp_path / name])):
            out = tmp_path / f"out-{number}-{i}"
            assert merge(recipe_for("linear", experts), out).warnings == []
            assert loaded(out).config.tie_word_embeddings is True
            assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_dora_is_refused_with_a_way_on(full, tmp_path):
    made = save_adapter(tmp_path / "dora", full / "tied", 1, use_dora=True)
    with pytest.raises(FusionError, match="use_dora=True") as caught:
        open_models([str(tmp_path / "dora")])
    assert "merge_and_unload() and save_pretrained()" in caught.value.hint
    expected = logits(made)
    made.merge_and_unload().save_pretrained(tmp_path / "whole")
    merge(recipe_for("linear", [tmp_path / "whole"]), tmp_path / "out")
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, **CLOSE)


@pytest.mark.parametrize("target", [["c_attn", "wte"], ["c_attn", "lm_head"], ["c_attn"]])
def test_gpt2_with_transposed_matrices(target, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16)  # as many tokens as columns
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    made = save_adapter(tmp_path / "one", tmp_path / "base", 1, target_modules=target, fan_in_fan_out=True)
    merge(recipe_for("linear", [tmp_path / "one"]), tmp_path / "out")
    ids = IDS.clamp(max=15)
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        torch.testing.assert_close(loaded(tmp_path / "out")(input_ids=ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("target", [["q", "shared"], ["q", "lm_head"], ["q", "encoder.embed_tokens"], ["q"]])
@pytest.mark.parametrize("how", ["lora", "saved"])
def test_an_encoder_and_decoder_that_share(target, how, tmp_path):
    """The configuration's word for tied also scales what T5's head gets: it stays."""
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    options = {"target_modules": target} if how == "lora" else {"target_modules": ["q"], "modules_to_save": target[1:]}
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    made = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", **options)).eval()
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "one")
    merge(recipe_for("linear", [tmp_path / "one"]), tmp_path / "out")
    found = loaded(tmp_path / "out", AutoModelForSeq2SeqLM)
    with torch.no_grad():
        expected = made(input_ids=IDS, decoder_input_ids=IDS).logits
        torch.testing.assert_close(found(input_ids=IDS, decoder_input_ids=IDS).logits, expected, **CLOSE)
