"""Slices of models with different layer types, compared with models assembled by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_fusion import FusionError
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert, Slice, SliceSource

LENGTH = 12  # tokens: more than any window below
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
LATENT = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"num_key_value_heads": 2, "head_dim": 4},
}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False}
# architecture: what its configuration says, keys that its file leaves out, layers that are taken, what must come of it
CASES = {
    "Gemma2ForCausalLM": ({"num_hidden_layers": 4}, ["layer_types"], [0, 2, 3, 1]),
    "Gemma3ForCausalLM": ({"num_hidden_layers": 6, "sliding_window_pattern": 3}, ["layer_types"], [0, 1, 2, 2, 5, 3]),
    "Cohere2ForCausalLM": ({"num_hidden_layers": 4}, ["layer_types"], [3, 0, 1, 3]),
    "Exaone4ForCausalLM": ({"num_hidden_layers": 4, "sliding_window_pattern": 2}, ["layer_types"], [1, 1, 0]),
    "Qwen2ForCausalLM": (
        {"num_hidden_layers": 4, "max_window_layers": 2, "use_sliding_window": True},
        ["layer_types"],
        [3, 0, 2, 1],
    ),
    "Qwen2MoeForCausalLM": (
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], **SPARSE},
        ["layer_types"],
        [1, 3, 1, 0, 2],
    ),
    "Qwen3MoeForCausalLM": ({"num_hidden_layers": 4, "mlp_only_layers": [0, 2], **SPARSE}, [], [1, 0, 3, 2, 2]),
    "DeepseekV3ForCausalLM": ({"num_hidden_layers": 4, "first_k_dense_replace": 2, **LATENT}, [], [0, 0, 1, 3]),
    "SmolLM3ForCausalLM": (
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True},
        ["layer_types", "no_rope_layers"],
        [1, 1, 0, 2],
    ),
    "Llama4ForCausalLM": (
        {
            **{"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
            **{"num_local_experts": 2, "intermediate_size_mlp": 24, "attention_chunk_size": 3},
        },
        ["layer_types", "no_rope_layers", "moe_layers"],
        [1, 0, 0, 3],
    ),
    "JambaForCausalLM": (
        {
            **{"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2},
            **{"expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, **MAMBA},
        },
        [],
        [0, 1, 2, 3],
    ),
    "GPTNeoForCausalLM": (
        {
            **{"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 3},
            "max_position_embeddings": 20,
        },
        ["attention_layers"],
        [1, 1, 2],
    ),
    "Ernie4_5_MoeForCausalLM": (
        {
            **{"num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_interval": 2, "moe_num_experts": 2},
            **{"moe_k": 1, "moe_num_shared_experts": 1, "moe_intermediate_size": 8},
        },
        [],
        [0, 1, 1, 4],
    ),
    "Glm4MoeForCausalLM": (
        {"num_hidden_layers": 3, "first_k_dense_replace": 1, **LATENT, "n_shared_experts": 1},
        [],
        [0, 0, 2, 1],
    ),
    "ModernBertForMaskedLM": (
        {"num_hidden_layers": 6, "local_attention": 4, "global_attn_every_n_layers": 3},
        ["layer_types"],
        [0, 3, 5, 4],
    ),
    "Lfm2ForCausalLM": (
        {"num_hidden_layers": 4, "full_attn_idxs": [1, 3], "conv_L_cache": 2},
        ["layer_types"],
        [0, 1, 3, 2],
    ),
    "Qwen3NextForCausalLM": (
        {
            **{"num_hidden_layers": 4, "full_attention_interval": 2, "linear_num_value_heads": 2, **SPARSE},
            **{"linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
        },
        ["layer_types"],
        [1, 0, 3, 2],
    ),
    "LongformerForMaskedLM": ({"num_hidden_layers": 3, "attention_window": [4, 8, 16]}, [], [2, 0, 1, 2]),
    "NemotronHForCausalLM": (
        {
            **{"layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_groups": 1, "ssm_state_size": 4},
            **{"mamba_num_heads": 2, "mamba_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1},
            "moe_intermediate_size": 8,
        },
        [],
        [1, 0, 3, 2, 2],
    ),
    "xLSTMForCausalLM": ({"num_hidden_layers": 3, "num_heads": 2}, [], [1, 0, 2, 2]),
    "RecurrentGemmaForCausalLM": (
        {
            "num_hidden_layers": 4,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 3,
            "lru_width": 16,
        },
        [],
        [1, 1, 0],
    ),
}
MODEL_LISTS = ("layer_types", "layers_block_type", "attention_window")


def saved(folder, architecture, options, left_out=()):
    """A model of random weights, whose configuration does not say what it can derive."""
    own = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = own(own.config_class(**{**SIZES, **options})).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:  # layers in another order must give other logits
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in left_out} | {
        key: value for key, value in options.items() if key not in config and key not in left_out
    }
    (folder / "config.json").write_text(json.dumps(config))
    return own.from_pretrained(folder, dtype=torch.float32).eval()


def runs(numbers):
    """Layers as slices of which each is as long as can be."""
    slices = [[numbers[0], numbers[0] + 1]]
    for number in numbers[1:]:
        if number == slices[-1][1]:
            slices[-1][1] += 1
        else:
            slices.append([number, number + 1])
    return slices


def stacked(folder, numbers, out, other=None):
    models = [str(folder), str(other or folder)]
    slices = tuple(Slice((SliceSource(models[i % 2], tuple(layers)),)) for i, layers in enumerate(runs(numbers)))
    experts = tuple(map(RecipeExpert, dict.fromkeys(models)))
    return merge(Recipe("passthrough", experts, slices=slices), out).folder


def trace_layers(model):
    """Where a model keeps its layers."""
    count = model.config.num_hidden_layers
    return next(
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == count
    )


def by_hand(model, numbers):
    """A model with these of its layers, each as it is; only their masks are chosen by the configuration's lists."""
    model = copy.deepcopy(model)
    parent, name = trace_layers(model)
    setattr(parent, name, torch.nn.ModuleList(getattr(parent, name)[number] for number in numbers))
    for key in MODEL_LISTS:
        values = getattr(model.config, key, None)
        if isinstance(values, list) and key in vars(model.config):
            setattr(model.config, key, [values[number] for number in numbers])
    count = "num_layers" if hasattr(model.config, "num_layers") else "num_hidden_layers"
    setattr(model.config, count, len(numbers))
    if hasattr(model.config, "attention_layers"):
        model.config.attention_types = [[[model.config.attention_layers[number] for number in numbers], 1]]
    return model


@torch.no_grad()
def logits(model):
    ids = torch.arange(LENGTH)[None] % 37 + 3
    return model(input_ids=ids, **({} if "Mask" in type(model).__name__ else {"use_cache": False})).logits


@pytest.mark.parametrize("architecture", CASES)
def test_each_layer_keeps_its_type(architecture, tmp_path):
    options, left_out, numbers = CASES[architecture]
    model = saved(tmp_path / "model", architecture, options, left_out)
    stacked(tmp_path / "model", numbers, tmp_path / "out")
    merged, info = getattr(transformers, architecture).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    wanted = logits(by_hand(model, numbers))
    torch.testing.assert_close(logits(merged.eval()), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_rules_that_lists_replace_do_not_stay(tmp_path):
    """Readers that know the pattern alone would take it for the merged model's."""
    for architecture, gone in (
        ("Gemma3ForCausalLM", "sliding_window_pattern"),
        ("Qwen2ForCausalLM", "max_window_layers"),
        ("SmolLM3ForCausalLM", "no_rope_layer_interval"),
        ("Llama4ForCausalLM", "interleave_moe_layer_step"),
    ):
        options, left_out, numbers = CASES[architecture]
        saved(tmp_path / architecture, architecture, options, left_out)
        assert gone in config_of(tmp_path / architecture)
        assert gone not in config_of(stacked(tmp_path / architecture, numbers, tmp_path / f"{architecture} out"))


def test_rules_that_still_hold_are_kept(tmp_path):
    options, left_out, _ = CASES["JambaForCausalLM"]
    saved(tmp_path / "jamba", "JambaForCausalLM", options, left_out)
    config = config_of(stacked(tmp_path / "jamba", [0, 1, 2, 3, 4, 5], tmp_path / "out"))
    assert (config["attn_layer_period"], config["attn_layer_offset"]) == (3, 1)
    config = config_of(stacked(tmp_path / "jamba", [1, 2], tmp_path / "cut"))  # the first has attention and experts
    assert config["attn_layer_period"] > 1 and config["attn_layer_offset"] == config["expert_layer_offset"] == 0


REFUSED = {
    "dense layers behind sparse ones": ("DeepseekV3ForCausalLM", [0, 2, 1], "first_k_dense_replace"),
    "no period": ("JambaForCausalLM", [0, 0, 1, 1], "attn_layer_period and attn_layer_offset"),
    "sparse layers in no step": ("Ernie4_5_MoeForCausalLM", [1, 1, 0, 1], "moe_layer_interval and"),
    "ModernBERT's first layer has a norm less": (
        "ModernBertForMaskedLM",
        [3, 1, 2],
        "layer 0 .* would not be layer 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inexpressible_slices_are_refused_naming_the_key(case, tmp_path):
    architecture, numbers, said = REFUSED[case]
    options, left_out, _ = CASES[architecture]
    saved(tmp_path / "model", architecture, options, left_out)
    with pytest.raises(FusionError, match=said):
        stacked(tmp_path / "model", numbers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_depend_on_their_index_are_refused(tmp_path):
    options = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 20, "scale_attn_by_inverse_layer_idx": True}
    saved(tmp_path / "gpt2", "GPT2LMHeadModel", options)
    with pytest.raises(FusionError, match="scale_attn_by_inverse_layer_idx"):
        stacked(tmp_path / "gpt2", [1, 2], tmp_path / "out")
    stacked(tmp_path / "gpt2", [0, 1], tmp_path / "out")  # they keep it
    saved(tmp_path / "diff", "DiffLlamaForCausalLM", {"num_hidden_layers": 3, "num_key_value_heads": 2})
    with pytest.raises(FusionError, match="layer 0 of the merged model would not be layer 1 .*lambda_init"):
        stacked(tmp_path / "diff", [1, 2], tmp_path / "out 2")


def test_layers_with_other_rotary_embeddings_are_refused(tmp_path):
    for name, theta in (("one", 10_000.0), ("two", 500_000.0)):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        saved(tmp_path / name, "LlamaForCausalLM", {"num_hidden_layers": 2, **rope})
    with pytest.raises(FusionError, match=r"rope_parameters is .* in .*one and .* in .*two"):
        stacked(tmp_path / "one", [0, 0, 1], tmp_path / "out", other=tmp_path / "two")


def test_shared_keys_and_values_and_embeddings_of_each_layer(tmp_path):
    """Gemma 4's last layers take the keys and values of the last full and sliding layer before them."""
    types = ["full_attention", "sliding_attention"]
    options = {
        **{"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": types * 2 + types[::-1]},
        **{"hidden_size_per_layer_input": 0, "global_head_dim": 8, "vocab_size_per_layer_input": 40},
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in types},
    }
    model = saved(tmp_path / "gemma", "Gemma4ForCausalLM", options)
    config = config_of(stacked(tmp_path / "gemma", [0, 2, 3, 4, 5, 5], tmp_path / "out"))
    assert (config["num_kv_shared_layers"], config["num_hidden_layers"]) == (3, 6)
    for numbers, said in (
        ([0, 1, 4, 5], "uses keys and values of its layer 3"),
        ([0, 4, 2, 3, 5], "uses keys and values of a layer before it"),
    ):
        with pytest.raises(FusionError, match=said):
            stacked(tmp_path / "gemma", numbers, tmp_path / "refused")
    merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = by_hand(model, [0, 2, 3, 4, 5, 5]).model
    wanted.first_kv_shared_layer_idx = 3
    ids = torch.arange(LENGTH)[None] + 3
    out = [each(ids, output_hidden_states=True)[0] for each in (merged.model, wanted)]
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)
    with pytest.raises(FusionError, match="transformers makes it"):  # it has the last layer attend to all
        stacked(tmp_path / "gemma", [0, 1], tmp_path / "refused")
    options = {**options, "hidden_size_per_layer_input": 4}
    saved(tmp_path / "embeddings", "Gemma4ForCausalLM", options)
    with pytest.raises(FusionError, match="it has a part per layer, which slices do not include"):
        stacked(tmp_path / "embeddings", [0, 2, 3, 5], tmp_path / "refused")


def test_cross_attention_layers_are_renumbered(tmp_path):
    options = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    saved(tmp_path / "mllama", "MllamaForCausalLM", options)
    stacked(tmp_path / "mllama", [0, 1, 3, 2], tmp_path / "out")
    assert config_of(tmp_path / "out")["cross_attention_layers"] == [1, 2]


def test_outputs_of_a_backbone_are_renumbered(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = transformers.Dinov2Backbone(transformers.Dinov2Config(**sizes, out_indices=[0, 2, 4]))
    model.save_pretrained(tmp_path / "dino")
    stacked(tmp_path / "dino", [1, 0, 3], tmp_path / "out")
    merged = transformers.Dinov2Backbone.from_pretrained(tmp_path / "out")
    assert list(merged.out_indices) == [0, 1, 3] and merged.out_features == ["stem", "stage1", "stage3"]
    with pytest.raises(FusionError, match="out_indices needs the output of layer 1"):
        stacked(tmp_path / "dino", [0, 3], tmp_path / "refused")


def test_multi_token_prediction_layers_are_not_sliced(tmp_path):
    options, left_out, _ = CASES["DeepseekV3ForCausalLM"]
    saved(tmp_path / "model", "DeepseekV3ForCausalLM", {**options, "num_nextn_predict_layers": 1}, left_out)
    config = config_of(stacked(tmp_path / "model", [0, 1, 2], tmp_path / "out"))
    assert config["num_nextn_predict_layers"] == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 3
