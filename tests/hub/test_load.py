"""Loading from folders and from memory: the right class, shared bases, no random or unsafe weights."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import BERT, SIZES, edit_json, save_adapter, save_bert
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    Qwen2Config,
    ViTConfig,
    ViTImageProcessor,
)

from hf_fusion.errors import FusionError
from hf_fusion.hub.load import load_experts
from hf_fusion.types import Expert

GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
VIT = ViTConfig(**SIZES, image_size=8, patch_size=4, id2label={0: "cat", 1: "dog"})


def test_full_model_from_folder(tmp_path):
    folder = save_bert(tmp_path / "mood", card="license: Apache-2.0\npipeline_tag: text-classification")
    (expert,) = load_experts([folder])
    assert (expert.name, expert.revision, expert.adapter) == ("mood", None, None)
    assert (expert.labels, expert.license, expert.task) == (["no", "yes", "maybe"], "apache-2.0", "text-classification")
    assert type(expert.model).__name__ == "BertForSequenceClassification"
    inputs = expert.processor(["good film", "bad"], padding=True, return_tensors="pt")
    expected = AutoModelForSequenceClassification.from_pretrained(folder)(**inputs).logits
    assert torch.equal(expert.model.eval()(**inputs).logits, expected)


def test_class_follows_the_architecture_or_the_task(tmp_path):
    save_bert(tmp_path / "mood")
    AutoModelForCausalLM.from_config(GPT2).save_pretrained(tmp_path / "writer")
    AutoModelForImageClassification.from_config(VIT).save_pretrained(tmp_path / "pets")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "pets")
    writer, pets = load_experts([tmp_path / "writer", tmp_path / "pets"])
    assert type(writer.model).__name__ == "GPT2LMHeadModel"
    assert (writer.task, writer.labels, writer.processor) == ("text-generation", [], None)
    assert (pets.task, pets.labels) == ("image-classification", ["cat", "dog"])
    assert "ImageProcessor" in type(pets.processor).__name__
    (features,) = load_experts([tmp_path / "mood"], task="feature-extraction")
    assert type(features.model).__name__ == "BertModel"
    assert features.labels == []
    with pytest.raises(FusionError, match="'juggling' is not supported"):
        load_experts([tmp_path / "mood"], task="juggling")


def test_a_head_is_never_random(tmp_path):
    save_bert(tmp_path / "trunk", auto=AutoModel)
    with pytest.raises(FusionError, match="trunk: 2 weights are missing: classifier.bias, classifier.weight"):
        load_experts([tmp_path / "trunk"], task="text-classification")
    folder = save_bert(tmp_path / "mood")
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(FusionError, match=r"mood: 16 weights are unexpected: bert.encoder.layer.1"):
        load_experts([folder])
    edit_json(folder / "config.json", num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(
        FusionError,
        match=r"mood: weights do not match .*: bert.encoder.layer.0.intermediate.dense.bias is \[24\], not \[48\]",
    ):
        load_experts([folder])


ABSURD = [{"num_hidden_layers": 10**9}, {"num_labels": 10**12}, {"hidden_size": 2 * 10**9}, {"vocab_size": 10**13}]


@pytest.mark.parametrize("promise", ABSURD)
def test_implausible_configs_take_no_memory(promise, tmp_path):
    folder = save_bert(tmp_path / "mood")
    edit_json(folder / "config.json", **promise, id2label=None)
    with pytest.raises(FusionError, match="mood: "):
        load_experts([folder])


def test_a_model_without_tensors_takes_no_memory(tmp_path):
    folder = save_bert(tmp_path / "mood")
    tensors = {name.replace("bert.", "robert."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", vocab_size=10**7)
    with pytest.raises(FusionError, match=r"mood: config.json describes 160,.* parameters that the checkpoint lacks"):
        load_experts([folder])


def test_config_numbers_that_are_not_sizes_are_ignored(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    tokens = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **tokens, num_hidden_layers=1, max_window_layers=80))
    model.save_pretrained(tmp_path / "qwen")
    others = {"num_train_timesteps": 10**6, "num_parameters": 7 * 10**9, "num_beams": 200_000, "n_tokens_seen": 10**12}
    edit_json(tmp_path / "qwen" / "config.json", **others, num_kv_shared_layers=10**6)
    (expert,) = load_experts([tmp_path / "qwen"])
    assert torch.equal(expert.model.lm_head.weight, model.lm_head.weight)


def test_layers_may_share_their_tensors(tmp_path):
    sizes = {**SIZES, "embedding_size": 8, "vocab_size": 8, "num_hidden_layers": 60}
    model = AutoModelForSequenceClassification.from_config(AlbertConfig(**sizes, id2label={0: "no", 1: "yes"}))
    assert len(model.state_dict()) < 60
    model.save_pretrained(tmp_path / "albert")
    (expert,) = load_experts([tmp_path / "albert"])
    assert expert.model.config.num_hidden_layers == 60


def test_adapters_share_one_base(tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    labels = {"irony": ("plain", "ironic"), "topic": ("war", "peace", "love")}
    theirs = {
        name: save_adapter(tmp_path / name, base, names, seed=i) for i, (name, names) in enumerate(labels.items())
    }
    experts = load_experts([tmp_path / "irony", tmp_path / "topic"])
    assert experts[0].model is experts[1].model
    for expert in experts:
        assert expert.labels == list(labels[expert.name])
        assert expert.adapter.saved["classifier.weight"].shape == (len(expert.labels), 16)
        assert expert.processor is not None
        state = theirs[expert.name].get_base_model().state_dict()
        assert torch.equal(expert.adapter.saved["classifier.bias"], state["classifier.modules_to_save.default.bias"])
        assert torch.equal(expert.model.state_dict()["bert.pooler.dense.weight"], state["bert.pooler.dense.weight"])


def test_base_override_and_loaded_base(tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    edit_json(tmp_path / "irony" / "adapter_config.json", base_model_name_or_path="nobody/nothing")
    (expert,) = load_experts([tmp_path / "irony"], base=base)
    assert expert.adapter.base == str(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    (expert,) = load_experts([tmp_path / "irony"], base=model)
    assert expert.model is model


def test_adapter_that_does_not_fit(tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    other = save_bert(tmp_path / "wide", auto=AutoModel, config=BertConfig(**{**BERT.to_dict(), "hidden_size": 32}))
    with pytest.raises(
        FusionError, match=r"adapter irony does not fit its base: .*query maps 32 to 32 features in the base, 16 to 16"
    ):
        load_experts([tmp_path / "irony"], base=other)


def test_adapter_without_its_head(tmp_path):
    """The base has no classifier and the adapter saved none: PEFT would run it with a random one."""
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    path = tmp_path / "irony" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "lora" in key}, path)
    with pytest.raises(FusionError, match=r"irony.*missing in both the adapter and its base: classifier.bias"):
        load_experts([tmp_path / "irony"])


def test_not_finite_weights_are_named(tmp_path):
    folder = save_bert(tmp_path / "mood")
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.pooler.dense.bias"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FusionError, match="mood has NaN or Inf in bert.pooler.dense.bias"):
        load_experts([folder])


def test_pickle_only_by_name(tmp_path):
    folder = save_bert(tmp_path / "mood")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FusionError, match="mood has only pickle weights") as caught:
        load_experts([folder])
    assert "allow_pickle=True" in caught.value.hint
    (expert,) = load_experts([folder], allow_pickle=True)
    assert type(expert.model).__name__ == "BertForSequenceClassification"


def test_remote_code_needs_consent(tmp_path):
    folder = save_bert(tmp_path / "mood")
    marker = tmp_path / "ran"
    (folder / "odd.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OddConfig(BertConfig):\n    model_type = 'odd'\n"
        "class OddForSequenceClassification(BertForSequenceClassification):\n    config_class = OddConfig\n"
    )
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForSequenceClassification": "odd.OddForSequenceClassification"}
    edit_json(
        folder / "config.json", model_type="odd", architectures=["OddForSequenceClassification"], auto_map=auto_map
    )
    with pytest.raises(FusionError, match="mood needs its own code"):
        load_experts([folder])
    assert not marker.exists()
    (expert,) = load_experts([folder], trust_remote_code=True)
    assert type(expert.model).__name__ == "OddForSequenceClassification"
    assert marker.exists()
    edit_json(folder / "config.json", auto_map={key: f"someone/else--{value}" for key, value in auto_map.items()})
    with pytest.raises(FusionError, match="takes its code from another repo"):
        load_experts([folder], trust_remote_code=True)


def test_dtype(tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    (expert,) = load_experts([tmp_path / "irony"], dtype=torch.bfloat16)
    assert expert.model.dtype == torch.bfloat16
    assert {a.dtype for pair in expert.adapter.lora.values() for a in pair} == {torch.bfloat16}


def test_models_and_experts_in_memory(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(BERT)
    ready = Expert(name="ready", model=model)
    loaded, same = load_experts([model, ready])
    assert same is ready
    assert (loaded.name, loaded.model, loaded.labels) == ("expert-0", model, ["no", "yes", "maybe"])
    with pytest.raises(FusionError, match="expert 0 is a int"):
        load_experts([3])


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "config.json cannot be read"), ("{}", "config.json names no architecture")]
)
def test_broken_config(content, reason, tmp_path):
    folder = save_bert(tmp_path / "mood")
    (folder / "config.json").write_text(content)
    with pytest.raises(FusionError, match=f"mood.*{reason}"):
        load_experts([folder])


def test_prints_nothing_on_stderr(tmp_path, capfd, caplog):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        load_experts([tmp_path / "irony"])
    assert capfd.readouterr().err == ""


def test_neither_folder_nor_id():
    with pytest.raises(FusionError, match="neither a folder nor a repo id"):
        load_experts(["../../etc/passwd"])
