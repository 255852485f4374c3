"""Adapters read without peft equal what peft computes; unsupported ones are refused by name."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_linearized, vit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GPT2Config,
)

from hf_fusion.errors import FusionError
from hf_fusion.hub.adapter_placement import rename_to_base
from hf_fusion.hub.lora import config_problems, fit_problems, read_adapter
from hf_fusion.hub.peft_names import adapter_shapes

CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
)
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
INPUT = torch.arange(2, 14).reshape(2, 6)


def bert():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BERT).eval()


def gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2).eval()


def save_adapter(folder, base, **options):
    """A PEFT adapter with random weights in every tensor; gives back the PEFT model."""
    peft_model = get_peft_model(base, LoraConfig(**options)).eval()
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft_model.save_pretrained(folder)
    return peft_model


def merged(base, adapter):
    """The base with ``W + B @ A`` in place of W, and with the saved tensors."""
    state = base.state_dict()
    for path, (a, b) in adapter.lora.items():
        update = b @ a
        weight = state[f"{path}.weight"]
        state[f"{path}.weight"] = weight + (update if update.shape == weight.shape and "c_" not in path else update.T)
    base.load_state_dict(state | adapter.saved)
    return base


MIXES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "alpha below rank": {"r": 8, "lora_alpha": 1, "target_modules": ["query", "value", "dense"]},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query", "key"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query", "value", "dense"],
        "rank_pattern": {"query": 2, r"layer\.1\..*dense": 6, "layer.0.output.dense": 3},
        "alpha_pattern": {"layer.0.attention.self.value": 32, "^bert.encoder.layer.1.attention.self.query": 5},
    },
    "rslora and patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"value": 3},
    },
}


@pytest.mark.parametrize("mix", MIXES)
def test_equals_peft(mix, tmp_path):
    theirs = save_adapter(tmp_path, bert(), task_type="SEQ_CLS", **MIXES[mix])
    adapter = read_adapter(tmp_path, "me/adapter")
    assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    assert fit_problems(adapter, bert()) == []
    with torch.no_grad():
        ours = merged(bert(), adapter)(INPUT).logits
        assert (ours - theirs(INPUT).logits).abs().max() <= 1e-6
        assert (ours - bert()(INPUT).logits).abs().max() > 1e-2


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_equals_peft_on_conv1d(fan_in_fan_out, tmp_path):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": fan_in_fan_out}
    theirs = save_adapter(tmp_path, gpt2(), task_type="CAUSAL_LM", **options)
    adapter = read_adapter(tmp_path, "me/adapter")
    a, b = adapter.lora["transformer.h.0.attn.c_attn"]
    assert (a.shape, b.shape) == ((4, 16), (48, 4))
    assert fit_problems(adapter, gpt2()) == []
    with torch.no_grad():
        difference = merged(gpt2(), adapter)(INPUT).logits - theirs(INPUT).logits
    assert difference.abs().max() <= 1e-6


def test_reads_base_and_revision(tmp_path):
    save_adapter(tmp_path, bert(), **MIXES["plain"], revision="a" * 40)
    edit(tmp_path, base_model_name_or_path="me/base")
    adapter = read_adapter(tmp_path, "me/adapter")
    assert (adapter.base, adapter.base_revision) == ("me/base", "a" * 40)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": {"word_embeddings": [1]}}, "trainable_token_indices"),
        ({"target_parameters": ["intermediate.dense.weight"]}, "target_parameters"),
    ],
)
def test_adapters_that_b_a_cannot_express_are_refused(options, field, tmp_path):
    save_adapter(tmp_path, bert(), **MIXES["plain"], **options)
    with pytest.raises(FusionError, match=rf"me/adapter.*{field}"):
        read_adapter(tmp_path, "me/adapter")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"r": 0}, "r=0"),
        ({"r": 5}, "ranks of .* disagree"),
        ({"r": "4"}, "r is '4', expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a number"),
        ({"rank_pattern": {"(": 2}}, r"invalid pattern '\('"),
        ({"alpha_pattern": {"query": "8"}}, "alpha_pattern"),
    ],
)
def test_refuses_config_by_field(fields, named, tmp_path):
    save_adapter(tmp_path, bert(), **MIXES["plain"])
    edit(tmp_path, **fields)
    with pytest.raises(FusionError, match=f"me/adapter.*{named}"):
        read_adapter(tmp_path, "me/adapter")


def test_refuses_embeddings(tmp_path):
    save_adapter(tmp_path, bert(), r=4, target_modules=["word_embeddings"])
    with pytest.raises(FusionError, match="word_embeddings.*linear"):
        read_adapter(tmp_path, "me/adapter")


def test_refuses_convolutions(tmp_path):
    save_adapter(tmp_path, vit(["x", "y"]), r=4, target_modules=["projection"])
    with pytest.raises(FusionError, match="adapts .*projection, which is not a linear layer"):
        read_adapter(tmp_path, "me/adapter")


def test_names_nan(tmp_path):
    save_adapter(tmp_path, bert(), **MIXES["plain"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(FusionError, match=f"me/adapter has NaN or Inf in {key.removeprefix('base_model.model.')}"):
        read_adapter(tmp_path, "me/adapter")


def test_broken_files_are_named(tmp_path):
    save_adapter(tmp_path, bert(), **MIXES["plain"])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no header")
    with pytest.raises(FusionError, match="me/adapter: adapter_model.safetensors cannot be read"):
        read_adapter(tmp_path, "me/adapter")
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(FusionError, match="adapter_config.json is not a JSON object"):
        read_adapter(tmp_path, "me/adapter")


def test_pickle_only_by_name(tmp_path):
    save_adapter(tmp_path, bert(), **MIXES["plain"])
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    expected = read_adapter(tmp_path, "me/adapter")
    path.unlink()
    with pytest.raises(FusionError, match="only pickle weights"):
        read_adapter(tmp_path, "me/adapter")
    read = read_adapter(tmp_path, "me/adapter", allow_pickle=True)
    assert all(torch.equal(read.lora[path][1], b) for path, (_, b) in expected.lora.items())


def test_fit_problems_name_the_module(tmp_path):
    save_adapter(tmp_path, bert(), task_type="SEQ_CLS", **MIXES["plain"])
    adapter = read_adapter(tmp_path, "me/adapter")
    with torch.device("meta"):
        wide = AutoModelForSequenceClassification.from_config(
            BertConfig(**{**BERT.to_dict(), "hidden_size": 32, "num_labels": 3})
        )
        shallow = AutoModelForSequenceClassification.from_config(
            BertConfig(**{**BERT.to_dict(), "num_hidden_layers": 1})
        )
        more_classes = AutoModelForSequenceClassification.from_config(BertConfig(**{**BERT.to_dict(), "num_labels": 7}))
    assert any(
        "query maps 32 to 32 features in the base, 16 to 16 in the adapter" in problem
        for problem in fit_problems(adapter, wide)
    )
    assert any("layer.1" in problem and "does not have" in problem for problem in fit_problems(adapter, shallow))
    assert fit_problems(adapter, more_classes) == []  # only the class dimension differs


def test_config_problems_empty_for_plain_lora():
    assert config_problems(LoraConfig(r=4, target_modules=["query"]).to_dict() | {"peft_type": "LORA"}) == []


def test_adapter_of_a_submodule_is_placed(tmp_path):
    """As those of CLIP's vision tower, whose paths start there; where two parts would do, it stays as it is."""
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **CLIP)
    clip = CLIPModel(CLIPConfig(text_config={**CLIP, "hidden_size": 48}, vision_config=vision.to_dict()))
    save_adapter(tmp_path, copy.deepcopy(clip.vision_model), r=4, target_modules=["q_proj"])
    adapter = read_adapter(tmp_path, "me/adapter")
    assert fit_problems(adapter, clip)
    [path] = [path for path in adapter.lora if ".0." in path]
    assert rename_to_base(adapter, clip).lora[f"vision_model.{path}"][1] is adapter.lora[path][1]
    assert fit_problems(rename_to_base(adapter, clip), clip) == []
    alike = CLIPModel(CLIPConfig(text_config=CLIP, vision_config=vision.to_dict()))
    assert f"vision_model.{path}" in rename_to_base(adapter, alike).lora  # two towers alike: it records its class
    assert rename_to_base(dataclasses.replace(adapter, model_class=""), alike).lora.keys() == adapter.lora.keys()
    assert rename_to_base(adapter, clip.vision_model).lora.keys() == adapter.lora.keys()


def clip():
    return CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**CLIP, image_size=32, patch_size=16)))


def linearized(layer, inputs):
    """What an L-LoRA module gives, by the paper's formula: the layer at its start, and the derivative there."""
    start = {name: tensor.detach().clone() for name, tensor in layer.start.items()}
    now = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    moved = {name: now[name] - start[name] for name in start}
    value, change = torch.func.jvp(lambda own: torch.func.functional_call(layer, own, (inputs,)), (start,), (moved,))
    return value + change


OPTIONS = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])


@pytest.mark.long
def test_a_linearized_lora_is_a_lora(tmp_path):
    layers = save_linearized(tmp_path, clip().vision_model, OPTIONS)
    adapter = read_adapter(tmp_path, "l-lora")
    assert adapter.lora.keys() == layers.keys()
    inputs = torch.randn(3, 5, 32)
    for path, layer in layers.items():
        a, b = adapter.lora[path]
        plain = layer.base_layer(inputs) + inputs @ a.T @ b.T
        torch.testing.assert_close(plain, linearized(layer, inputs))
        assert not torch.allclose(plain, layer(inputs), atol=1e-3)  # as a LoRA of its trained A it would be another
    assert set(rename_to_base(adapter, clip()).lora) == {f"vision_model.{path}" for path in layers}


def test_a_linearized_lora_that_starts_elsewhere_is_refused(tmp_path):
    save_linearized(tmp_path, clip().vision_model, OPTIONS, start_b=0.1)
    with pytest.raises(FusionError, match=r"l-lora was linearised at a B other than 0 \(encoder\.layers\.0"):
        read_adapter(tmp_path, "l-lora")


@pytest.mark.parametrize("called", ["default", "cola", "v1.2"])
def test_parameter_names_with_an_adapter_name_are_read(called, tmp_path):
    """A state dict as it is: what `get_peft_model_state_dict` would have taken the adapter's name from."""
    theirs = save_adapter(tmp_path, bert(), r=2, target_modules=["query", "dense"], task_type="SEQ_CLS")
    whole = {
        key.replace(".default.", f".{called}."): tensor.clone()
        for key, tensor in theirs.state_dict().items()
        if "lora_" in key or "modules_to_save" in key or "original_module" in key
    }
    file = tmp_path / "adapter_model.safetensors"
    plain, expected = load_file(file), read_adapter(tmp_path, "me/plain")
    for prefix in ("base_model.model.", ""):  # with it from a PeftModel, without from transformers' add_adapter
        stored = {prefix + key.removeprefix("base_model.model."): tensor for key, tensor in whole.items()}
        save_file(stored, file)
        adapter = read_adapter(tmp_path, "me/state")
        assert adapter.lora.keys() == expected.lora.keys() and adapter.saved.keys() == expected.saved.keys()
        assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
        for path, (a, b) in adapter.lora.items():
            assert torch.equal(a, expected.lora[path][0]) and torch.equal(b, expected.lora[path][1])
        shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
        lora, saved = adapter_shapes(shapes, "me/state")  # from headers alone
        assert lora == {path: (a.shape[1], b.shape[0]) for path, (a, b) in expected.lora.items()}
        assert saved == {key: tuple(tensor.shape) for key, tensor in expected.saved.items()}
    if called == "default":  # PEFT reads halves of LoRA with that name too
        heads = {key: tensor for key, tensor in plain.items() if "lora_" not in key}
        save_file({key: tensor for key, tensor in whole.items() if "lora_" in key} | heads, file)
        with torch.no_grad():
            loaded = PeftModel.from_pretrained(bert(), tmp_path)(INPUT).logits
            assert (merged(bert(), adapter)(INPUT).logits - loaded).abs().max() <= 1e-6


def test_a_file_of_several_adapters_is_refused(tmp_path):
    theirs = save_adapter(tmp_path, bert(), r=2, target_modules=["query"])
    theirs.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    save_file(
        {key: tensor.clone() for key, tensor in theirs.state_dict().items() if "lora_" in key},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(FusionError, match="me/both contains several adapters: default, other"):
        read_adapter(tmp_path, "me/both")
