"""Models made of slices: the source of each layer, and the merged configuration."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert, gpt2, llama, t5
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_fusion import FusionError
from hf_fusion.merging.engine.open_models import layer_depths
from hf_fusion.merging.merge import merge
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import Recipe, RecipeExpert, Slice, SliceSource

LAYERS = 4


def deep_llama(seed):
    """A Llama of four layers."""
    model = llama(seed)
    model.config.num_hidden_layers = LAYERS
    torch.manual_seed(seed)
    return type(model)(model.config).eval()


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate("abc"):
        deep_llama(seed).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in "abc"}


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def sliced(method, slices, folders, base=None, **parameters):
    """A recipe of slices written as [[(model, start, stop, settings), …], …]."""
    made = tuple(
        Slice(tuple(SliceSource(folders[m], (start, stop), *rest) for m, start, stop, *rest in sources))
        for sources in slices
    )
    names = dict.fromkeys(m for sources in slices for m, *_ in sources if m != base)
    experts = tuple(RecipeExpert(folders[name]) for name in names)
    return Recipe(method, experts, folders.get(base), parameters, slices=made)


def test_layers_of_two_models_one_after_the_other(folders, tmp_path):
    merge(sliced("passthrough", [[("a", 0, 3)], [("b", 1, 4)]], folders), tmp_path / "out")
    a, b, out = (weights(folder) for folder in (folders["a"], folders["b"], tmp_path / "out"))
    origins = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
    rests = {name.split(".", 3)[3] for name in a if ".layers." in name}
    for number, (model, layer) in enumerate(origins):
        for rest in rests:
            assert out[f"model.layers.{number}.{rest}"].equal(model[f"model.layers.{layer}.{rest}"]), (number, rest)
    assert out["model.embed_tokens.weight"].equal(a["model.embed_tokens.weight"])  # what is before: the first slice
    assert out["model.norm.weight"].equal(b["model.norm.weight"])  # what is behind: the last
    assert out["lm_head.weight"].equal(b["lm_head.weight"])
    assert len(out) == len(a) + 2 * len(rests)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 6
    ids = torch.arange(6)[None] + 3
    hidden = loaded(ids, output_hidden_states=True).hidden_states
    own = AutoModelForCausalLM.from_pretrained(folders["a"])(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(hidden[3], own[3], atol=1e-6)  # until there, it is model a


def test_depth_up_scaling_whose_new_layers_start_as_the_identity(folders, tmp_path):
    new = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]}
    recipe = sliced("passthrough", [[("a", 0, 4)], [("a", 2, 4, new)]], folders)
    merge(recipe, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 6
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(folders["a"])(ids).logits)
    assert load_recipe(tmp_path / "out") == recipe


def test_layers_are_merged_across_depths_with_a_gradient_of_each_slice(folders, tmp_path):
    recipe = sliced(
        "task_arithmetic",
        [[("a", 0, 2), ("b", 2, 4)], [("a", 1, 4), ("b", 0, 3), ("c", 1, 4)]],
        folders,
        base="a",
        scaling=[0.0, 1.0],
    )
    merge(recipe, tmp_path / "out")
    a, b, c, out = (weights(folder) for folder in (*folders.values(), tmp_path / "out"))
    name = "model.layers.{}.mlp.up_proj.weight"
    rows = [([(b, 2)], 0, 0.0), ([(b, 3)], 1, 1.0)]  # two layers: the gradient runs from 0 to 1
    rows += [([(b, i), (c, i + 1)], i + 1, depth) for i, depth in enumerate([0.0, 0.5, 1.0])]
    for number, (experts, base_layer, scaling) in enumerate(rows):
        base = a[name.format(base_layer)]
        wanted = base + scaling * sum(model[name.format(layer)] - base for model, layer in experts)
        torch.testing.assert_close(out[name.format(number)], wanted, rtol=1e-5, atol=1e-6)
    # outside of the layers a gradient is where it begins
    assert out["model.embed_tokens.weight"].equal(a["model.embed_tokens.weight"])


def test_one_source_alone_is_passed_on_by_any_method(folders, tmp_path):
    recipe = sliced("task_arithmetic", [[("a", 0, 2)], [("a", 2, 4), ("b", 2, 4)]], folders, base="a", scaling=1.0)
    merge(recipe, tmp_path / "out")
    a, b, out = (weights(folder) for folder in (folders["a"], folders["b"], tmp_path / "out"))
    assert out["model.layers.1.mlp.up_proj.weight"].equal(a["model.layers.1.mlp.up_proj.weight"])
    torch.testing.assert_close(out["model.layers.2.mlp.up_proj.weight"], b["model.layers.2.mlp.up_proj.weight"])


def test_models_of_other_depths_and_per_layer_configurations(tmp_path):
    for seed, (name, layers) in enumerate({"small": 2, "large": 5}.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen2Config(vocab_size=90, num_hidden_layers=layers, max_window_layers=1, sliding_window=4, **sizes)
        kinds = ["full_attention", "sliding_attention"]
        config.layer_types = [kinds[i % 2] for i in range(layers)]
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("small", "large")}
    merge(sliced("passthrough", [[("small", 0, 2)], [("large", 3, 5)], [("large", 1, 2)]], folders), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert loaded.config.layer_types == kinds and loaded.config.num_hidden_layers == 5
    large = weights(folders["large"])
    state = loaded.state_dict()
    assert state["model.layers.4.mlp.up_proj.weight"].equal(large["model.layers.1.mlp.up_proj.weight"])


def test_gpt2_is_cut(tmp_path):
    gpt2().save_pretrained(tmp_path / "gpt2")
    merge(sliced("passthrough", [[("gpt2", 0, 1)]], {"gpt2": str(tmp_path / "gpt2")}), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_layer == 1


def test_depths_begin_and_end_with_the_layers():
    found = layer_depths(
        ["embed.weight", *(f"encoder.layer.{i}.w" for i in range(5)), "decoder.layer.0.w", "norm.weight"]
    )
    assert list(found.values()) == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.0]
    assert layer_depths(["a.conv_layers.0.w", "a.conv_layers.1.w", "branch.1.w"]) == {
        "a.conv_layers.0.w": 0.0,
        "a.conv_layers.1.w": 1.0,
        "branch.1.w": 0.0,
    }


def test_impossible_slices_are_refused(folders, tmp_path):
    def refused(recipe, message):
        with pytest.raises(FusionError, match=message):
            merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        sliced("passthrough", [[("a", 0, 2)], [("b", 2, 6)]], folders),
        r"slices\[1\] takes layers 2 to 5 of .*b, which has 4",
    )
    refused(
        sliced("passthrough", [[("a", 0, 2), ("b", 0, 2)]], folders),
        r"passthrough merges 1 experts, slices\[0\] has 2",
    )
    refused(
        sliced("task_arithmetic", [[("a", 0, 2), ("b", 0, 2)], [("b", 2, 4)]], folders, base="a"),
        r"slices\[1\] has no layers of the base .*a, which task_arithmetic needs",
    )
    other = Slice((SliceSource(folders["b"], (0, 2)),))
    refused(Recipe("passthrough", (RecipeExpert(folders["a"]),), slices=(other,)), "neither the base nor one of the")
    t5().save_pretrained(tmp_path / "t5")
    both = sliced("passthrough", [[("t5", 0, 2)]], {"t5": str(tmp_path / "t5")})
    refused(both, r"one stack of layers; .*t5 has decoder\.block and encoder\.block")
    bert(["no", "yes"]).save_pretrained(tmp_path / "bert")
    mixed = sliced("passthrough", [[("a", 0, 1)], [("bert", 0, 1)]], folders | {"bert": str(tmp_path / "bert")})
    refused(mixed, "has no lm_head.weight, which a slice takes from it")
