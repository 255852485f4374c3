"""Mixtures of experts made of dense models: equal to the dense model if all experts are copies of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama, make_tokenizer, t5
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_fusion import FusionError
from hf_fusion.merging.merge import merge
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import Recipe, RecipeExpert

MLP = "model.layers.{}.mlp.{}_proj.weight"
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def folders(tmp_path):
    """Three Llamas of one size with one tokenizer."""
    for seed, name in enumerate("abc"):
        model = llama(seed, vocabulary=len(make_tokenizer()))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in "abc"}


def recipe_of(experts, base=None, **parameters):
    experts = tuple(e if isinstance(e, RecipeExpert) else RecipeExpert(e) for e in experts)
    return Recipe("moe", experts, base, parameters)


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


@pytest.mark.parametrize(("gate", "per_token"), [("zero", 2), ("random", 1), ("uniform", 3)])
def test_copies_are_the_dense_model(folders, tmp_path, gate, per_token):
    report = merge(recipe_of([folders["a"]] * 4, gate=gate, experts_per_token=per_token), tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is MixtralForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (loaded.config.num_local_experts, loaded.config.num_experts_per_tok) == (4, per_token)
    dense = AutoModelForCausalLM.from_pretrained(folders["a"])
    torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    assert loaded.generate(IDS, max_new_tokens=5).shape == (2, 17)
    assert load_recipe(tmp_path / "out") == report.recipe
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()


def test_mistral_becomes_a_mixture(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=90, num_key_value_heads=4, head_dim=16, sliding_window=4, **sizes)
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense")
    merge(recipe_of([str(tmp_path / "dense")] * 2), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.sliding_window == 4 and loaded.config.head_dim == 16
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    # a Llama of an older transformers says little: it means its own defaults, not Mixtral's
    llama(1).save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    said = json.loads(file.read_text())
    del said["rms_norm_eps"], said["rope_parameters"], said["max_position_embeddings"], said["num_key_value_heads"]
    state = weights(tmp_path / "old")
    from safetensors.torch import save_file

    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.repeat(2, 1)
    save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    file.write_text(json.dumps(said))
    merge(recipe_of([str(tmp_path / "old")] * 2), tmp_path / "new")
    loaded, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("new", "old"))
    assert loaded.config.rms_norm_eps == dense.config.rms_norm_eps == 1e-6
    assert loaded.config.num_key_value_heads == 4
    torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_experts_are_chosen_by_their_prompts(folders, tmp_path):
    prompts = {"b": {"prompts": ["the quick fox", "a dog"]}, "c": {"prompts": ["nine"], "negative_prompts": ["router"]}}
    experts = [RecipeExpert(folders[name], None, own) for name, own in prompts.items()]
    recipe = recipe_of(experts, folders["a"], gate="embedding", experts_per_token=1)
    report = merge(recipe, tmp_path / "out")
    assert load_recipe(tmp_path / "out") == report.recipe
    out, a, b, c = (weights(folder) for folder in (tmp_path / "out", *folders.values()))
    for layer in range(2):
        for number, model in enumerate((b, c)):
            for kind, ours in {"gate": "w1", "down": "w2", "up": "w3"}.items():
                assert out[EXPERT.format(layer, number, ours)].equal(model[MLP.format(layer, kind)])
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert out[name].equal(a[name])
    cut = AutoTokenizer.from_pretrained(folders["a"])

    def direction(texts):
        rows = [a["model.embed_tokens.weight"][cut("<s>" + text)["input_ids"]].sum(0) for text in texts]
        return torch.nn.functional.normalize(sum(rows), dim=0)

    wanted = torch.stack([direction(["the quick fox", "a dog"]), direction(["nine"]) - direction(["router"])])
    wanted = torch.nn.functional.normalize(wanted, dim=1)
    for layer in range(2):
        gate = out[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(gate, wanted, rtol=1e-5, atol=1e-6)
    # where one expert alone answers, it is its own MLP in the base's trunk
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in loaded.model.layers:
        layer.mlp.gate.weight.data = torch.stack([torch.ones(32), torch.ones(32)]) * torch.tensor([[0.0], [0.0]])
    state = dict(a) | {name: tensor for name, tensor in b.items() if ".mlp." in name}
    dense = AutoModelForCausalLM.from_pretrained(folders["a"])
    dense.load_state_dict(state)
    torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_gates_differ_by_layer_and_seed_and_come_again(folders, tmp_path):
    gates = {}
    for name, seed in {"one": 0, "again": 0, "other": 1}.items():
        merge(recipe_of([folders["a"], folders["b"]], gate="random", seed=seed), tmp_path / name)
        out = weights(tmp_path / name)
        gates[name] = [out[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]
    assert all(one.equal(again) for one, again in zip(gates["one"], gates["again"], strict=True))
    assert not gates["one"][0].equal(gates["one"][1]) and not gates["one"][0].equal(gates["other"][0])
    assert 0.7 < torch.stack(gates["one"]).std() < 1.3


def test_stored_in_half_the_bytes(folders, tmp_path):
    recipe = Recipe("moe", (RecipeExpert(folders["a"]), RecipeExpert(folders["b"])), dtype="bfloat16")
    merge(recipe, tmp_path / "out")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_a_recipe_of_mergekit_moe(folders, tmp_path):
    text = f"""
        base_model: {folders["a"]}
        gate_mode: cheap_embed
        dtype: bfloat16
        experts:
          - source_model: {folders["b"]}
            positive_prompts: ["the quick fox"]
          - source_model: {folders["c"]}
            positive_prompts: ["nine lazy routers"]
            negative_prompts: ["a dog"]
        """
    (tmp_path / "moe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "moe.yaml")
    assert recipe.parameters == {"gate": "embedding", "experts_per_token": 2} and recipe.base == folders["a"]
    merge(recipe, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits.isfinite().all()
    for change, message in {
        ("cheap_embed", "first"): "gate_mode is 'first', expected one of hidden",
        ("gate_mode: cheap_embed", "shared_experts: [{source_model: x}]"): "shared_experts is not supported",
        ("dtype: bfloat16", "architecture: deepseek"): "architecture is 'deepseek', which is not supported",
        ("bfloat16", "int8"): "dtype is 'int8'",
        ("positive_prompts", "prompts"): r"experts\[0\].prompts is not a supported key",
        ("source_model:", "model:"): r"experts\[0\].model is not a supported key",
    }.items():
        (tmp_path / "moe.yaml").write_text(text.replace(*change))
        with pytest.raises(FusionError, match=message):
            load_recipe(tmp_path / "moe.yaml")


def as_mergekit(folder, positive, negative, average):
    """mergekit-moe's `get_gate_params` of one expert: a batch with padding on the left, (L, d)."""
    cut = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)

    def states(texts):
        batch = cut(
            [cut.bos_token + text for text in texts], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad():
            layers = torch.stack(model(**batch, output_hidden_states=True).hidden_states[:-1])
        return (layers.mean(2) if average else layers[:, :, -1]).mean(1)

    found = states(positive) - (states(negative) if negative else 0)
    return found / found.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", None])
def test_hidden_state_gates_equal_mergekit_moe(folders, tmp_path, mode):
    texts = [(["the quick fox", "a dog sat down"], None), (["nine lazy routers"], ["a dog", "experts are fused"])]
    if mode == "hidden_avg":  # mergekit's average counts the padding: texts of one length have none
        texts = [(["the quick fox"], None), (["nine lazy routers"], ["a dog"])]
    experts = [
        {"source_model": folders[name], "positive_prompts": yes, **({"negative_prompts": no} if no else {})}
        for name, (yes, no) in zip("bc", texts, strict=True)
    ]
    recipe = {"base_model": folders["a"], "experts": experts} | ({"gate_mode": mode} if mode else {})
    (tmp_path / "moe.yaml").write_text(json.dumps(recipe))
    recipe = load_recipe(tmp_path / "moe.yaml")
    assert recipe.parameters["gate"] == (mode or "hidden")
    report = merge(recipe, tmp_path / "out")
    assert load_recipe(report.folder) == report.recipe
    wanted = torch.stack([as_mergekit(folders["a"], yes, no, mode == "hidden_avg") for yes, no in texts], 1)
    gates = [weights(report.folder)[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]
    torch.testing.assert_close(torch.stack(gates), wanted, rtol=1e-4, atol=1e-5)
    assert not gates[0].allclose(gates[1], atol=0.1)


def test_qwen3(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name in ("base", "other"):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=90, num_key_value_heads=2, head_dim=16, **sizes)).eval()
        model.save_pretrained(tmp_path / name)
    merge(recipe_of([str(tmp_path / "other")] * 3, str(tmp_path / "other"), gate="random"), tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded).__name__ == "Qwen3MoeForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for change, message in {
        ("use_sliding_window", True): "layers with and without a sliding window",
        ("architecture", "mixtral"): "is a 'qwen3', which cannot become a mixtral",
    }.items():
        own = {change[0]: change[1]}
        parameters = own if "architecture" in own else {}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | ({} if parameters else own)))
        with pytest.raises(FusionError, match=message):
            merge(recipe_of([str(tmp_path / "other")] * 2, **parameters), tmp_path / "none")


def test_noise_and_scale_of_an_experts_mlp(folders, tmp_path):
    own = {"noise_scale": 0.5, "residual_scale": 2.0}
    recipe = recipe_of([RecipeExpert(folders["b"], None, own), folders["b"]], folders["a"])
    merge(recipe, tmp_path / "out")
    out, b = weights(tmp_path / "out"), weights(folders["b"])
    for kind, ours, scale in (("gate", "w1", 1), ("up", "w3", 1), ("down", "w2", 2)):
        plain = b[MLP.format(1, kind)]
        assert out[EXPERT.format(1, 1, ours)].equal(plain)
        noise = out[EXPERT.format(1, 0, ours)] / scale - plain
        assert 0.45 < noise.std() < 0.55 and abs(noise.mean()) < 0.05
    merge(recipe, tmp_path / "again")
    assert all(tensor.equal(out[name]) for name, tensor in weights(tmp_path / "again").items())


def test_invalid_mixtures_are_refused(folders, tmp_path):
    def refused(recipe, message):
        with pytest.raises(FusionError, match=message):
            merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(recipe_of([folders["a"]]), "each token needs 2 experts, the recipe has 1")
    refused(recipe_of([folders["a"]] * 2, gate="first"), "gate is 'first', expected one of zero, random")
    t5().save_pretrained(tmp_path / "t5")
    refused(recipe_of([str(tmp_path / "t5")] * 2), "t5 is a 't5', for which there is no mixture")
    llama(5, hidden=48).save_pretrained(tmp_path / "wide")
    refused(recipe_of([folders["a"], str(tmp_path / "wide")]), r"wide: .*mlp.*weight is \[.*, in .*a \[")
    expert = RecipeExpert(folders["a"], None, {"prompts": ["a dog"]})
    refused(recipe_of([expert, folders["b"]]), "gate: zero does not use prompts")
    refused(recipe_of([expert, folders["b"]], gate="embedding"), "b has no prompts, which gate: embedding needs")
    wrong = RecipeExpert(folders["a"], None, {"prompts": 3})
    refused(recipe_of([wrong, folders["b"]], gate="embedding"), "prompts is 3, expected a list of strings")
    alike = [replace(expert, model=folders[name]) for name in "bc"]
    refused(recipe_of(alike, gate="hidden"), "all experts have the same prompts")
    loud = RecipeExpert(folders["a"], None, {"noise_scale": "much"})
    refused(recipe_of([loud, folders["b"]]), "noise_scale is 'much', expected a number")
    biased = llama(6)
    biased.config.attention_bias = True
    type(biased)(biased.config).save_pretrained(tmp_path / "biased")
    refused(recipe_of([str(tmp_path / "biased")] * 2), "bias, which a Mixtral does not have")
