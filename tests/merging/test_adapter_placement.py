"""Adapters whose paths differ from the checkpoint's names, merged as by PEFT."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from hf_fusion.errors import FusionError
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.loaded_merges import load_merged
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"image_size": 8, "patch_size": 4}
TEXT = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = BertConfig(vocab_size=32, **SIZES)
CLIP = CLIPConfig(text_config=TEXT | SIZES, vision_config=IMAGES | SIZES, projection_dim=8)
LLAVA = LlavaConfig(
    text_config={"model_type": "llama", **TEXT, **SIZES},
    vision_config={"model_type": "clip_vision_model", **IMAGES, **SIZES},
    image_token_id=7,
)
T5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
IDS = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
OLD_LLAVA = {  # as files of transformers before 4.52 have it
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
NEW_LLAVA = {old: new for new, old in OLD_LLAVA.items()}
ATTENTION = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
EYES = {"r": 2, "target_modules": r"vision_model.*q_proj"}
ENCODER = {"r": 2, "target_modules": ["q"]}
# the class that the base is saved as, its configuration, and the class that the adapter is trained on, its settings,
# what the model reads
CASES = {
    "a classifier on a body": (
        ("BertModel", BERT),
        ("BertForSequenceClassification", {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        IDS,
    ),
    "a head of two layers on a body": (
        ("RobertaModel", RobertaConfig(vocab_size=32, **SIZES)),
        ("RobertaForSequenceClassification", {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
        IDS,
    ),
    "a tagger on a body that has a pooler": (
        ("BertModel", BERT),
        ("BertForTokenClassification", {"r": 2, "target_modules": ["query"], "task_type": "TOKEN_CLS"}),
        IDS,
    ),
    "a classifier on a body of transposed layers": (
        ("GPT2Model", GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TEXT)),
        ("GPT2ForSequenceClassification", {"r": 2, "target_modules": ["c_attn", "c_proj"], "task_type": "SEQ_CLS"}),
        IDS,
    ),
    "a classifier on another head": (
        ("LlamaForCausalLM", LlamaConfig(**TEXT, **SIZES)),
        ("LlamaForSequenceClassification", {**ATTENTION, "task_type": "SEQ_CLS"}),
        IDS,
    ),
    "a classifier on a mixture": (
        ("MixtralForCausalLM", MixtralConfig(num_local_experts=2, num_key_value_heads=2, **TEXT, **SIZES)),
        ("MixtralForSequenceClassification", {**ATTENTION, "task_type": "SEQ_CLS"}),
        IDS,
    ),
    "a body of a classifier": (
        ("BertForSequenceClassification", BERT),
        ("BertModel", {"r": 2, "target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
        IDS,
    ),
    "layers that were renamed": (
        ("ViTForImageClassification", ViTConfig(**IMAGES, **SIZES)),
        ("ViTForImageClassification", {"r": 2, "target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}),
        PIXELS,
    ),
    "an image classifier on a body": (
        ("ViTModel", ViTConfig(**IMAGES, **SIZES)),
        ("ViTForImageClassification", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]}),
        PIXELS,
    ),
    "one tower of two alike": (("CLIPModel", CLIP), ("CLIPVisionModel", ATTENTION), PIXELS),
    "a tower's own": (("CLIPVisionModel", CLIP.vision_config), ("CLIPVisionModel", ATTENTION), PIXELS),
    "the whole on a tower": (
        ("CLIPVisionModel", CLIP.vision_config),
        ("CLIPModel", EYES),
        PIXELS,
    ),
    "an encoder of the whole": (
        ("T5ForConditionalGeneration", T5),
        ("T5EncoderModel", ENCODER),
        IDS,
    ),
    "images and text": (("LlavaForConditionalGeneration", LLAVA), ("LlavaForConditionalGeneration", ATTENTION), IDS),
}


def save_base(folder, name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def save_adapter(folder, base, name, seed=1, **settings):
    """A PEFT adapter with random weights, trained on a class that loads the base; gives back PEFT's own merge."""
    model = getattr(transformers, name).from_pretrained(base)
    theirs = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(seed)
    for own, parameter in theirs.named_parameters():
        if "lora_" in own or "modules_to_save" in own:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    return theirs.eval()


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def rename(file, prefixes, start=""):
    """Gives tensors of a file the names of another layout."""
    tensors = {}
    for name, tensor in load_file(file).items():
        bare = name.removeprefix(start)
        new = next((key for key in prefixes if bare.startswith(key)), "")
        tensors[start + prefixes.get(new, "") + bare.removeprefix(new)] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def merged(folder, *adapters, method="linear", base=None, **parameters):
    recipe = Recipe(method, tuple(RecipeExpert(str(own)) for own in adapters), base and str(base), parameters)
    return load_merged(merge(recipe, folder).folder)


@pytest.mark.parametrize("case", CASES)
def test_equals_merge_by_peft(case, tmp_path):
    (saved_as, config), (trained_on, settings), inputs = CASES[case]
    base = save_base(tmp_path / "base", saved_as, config)
    if case == "the whole on a tower":
        whole = save_base(tmp_path / "whole", "CLIPModel", CLIP)
        save_adapter(tmp_path / "adapter", whole, trained_on, **settings)
        edit(tmp_path / "adapter", base_model_name_or_path=str(base))
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        theirs = getattr(transformers, saved_as).from_pretrained(base)
        state = theirs.state_dict()
        for key in [key for key in tensors if "lora_A" in key]:
            path = key.removeprefix("base_model.model.vision_model.").removesuffix(".lora_A.weight")
            update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * (8 / 2)  # alpha, rank
            state[f"{path}.weight"] += update
    else:
        theirs = save_adapter(tmp_path / "adapter", base, trained_on, **settings).merge_and_unload()
    ours = merged(tmp_path / "out", tmp_path / "adapter")
    expected, state = theirs.state_dict(), ours.state_dict()
    if type(ours) is type(theirs):
        assert state.keys() == expected.keys()
        torch.testing.assert_close(outputs(ours, inputs), outputs(theirs, inputs), rtol=1e-5, atol=1e-5)
    else:  # the whole of which the adapter was trained on a part, or a head above it
        assert type(ours).__name__ == saved_as
        part = ours.vision_model if "tower" in case else ours.encoder if "encoder" in case else ours.base_model
        found = part.state_dict()
        wanted = {key.removeprefix("encoder.") if "encoder" in case else key: own for key, own in expected.items()}
        assert len(found.keys() & wanted.keys()) >= len(found) - 1
        for key in found.keys() & wanted.keys():
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-6)
    plain = getattr(transformers, saved_as).from_pretrained(base).state_dict()
    assert any(key not in plain or (tensor - plain[key]).abs().max() > 1e-2 for key, tensor in state.items())


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("files", ["old", "new"])
@pytest.mark.parametrize("paths", ["old", "new"])
def test_images_and_text_in_every_layout(files, paths, tmp_path):
    """By module names of today against files of yesterday, and the other way round."""
    base = save_base(tmp_path / "base", "LlavaForConditionalGeneration", LLAVA)
    settings = {"r": 2, "target_modules": ["q_proj", "linear_1", "lm_head"]}  # both towers, what joins them, the head
    theirs = save_adapter(tmp_path / "adapter", base, "LlavaForConditionalGeneration", **settings)
    expected = outputs(theirs.merge_and_unload(), IDS)
    stored = load_file(base / "model.safetensors")
    if any(name.startswith("model.") for name in stored) != (files == "new"):
        rename(base / "model.safetensors", NEW_LLAVA if files == "new" else OLD_LLAVA)
    if paths == "old":
        rename(tmp_path / "adapter" / "adapter_model.safetensors", OLD_LLAVA, "base_model.model.")
    ours = merged(tmp_path / "out", tmp_path / "adapter")
    torch.testing.assert_close(outputs(ours, IDS), expected, rtol=1e-5, atol=1e-5)
    assert load_file(base / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


LABELS = {0: "no", 1: "yes", 2: "maybe"}


def test_a_new_head_brings_its_labels(tmp_path):
    base = save_base(tmp_path / "base", "BertModel", BERT)
    for name in ("named", "unnamed"):
        trained = BertForSequenceClassification.from_pretrained(base, num_labels=3)
        get_peft_model(trained, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(
            tmp_path / name
        )
    (tmp_path / "named" / "config.json").write_text(json.dumps({"id2label": LABELS}))
    assert merged(tmp_path / "one", tmp_path / "named").config.id2label == LABELS
    ours = merged(tmp_path / "two", tmp_path / "unnamed")
    assert ours.config.id2label == {number: f"LABEL_{number}" for number in range(3)}
    assert outputs(ours, IDS).shape == (2, 3)
    # the config says what is there: nothing of the checkpoint is left that the class does not use
    assert load_file(tmp_path / "two" / "model.safetensors").keys() == ours.state_dict().keys()


def test_several_adapters_on_a_headless_base(tmp_path):
    """The body has no head: the experts' own are left out where the recipe says so."""
    base = save_base(tmp_path / "base", "BertModel", BERT)
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    theirs = [
        save_adapter(tmp_path / str(seed), base, "BertForSequenceClassification", seed, **settings).merge_and_unload()
        for seed in (1, 2)
    ]
    adapters = [tmp_path / "1", tmp_path / "2"]
    with pytest.raises(FusionError, match=r"classifier\.weight"):
        merged(tmp_path / "out", *adapters, method="task_arithmetic", base=base)
    ours = merged(tmp_path / "out", *adapters, method="task_arithmetic", base=base, scaling=1.0, mismatch="skip")
    start = BertModel.from_pretrained(base).state_dict()
    for name, tensor in ours.state_dict().items():
        expected = start[name] + sum(model.bert.state_dict()[name] - start[name] for model in theirs)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


MISFITS = {
    "another architecture": (
        ("LlamaForCausalLM", LlamaConfig(**TEXT, **SIZES)),
        r"1 adapts bert\.encoder\.layer\.0\.attention\.self\.query, which .*base \(LlamaForCausalLM\) does not have",
    ),
    "another width": (
        ("BertModel", BertConfig(vocab_size=32, **{**SIZES, "hidden_size": 8})),
        r"1: bert\.encoder.*query has shape \[8, 8\] in .*base, but the update has \[16, 16\]",
    ),
    "fewer layers": (
        ("BertModel", BertConfig(vocab_size=32, **{**SIZES, "num_hidden_layers": 1})),
        r"1 adapts bert\.encoder\.layer\.1\.attention\.self\.query, which .*base \(BertModel\) does not have; the "
        "adapter was trained on a BertForSequenceClassification",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_mismatched_bases_are_reported(case, tmp_path):
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    own = save_base(tmp_path / "own", "BertModel", BERT)
    save_adapter(tmp_path / "1", own, "BertForSequenceClassification", **settings)
    (name, config), match = MISFITS[case]
    edit(tmp_path / "1", base_model_name_or_path=str(save_base(tmp_path / "base", name, config)))
    with pytest.raises(FusionError, match=match) as error:
        merged(tmp_path / "out", tmp_path / "1")
    assert "base: owner/name" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_layer_missing_in_both_models_is_refused(tmp_path):
    """A masked language model has no pooler, which the classifier needs and the adapter did not save."""
    base = save_base(tmp_path / "base", "BertForMaskedLM", BERT)
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    save_adapter(tmp_path / "1", base, "BertForSequenceClassification", **settings)
    with pytest.raises(FusionError, match=r"whose bert\.pooler\.dense\.weight is in neither the adapter nor"):
        merged(tmp_path / "out", tmp_path / "1")


def test_untrained_head_is_refused(tmp_path):
    """A tagger of which the adapter left the head out: nothing would fill it."""
    base = save_base(tmp_path / "base", "BertModel", BERT)
    save_adapter(tmp_path / "1", base, "BertForSequenceClassification", r=2, target_modules=["query", "classifier"])
    with pytest.raises(FusionError, match=r"1 adapts classifier, which .*does not have"):
        merged(tmp_path / "out", tmp_path / "1")


def test_an_update_of_a_tied_head_unties_it(tmp_path):
    config = LlamaConfig(**TEXT, **SIZES, tie_word_embeddings=True)
    base = save_base(tmp_path / "base", "LlamaForCausalLM", config)
    made = save_adapter(tmp_path / "1", base, "LlamaForCausalLM", r=2, target_modules=["lm_head"])
    file = tmp_path / "1" / "adapter_model.safetensors"  # without what PEFT saves beside it
    save_file({key: tensor for key, tensor in load_file(file).items() if "lora_" in key}, file)
    inputs = {"input_ids": torch.tensor([[1, 5, 9]])}
    torch.testing.assert_close(outputs(merged(tmp_path / "out", tmp_path / "1"), inputs), outputs(made, inputs))


def test_experts_of_a_mixture_that_transformers_stacks(tmp_path):
    """An adapter of before they were stacked: merged as PEFT does; a loaded model has no such linears."""
    config = MixtralConfig(num_local_experts=2, num_key_value_heads=2, **TEXT, **SIZES)
    base = save_base(tmp_path / "base", "MixtralForCausalLM", config)
    folder, tensors = tmp_path / "1", {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".experts." in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, tensor.shape[1]) * 0.3
            tensors[f"{path}.lora_B.weight"] = torch.randn(tensor.shape[0], 2) * 0.3
    settings = LoraConfig(
        r=2, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )
    settings.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(transformers.MixtralForCausalLM.from_pretrained(base), folder)
    plain = transformers.MixtralForCausalLM.from_pretrained(base)
    assert (outputs(theirs, IDS) - outputs(plain, IDS)).abs().max() > 0.1
    torch.testing.assert_close(
        outputs(merged(tmp_path / "out", folder), IDS), outputs(theirs, IDS), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(
        FusionError, match=r"experts\.0\.w1, which is part of model\.layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        load_experts([folder])
