"""mergekit's recipes run unchanged: examples, defaults, conventions, and errors that name the key."""

from __future__ import annotations

from string import Template

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama, make_tokenizer, t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_fusion import FusionError
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.schema import KeyPath
from hf_fusion.schema import read as read_value

LAYERS = 4

# mergekit's examples/ at 0.1.4 and those of its README and docs; models are named by one letter, layers are a tenth
EXAMPLES = {
    "linear": """
        models:
          - model: $a
            parameters:
              weight: 1.0
          - model: $b
            parameters:
              weight: 0.3
          - model: $c
            parameters:
              weight: 0.5
        merge_method: linear
        dtype: float16
        """,
    "ties": """
        models:
          - model: $a
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: $b
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: $c
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: $base
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
    "gradient-slerp": """
        slices:
          - sources:
              - model: $a
                layer_range: [0, 4]
              - model: $b
                layer_range: [0, 4]
        merge_method: slerp
        base_model: $a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: float16
        """,
    "orcamini-platy-44layer": """
        slices:
          - sources:
            - model: $a
              layer_range: [0, 3]
          - sources:
            - model: $b
              layer_range: [2, 4]
        merge_method: passthrough
        dtype: float16
        """,
    "bio-merge": """
        models:
          - model: $a
            parameters:
              density: 0.5
              weight: 0.5
          - model: $b
            parameters:
              density: 0.5
              weight: 0.5
        merge_method: ties
        base_model: $base
        parameters:
          normalize: false
          int8_mask: true
        dtype: float16
        """,
    "arcee_fusion": """
        models:
          - model: $a
          - model: $b
        merge_method: arcee_fusion
        base_model: $a
        dtype: bfloat16
        """,
    "dare_ties with the base among the models": """
        models:
          - model: $base
            # no parameters necessary for base model
          - model: $a
            parameters: {density: 0.53, weight: 0.4}
          - model: $b
            parameters: {density: 0.53, weight: 0.3}
        merge_method: dare_ties
        base_model: $base
        parameters:
          int8_mask: true
        dtype: bfloat16
        """,
    "union": """
        models:
          - model: $a
          - model: $b
        merge_method: nuslerp
        parameters:
          weight: 0.5
        tokenizer:
          source: union
          pad_to_multiple_of: 16
        chat_template: chatml
        """,
    "model_stock": """
        models: [{model: $a}, {model: $b}, {model: $c}]
        merge_method: model_stock
        base_model: $base
        tokenizer_source: base
        out_dtype: float32
        """,
}


@pytest.fixture
def folders(tmp_path):
    """A base of four layers and three fine-tunes of it, with a tokenizer."""
    state = None
    for seed, name in enumerate(("base", "a", "b", "c")):
        model = llama(seed, vocabulary=len(make_tokenizer()))
        model.config.num_hidden_layers = LAYERS
        torch.manual_seed(seed)
        model = type(model)(model.config)
        if state is not None:
            moved = {key: value + 0.02 * torch.randn_like(value) for key, value in state.items()}
            model.load_state_dict(moved)
        state = state or model.state_dict()
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("base", "a", "b", "c")}


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def read(text, folders, tmp_path):
    """A recipe of mergekit's, its models being folders."""
    file = tmp_path / "recipe.yaml"
    file.write_text(Template(text).safe_substitute(folders))
    return load_recipe(file)


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_unchanged(name, folders, tmp_path):
    recipe = read(EXAMPLES[name], folders, tmp_path)
    report = merge(recipe, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert str(loaded.dtype).removeprefix("torch.") == (recipe.dtype or "float32")
    assert loaded(torch.arange(9)[None]).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    again = load_recipe(tmp_path / "out")  # as ours: the same bytes
    assert again == report.recipe
    merge(again, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_defaults_are_mergekits(folders, tmp_path):
    text = "merge_method: METHOD\nbase_model: $base\nmodels: [{model: $a}, {model: $b}]\n"

    def parameters(method):
        return read(text.replace("METHOD", method), folders, tmp_path).parameters

    assert parameters("task_arithmetic") == {"scaling": 1.0, "normalize": False}
    assert parameters("ties") == {"scaling": 1.0, "density": 1.0, "merge": "mean", "rescale": "none"}
    assert parameters("dare_ties") == {"scaling": 1.0, "drop_rate": 0.0, "merge": "sum", "rescale": "norm"}
    assert parameters("dare_linear") == {"scaling": 1.0, "drop_rate": 0.0, "normalize": False, "rescale": "norm"}
    crumbs = {"scaling": 1.0, "density": 1.0, "gamma": 0.01, "rescale": "none"}
    assert parameters("breadcrumbs") == crumbs | {"normalize": False}
    assert parameters("breadcrumbs_ties") == crumbs | {"merge": "sum"}
    assert parameters("della") == {
        "scaling": 1.0,
        "density": 1.0,
        "epsilon": 0.0,
        "merge": "mean",
        "rescale": "norm",
        "rank": "row",
    }
    assert parameters("sce") == {"density": 1.0}


def test_della_keeps_everything_where_its_density_is_1(folders, tmp_path):
    text = """
        merge_method: della
        base_model: $base
        models:
          - {model: $a, parameters: {weight: 1, density: 0.5}}
          - {model: $b, parameters: {weight: 1, density: 0.7, epsilon: 0.1}}
          - {model: $c, parameters: {weight: 1, epsilon: 0.2}}
        """
    recipe = read(text, folders, tmp_path)
    assert recipe.parameters["density"] == 1.0 and recipe.parameters["epsilon"] == 0.0
    assert [expert.parameters["epsilon"] for expert in recipe.experts] == [0.15, 0.1, 0.0]
    merge(recipe, tmp_path / "out")
    some = read(f"{text}\n        parameters: {{density: 0.6}}\n", folders, tmp_path)
    assert some.parameters["epsilon"] == 0.15
    assert [expert.parameters["epsilon"] for expert in some.experts] == [0.15, 0.1, 0.2]


def test_weight_that_mergekit_ignores(folders, tmp_path, caplog):
    sources = "[{model: $base, layer_range: [0, 4]}, {model: $a, layer_range: [0, 4], parameters: {weight: 1}}]"
    text = f"merge_method: task_arithmetic\nbase_model: $base\nslices: [{{residual_weight: 0.5, sources: {sources}}}]\n"
    recipe = read(text, folders, tmp_path)
    assert "does not use residual_weight" in caplog.text
    assert recipe == read(text.replace("residual_weight: 0.5, ", ""), folders, tmp_path)


def test_every_method_is_one_of_ours_with_parameters_it_has():
    rows = {name: row for name, row in MERGE_METHODS.items() if row.mergekit is not None}
    for method, row in rows.items():
        known = row.parameters
        for name, parameter in row.mergekit.items():
            ours = known[parameter.ours]
            assert ours.per_expert == parameter.per_model, (method, name)
            if parameter.default is not None:
                read_value(ours.hint, parameter.value(parameter.default), KeyPath(method, name))
    # fmt: off
    assert set(rows) == {
        "linear", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "arcee_fusion", "model_stock", "passthrough",
        "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della",
        "della_linear", "sce",
    }
    # fmt: on


def test_unfiltered_tensors_fall_back_to_the_next_level(folders, tmp_path):
    """A model's filter, then the parameters of all, then mergekit's default."""
    text = """
        models:
          - model: $a
            parameters: {weight: [{filter: mlp, value: 0.25}]}
          - model: $b
        merge_method: task_arithmetic
        base_model: $base
        parameters:
          weight: [{filter: self_attn, value: 0.5}, {filter: lm_head, value: [0, 9]}, {value: 2.0}]
          lambda: [{filter: norm, value: [0, 0.5, 2]}]
        """
    merge(read(text, folders, tmp_path), tmp_path / "out")
    base, a, b, out = (weights(folder) for folder in (*list(folders.values())[:3], tmp_path / "out"))
    rows = {
        "model.layers.1.mlp.up_proj.weight": (0.25, 2.0, 1.0),
        "model.layers.1.self_attn.q_proj.weight": (0.5, 0.5, 1.0),
        # the second of four layers: a third of the way through 0, 0.5, 2
        "model.layers.1.input_layernorm.weight": (2.0, 2.0, 1 / 3),
        "model.layers.3.input_layernorm.weight": (2.0, 2.0, 2.0),
        # outside of the layers, gradients are where they begin
        "lm_head.weight": (0.0, 0.0, 1.0),
        "model.norm.weight": (2.0, 2.0, 0.0),
    }
    for name, (of_a, of_b, scaling) in rows.items():
        wanted = base[name] + scaling * (of_a * (a[name] - base[name]) + of_b * (b[name] - base[name]))
        torch.testing.assert_close(out[name], wanted, rtol=1e-5, atol=1e-6)


def test_position_of_the_base_does_not_matter(folders, tmp_path):
    def read_as(method, models, rest=""):
        listed = "".join(f"\n  - {{model: ${name}, parameters: {{weight: 1}}}}" for name in models)
        return read(f"merge_method: {method}\nbase_model: $base\nmodels:{listed}\n{rest}", folders, tmp_path)

    names = {folder: name for name, folder in folders.items()}

    def rename_to_base(recipe):
        return names.get(recipe.base), [names[expert.model] for expert in recipe.experts]

    assert rename_to_base(read_as("ties", ["a", "base", "b"])) == ("base", ["a", "b"])
    assert rename_to_base(read_as("nearswap", ["base", "a"])) == ("base", ["a"])
    assert rename_to_base(read_as("nuslerp", ["a", "b"])) == ("base", ["a", "b"])
    # those of two models begin with it; where it only lends its configuration, it comes first as well
    assert rename_to_base(read_as("slerp", ["a", "base"], "parameters: {t: 0.3}")) == (None, ["base", "a"])
    assert rename_to_base(read_as("slerp", ["a"])) == (None, ["base", "a"])
    assert rename_to_base(read_as("linear", ["a", "base", "b"])) == (None, ["base", "a", "b"])
    assert rename_to_base(read_as("linear", ["a"], "parameters: {weight: 0.5}")) == (None, ["base", "a"])
    with pytest.raises(FusionError, match="base_model .* would be merged with the others, but has no weight"):
        read_as("linear", ["a"])
    text = """
        merge_method: passthrough
        base_model: $base
        slices: [{sources: [{model: $a, layer_range: [0, 2]}]}, {sources: [{model: $b, layer_range: [1, 4]}]}]
        """
    assert rename_to_base(read(text, folders, tmp_path)) == (None, ["base", "a", "b"])
    merge(read(text, folders, tmp_path), tmp_path / "out")
    assert weights(tmp_path / "out")["lm_head.weight"].equal(weights(folders["b"])["lm_head.weight"])


def test_values_are_read_as_leniently_as_mergekit_reads_them(folders, tmp_path, caplog):
    text = """
        models: [{model: $a, parameters: {weight: "0.5", density: 0.3}}, {model: $b, parameters: {weight: 1}}]
        merge_method: linear
        parameters: {normalize: 0, int8_mask: true, lambda: 2}
        dtype: torch.bfloat16
        """
    recipe = read(text, folders, tmp_path)
    assert [expert.settings for expert in recipe.experts] == [{"weight": 0.5}, {"weight": 1.0}]
    assert recipe.parameters == {"normalize": False} and recipe.dtype == "bfloat16"
    [record] = caplog.records
    assert "linear does not use int8_mask, lambda, density: ignored" in record.getMessage()
    text = "merge_method: nearswap\nbase_model: $base\nmodels: [{model: $a}]\nparameters: {t: 1e-4}\n"
    assert read(text, folders, tmp_path).parameters == {"t": 1e-4}
    text = "merge_method: karcher\nmodels: [{model: $a}, {model: $b}]\nparameters: {max_iter: 5.0}\n"
    assert read(text, folders, tmp_path).parameters == {"max_iter": 5, "tol": 1e-5}
    text = "merge_method: nuslerp\nmodels: [{model: $a}, {model: $b}]\nparameters: {nuslerp_flatten: SWITCHES}\n"
    for flat, row_wise, per in ((True, True, "tensor"), (False, False, "row"), (False, True, "column")):
        switches = f"{flat}, nuslerp_row_wise: {row_wise}".lower()
        assert read(text.replace("SWITCHES", switches), folders, tmp_path).parameters == {"per": per}


def test_models_with_a_revision_an_adapter_or_as_mappings(folders, tmp_path):
    text = """
        merge_method: linear
        models:
          - model: owner/name@main
          - model: {path: owner/other, revision: v2}
          - model: {model: {path: owner/base, revision: v3}, lora: owner/adapter}
          - model: owner/base@v3+owner/adapter@main
        """
    assert [expert.model for expert in read(text, folders, tmp_path).experts] == [
        "owner/name@main",
        "owner/other@v2",
        "owner/base@v3+owner/adapter",
        "owner/base@v3+owner/adapter@main",
    ]


def test_an_adapter_on_the_model_before_the_plus(folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folders["base"])
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "lora")
    # trained on base, put on a
    text = "merge_method: linear\nmodels: [{model: $a+LORA, parameters: {weight: 1}}]\n"
    report = merge(read(text.replace("LORA", str(tmp_path / "lora")), folders, tmp_path), tmp_path / "out")
    assert report.recipe.experts[0].model == f"{folders['a']}+{tmp_path / 'lora'}"
    a, out = weights(folders["a"]), weights(tmp_path / "out")
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            update = 2 * adapted.get_submodule(f"base_model.model.{path}").lora_B["default"].weight @ parameter
            torch.testing.assert_close(out[f"{path}.weight"], a[f"{path}.weight"] + update, rtol=1e-5, atol=1e-6)
    assert out["lm_head.weight"].equal(a["lm_head.weight"])
    with pytest.raises(FusionError, match="b is not a LoRA adapter"):
        merge(read(text.replace("LORA", folders["b"]), folders, tmp_path), tmp_path / "other")


def test_modules_of_a_model_with_one_stack(folders, tmp_path):
    text = """
        merge_method: linear
        modules:
          default:
            slices:
              - sources:
                - {model: $a, layer_range: [0, 2], parameters: {weight: 1}}
                - {model: $b, layer_range: [2, 4]}
            parameters: {weight: [{filter: mlp, value: 3}]}
        parameters: {weight: 2}
        """
    recipe = read(text, folders, tmp_path)
    assert recipe.parameters["weight"] == [{"filter": "mlp", "value": 3.0}, {"value": 2.0}]
    assert [source.parameters for source in recipe.slices[0].sources] == [{"weight": 1.0}, {}]
    merge(recipe, tmp_path / "out")
    a, b, out = (weights(folder) for folder in (folders["a"], folders["b"], tmp_path / "out"))
    name = "model.layers.{}.mlp.up_proj.weight"
    wanted = (a[name.format(0)] + 3 * b[name.format(2)]) / 4
    torch.testing.assert_close(out[name.format(0)], wanted, rtol=1e-5, atol=1e-6)


def test_modules_of_an_encoder_and_a_decoder(tmp_path):
    for seed, name in enumerate("ab"):
        t5(seed).save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in "ab"}
    text = """
        merge_method: linear
        modules:
          encoder:
            models: [{model: $a, parameters: {weight: 3}}, {model: $b, parameters: {weight: 1}}]
          decoder:
            models: [{model: $a}, {model: $b, parameters: {weight: [0, 1]}}]
            parameters: {normalize: false}
          shared:
            models: [{model: $a}, {model: $b}]
        parameters: {weight: 1}
        """
    merge(read(text, folders, tmp_path), tmp_path / "out")
    a, b, out = (weights(folder) for folder in (*folders.values(), tmp_path / "out"))
    shares = {
        "encoder.block.1.layer.0.SelfAttention.q.weight": (0.75, 0.25),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (1.0, 0.0),
        "decoder.block.1.layer.1.EncDecAttention.q.weight": (1.0, 1.0),
        "shared.weight": (0.5, 0.5),
    }
    for name, (of_a, of_b) in shares.items():
        torch.testing.assert_close(out[name], of_a * a[name] + of_b * b[name], rtol=1e-5, atol=1e-6)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.num_layers == 2
    with pytest.raises(FusionError, match="modules lacks decoder"):
        read("merge_method: linear\nmodules: {encoder: {models: [{model: a}]}}\n", folders, tmp_path)
    with pytest.raises(FusionError, match=r"modules\.encoder merges other models than modules\.decoder"):
        read(text.replace("{model: $b, parameters: {weight: 1}}", "{model: c}"), folders, tmp_path)
