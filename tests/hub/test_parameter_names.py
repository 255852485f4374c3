"""Parameter names, compared with those of transformers' loader."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_fusion.hub.parameter_names import build_meta_model, loaded_names

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
TEXT = LlamaConfig(**SIZES, vocab_size=64)
EYES = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=8)


def llava(seed=0, **options):
    torch.manual_seed(seed)
    parts = {"text_config": TEXT.to_dict(), "vision_config": EYES.to_dict()}
    return LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=5, **options)).eval()


@pytest.mark.parametrize("layout", ["saved", "loaded"])
def test_rearranged_class(tmp_path, layout):
    model = llava()
    model.save_pretrained(tmp_path)  # in the layout of the checkpoints that were there first
    file = tmp_path / "model.safetensors"
    if layout == "loaded":
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    stored, loaded = load_file(file), LlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    names = loaded_names(model, stored)
    assert set(names.values()) == set(loaded)
    assert (set(stored) == set(loaded)) == (layout == "loaded")
    assert all(torch.equal(stored[name], loaded[own]) for name, own in names.items())


def test_a_body_with_and_without_its_prefix():
    model = BertModel(BertConfig(**SIZES, vocab_size=64))
    known = model.state_dict()
    assert loaded_names(model, [f"bert.{name}" for name in known]) == {f"bert.{name}": name for name in known}
    assert loaded_names(model, ["cls.bias"]) == {"cls.bias": "cls.bias"}  # what it does not have keeps its name


def test_stacked_experts_keep_their_stored_names(tmp_path):
    config = MixtralConfig(**SIZES, vocab_size=64, num_local_experts=2, num_key_value_heads=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    for model, start in ((MixtralForCausalLM(config), "model."), (AutoModel.from_config(config), "")):
        names = loaded_names(model, stored)
        assert len(set(names.values())) == len(stored)
        assert {names[name] for name in experts} == {
            name.replace("block_sparse_moe", "mlp").replace("model.", start, 1) for name in experts
        }
        assert {name for name in names.values() if ".experts." not in name} >= {
            name for name in model.state_dict() if ".experts." not in name
        } - {"lm_head.weight"}


def test_meta_model_follows_the_config():
    content = {**TEXT.to_dict(), "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    found = build_meta_model(content, "me/it", 99)
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found.model.lm_head.weight.is_meta
    assert found is build_meta_model(dict(content), "me/it", 99)
    assert build_meta_model({**content, "architectures": None}, "me/it", 99).model.__class__.__name__ == "LlamaModel"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["StrangeForCausalLM"]}, "transformers has no class StrangeForCausalLM"),
        ({"architectures": ["LlamaConfig"]}, "transformers has no class LlamaConfig"),
        ({"model_type": "strange"}, "transformers does not know model_type 'strange'"),
        ({"hidden_size": "wide"}, "cannot be built|not valid"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
    ],
)
def test_configs_that_cannot_be_built_give_a_reason(change, why):
    found = build_meta_model({**TEXT.to_dict(), "architectures": ["LlamaForCausalLM"], **change}, "me/it", 99)
    assert found.model is None
    assert re.search(why, found.why)
