"""Each reason for rejecting an expert, from a real repo with the fault; and what is never downloaded or run."""

import copy
import json
import pickle
import re

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_peft
from tiny_experts import BERT, LABELS, edit_json, save_adapter, save_bert
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_fusion.errors import FusionError
from hf_fusion.hub.compat import ReasonKind, check_compatibility
from hf_fusion.hub.discover import discover
from hf_fusion.hub.load import load_experts

CARD = "license: mit\npipeline_tag: text-classification"


@pytest.fixture
def judge(owner):
    """Pushes one folder and gives back its reasons: ``judge(folder, **criteria) -> {kind: detail}``."""

    def judge(folder, api=None, **criteria):
        owner.push(folder.name, folder)
        experts = discover(ids=[f"{owner.name}/{folder.name}"], api=api or owner.api)
        verdict = check_compatibility(experts, api=api or owner.api, **criteria)
        assert len(verdict.accepted) + len(verdict.rejected) == 1
        return {reason.kind: reason.detail for rejected in verdict.rejected for reason in rejected.reasons}

    return judge


def based(owner, tmp_path, **options):
    """A base on the Hub and a folder with an adapter of it that records its commit."""
    base = save_bert(tmp_path / "base", auto=AutoModel)
    sha = owner.push("base", base)
    save_adapter(tmp_path / "irony", base, base_name=f"{owner.name}/base", revision=sha, **options)
    return tmp_path / "irony"


def test_good_ones_are_accepted(judge, owner, tmp_path):
    assert judge(save_bert(tmp_path / "full", card=CARD), task="text-classification", labels=LABELS) == {}
    adapter = based(owner, tmp_path)
    assert judge(adapter, task="text-classification", base_model=f"{owner.name}/base", labels=["No", "YES"]) == {}


def test_architecture(judge, tmp_path):
    save_bert(tmp_path / "full")
    assert judge(tmp_path / "full", task="text-generation") == {
        ReasonKind.ARCHITECTURE: "BertForSequenceClassification does not support text-generation"
    }
    writer = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    save_bert(tmp_path / "writer", auto=AutoModelForCausalLM, config=writer)
    assert set(judge(tmp_path / "writer", task="text-classification")) == {ReasonKind.ARCHITECTURE}
    edit_json(tmp_path / "writer" / "config.json", model_type="not-yet-invented")
    assert "does not know model_type 'not-yet-invented'" in judge(tmp_path / "writer")[ReasonKind.ARCHITECTURE]
    edit_json(tmp_path / "full" / "config.json", architectures=["BertForJuggling"])
    assert "BertForJuggling" in judge(tmp_path / "full")[ReasonKind.ARCHITECTURE]


def test_base_and_its_revision(judge, owner, tmp_path):
    adapter = based(owner, tmp_path)
    assert judge(adapter, base_model="other/base") == {
        ReasonKind.BASE: f"was made from {owner.name}/base, not other/base"
    }
    assert set(judge(adapter, base_model=f"{owner.name}/base", base_revision="b" * 40)) == {ReasonKind.BASE_REVISION}
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/home/someone/base")
    assert judge(adapter) == {ReasonKind.BASE: "records the base '/home/someone/base', which is not a repo"}
    assert judge(adapter, base_model=f"{owner.name}/base") == {}  # recorded by no adapter: the shapes are compared
    wide = save_bert(tmp_path / "wide", auto=AutoModel, config=BertConfig(**{**BERT.to_dict(), "hidden_size": 32}))
    owner.push("wide", wide)
    assert (
        "query maps 32 to 32 features in the base" in judge(adapter, base_model=f"{owner.name}/wide")[ReasonKind.SHAPES]
    )
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="nobody/nothing")
    assert "nobody/nothing was not found" in judge(adapter)[ReasonKind.BASE]


def test_shapes_of_a_full_model(judge, tmp_path):
    folder = save_bert(tmp_path / "full", card=CARD)
    edit_json(folder / "config.json", intermediate_size=48)
    assert "layer.0.intermediate.dense.bias is [24], not [48]" in judge(folder)[ReasonKind.SHAPES]
    edit_json(folder / "config.json", intermediate_size=24, num_hidden_layers=1)
    assert "layer.1" in judge(folder)[ReasonKind.SHAPES]
    edit_json(folder / "config.json", num_hidden_layers=10**9)
    assert "has num_hidden_layers=1000000000" in judge(folder)[ReasonKind.ARCHITECTURE]
    edit_json(folder / "config.json", num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert judge(folder) == {ReasonKind.SHAPES: "classifier.weight is missing"}


def test_shapes_of_an_adapter(judge, owner, tmp_path):
    adapter = based(owner, tmp_path)
    wide = save_bert(tmp_path / "wide", auto=AutoModel, config=BertConfig(**{**BERT.to_dict(), "hidden_size": 32}))
    owner.push("wide", wide)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=f"{owner.name}/wide", revision=None)
    assert "query maps 32 to 32 features in the base, 16 to 16 in the adapter" in judge(adapter)[ReasonKind.SHAPES]
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=f"{owner.name}/base")
    path = adapter / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "lora" in key}, path)
    assert "classifier.bias is in neither the adapter nor its base" in judge(adapter)[ReasonKind.SHAPES]


def test_mismatched_base_is_not_requested(judge, owner, hub, tmp_path):
    adapter = based(owner, tmp_path)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="nobody/other")
    hub.requests.clear()
    assert judge(adapter, base_model=f"{owner.name}/base") == {
        ReasonKind.BASE: f"was made from nobody/other, not {owner.name}/base"
    }
    assert not [path for _, path, _ in hub.requests if "nobody/other" in path]


def test_adapters_by_the_names_of_other_layouts(judge, owner, tmp_path):
    """As they are loaded: layers of an older ViT, a tower of a CLIP."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    images = {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(**sizes, **images))
    text = {"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    clip = CLIPModel(CLIPConfig(text_config=text | sizes, vision_config=images | sizes, projection_dim=8))
    for name, model, trained in (("vit", vit, vit), ("clip", clip, clip.vision_model)):
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil().save_pretrained(tmp_path / name)
        owner.push(name, tmp_path / name)
        folder = tmp_path / f"of-{name}"
        save_peft(get_peft_model(copy.deepcopy(trained), LoraConfig(r=2, target_modules=["q_proj"])), folder)
        edit_json(folder / "adapter_config.json", base_model_name_or_path=f"{owner.name}/{name}")
        if name == "vit":
            file = folder / "adapter_model.safetensors"
            tensors = {
                key.replace("vit.layers", "vit.encoder.layer").replace("q_proj", "attention.query"): tensor
                for key, tensor in load_file(file).items()
            }
            save_file(tensors, file)
        assert judge(folder) == {}
        load_experts([f"{owner.name}/of-{name}"], api=owner.api)
    edit_json(folder / "adapter_config.json", auto_mapping=None)  # which of two towers?
    assert "which the base does not have" in judge(folder)[ReasonKind.SHAPES]


@pytest.mark.long
def test_merging_needs_a_recorded_base(judge, owner, tmp_path):
    base = f"{owner.name}/base"
    owner.push("base", save_bert(tmp_path / "base", auto=AutoModel))
    card = f"{CARD}\nbase_model: {base}"
    how = {"base_model": base, "merging": True}
    tuned = save_bert(tmp_path / "tuned", seed=1, card=card)
    assert judge(tuned, **how) == {}
    assert judge(tuned, merging=True) == {ReasonKind.BASE: "is a full model of unknown base"}
    assert judge(save_bert(tmp_path / "stray", card=CARD), **how) == {
        ReasonKind.BASE: f"was made from an unknown base, not {base}"
    }
    adapter = based(owner, tmp_path / "adapted")
    assert judge(adapter, **how) == {}
    for name, change, found in [
        ("words", {"vocab_size": 9}, "embeddings.word_embeddings.weight has shape [9, 16], but [8, 16] in the base"),
        ("deep", {"num_hidden_layers": 3}, "has 16 tensors that the base does not have, first bert.encoder.layer.2"),
        ("shallow", {"num_hidden_layers": 1}, "lacks 16 tensors of the base, first bert.encoder.layer.1"),
    ]:
        other = save_bert(tmp_path / name, card=card, config=BertConfig(**{**BERT.to_dict(), **change}))
        assert judge(other) == {}
        assert found in judge(other, **how)[ReasonKind.SHAPES]
    tagger = save_bert(tmp_path / "tagger", auto=AutoModelForTokenClassification, card=card)
    owner.push("tagger", tagger)
    ids = [f"{owner.name}/{name}" for name in ("tuned", "irony", "tagger")]
    verdict = check_compatibility(discover(ids=ids, api=owner.api), api=owner.api, **how)
    assert [info.id for info in verdict.accepted] == ids[:2]
    assert [str(reason) for reason in verdict.rejected[0].reasons] == [
        f"architecture: is a BertForTokenClassification, but {ids[0]} is a BertForSequenceClassification"
    ]
    owner.api.delete_repo(base)
    assert "was not found" in judge(tuned, **how)[ReasonKind.BASE]


def test_labels(judge, tmp_path):
    folder = save_bert(tmp_path / "full")
    assert judge(folder, labels=["no", "yes"]) == {ReasonKind.LABELS: "has other labels: maybe"}
    edit_json(folder / "config.json", id2label=None)
    assert judge(folder, labels=["no", "yes"]) == {ReasonKind.LABELS: "names no labels", **judge(folder)}


def test_tokenizer(judge, tmp_path):
    assert set(judge(save_bert(tmp_path / "full", processor=False))) == {ReasonKind.TOKENIZER}


def test_license(judge, tmp_path):
    folder = save_bert(tmp_path / "full", card="license: cc-by-nd-4.0")
    assert judge(folder) == {ReasonKind.LICENSE: "cc-by-nd-4.0 forbids sharing derivatives"}


def test_pickle(judge, tmp_path):
    folder = save_bert(tmp_path / "full")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert set(judge(folder)) == {ReasonKind.PICKLE}


def test_custom_code(judge, tmp_path):
    folder = save_bert(tmp_path / "full")
    auto_map = {"AutoModelForSequenceClassification": "odd.OddForSequenceClassification"}
    edit_json(folder / "config.json", model_type="odd", auto_map=auto_map)
    assert set(judge(folder)) == {ReasonKind.CUSTOM_CODE}
    assert judge(folder, trust_remote_code=True) == {}
    edit_json(folder / "config.json", auto_map={"AutoModel": "someone/else--odd.Odd"})
    assert "someone/else--odd.Odd" in judge(folder, trust_remote_code=True)[ReasonKind.CUSTOM_CODE]


def test_gates(judge, owner, tmp_path):
    assert "full model" in judge(save_bert(tmp_path / "full"), need_gates=True)[ReasonKind.GATES]
    folder = based(owner, tmp_path)
    assert judge(folder) == {}
    assert judge(folder, need_gates=True) == {ReasonKind.GATES: "has no phatgoose_gates.safetensors"}
    paths = [f"bert.encoder.layer.{index}.attention.self.query" for index in (0, 1)]
    for vectors, detail in [
        ({paths[0]: torch.ones(16)}, f"lacks a gate for {paths[1]}"),
        ({path: torch.ones(9) for path in paths}, f"has a gate of shape [9] for {paths[0]}"),
        ({path: torch.ones(16) for path in [*paths, "bert.pooler.dense"]}, "has a gate for bert.pooler.dense"),
    ]:
        save_file(vectors, folder / "phatgoose_gates.safetensors")
        assert detail in judge(folder, need_gates=True)[ReasonKind.GATES]
    save_file({path: torch.ones(16) for path in [*paths, "classifier"]}, folder / "phatgoose_gates.safetensors")
    assert judge(folder, need_gates=True) == {}


def test_gated(judge, owner, anyone, tmp_path):
    owner.push("full", save_bert(tmp_path / "full"))
    owner.api.update_repo_settings(f"{owner.name}/full", gated="manual")
    (info,) = discover(ids=[f"{owner.name}/full"], api=anyone)
    (rejected,) = check_compatibility([info], api=anyone).rejected
    (reason,) = rejected.reasons
    assert reason.kind is ReasonKind.GATED
    assert "accept the terms" in reason.remedy
    assert check_compatibility([info], api=owner.api).accepted == [info]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "olora"}])
def test_lora_that_cannot_be_expressed(options, judge, owner, tmp_path):
    (field,) = options
    assert judge(based(owner, tmp_path, **options))[ReasonKind.LORA].startswith(f"{field}=")


def test_other_peft_types(judge, owner, tmp_path):
    folder = based(owner, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    save_peft(get_peft_model(model, LoHaConfig(target_modules=["query"], task_type="SEQ_CLS")), folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=f"{owner.name}/base")
    assert "only LoRA" in judge(folder)[ReasonKind.LORA]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"architectures": 3, "auto_map": [1], "id2label": {"a": []}}'),
        ("config.json", b'{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": "wide"}'),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b"\x40\0\0\0\0\0\0\0not json"),
    ],
)
def test_strangers_files_never_raise(file, content, judge, tmp_path):
    folder = save_bert(tmp_path / "full")
    (folder / file).write_bytes(content)
    reasons = judge(folder, labels=LABELS)
    assert reasons
    assert all(reasons.values())


def test_deleted_repos_are_reported(owner, tmp_path):
    owner.push("full", save_bert(tmp_path / "full"))
    infos = discover(ids=[f"{owner.name}/full"], api=owner.api)
    owner.api.delete_repo(f"{owner.name}/full")
    (rejected,) = check_compatibility(infos, api=owner.api).rejected
    assert [reason.kind for reason in rejected.reasons] == [ReasonKind.UNREADABLE]


def test_never_reads_weights_and_never_runs_pickles(hub, judge, owner, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    big = BertConfig(**{**BERT.to_dict(), "vocab_size": 50_000, "hidden_size": 64})
    folder = save_bert(tmp_path / "big", config=big)
    hub.requests.clear()
    assert judge(folder) == {}
    downloads = [path for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path]
    assert [path for path in downloads if path.endswith(".safetensors")] == [downloads[-1]]  # one header, by Range
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert judge(folder, allow_pickle=True) == {}
    assert not (tmp_path / "ran").exists()
    assert not [path for _, path, *_ in hub.requests if re.search(r"GET.*\.bin", path)]


def test_table_and_unknown_task(owner, tmp_path):
    good, bad = save_bert(tmp_path / "good"), save_bert(tmp_path / "bad", processor=False)
    owner.push("bad", bad), owner.push("good", good)
    experts = discover(ids=[f"{owner.name}/bad", f"{owner.name}/good"], api=owner.api)
    rows = check_compatibility(experts, api=owner.api).table()
    assert [(row["id"].split("/")[1], row["rejected"][:10]) for row in rows] == [("good", ""), ("bad", "tokenizer:")]
    assert json.dumps(rows)
    with pytest.raises(FusionError, match="'juggling' is not supported"):
        check_compatibility(experts, task="juggling", api=owner.api)


def test_lora_config_equals_the_one_of_peft():
    """The table of refused fields is checked against PEFT's own defaults: a plain adapter must pass."""
    from hf_fusion.hub.lora import config_problems

    assert config_problems({**LoraConfig(r=4, target_modules=["query"]).to_dict(), "peft_type": "LORA"}) == []
