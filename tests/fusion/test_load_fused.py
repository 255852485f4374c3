"""Errors of `load_fused`, and of the loaders published with a model, on incomplete folders."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from fused_kinds import KINDS, TEXT
from mutations import nested
from safetensors.torch import load_file, save_file
from tiny_routed import save_lora

from hf_fusion import (
    FoEConfig,
    FoEModel,
    FusionError,
    PhatgooseConfig,
    PhatgooseRouter,
    WEMoEConfig,
    WEMoEModel,
    load_fused,
)
from hf_fusion.models.fused_checks import NewerFormatError

LOADERS = {"foe": FoEModel, "phatgoose": PhatgooseRouter, "wemoe": WEMoEModel}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    for kind in (*LOADERS, "static"):
        KINDS[kind][0](place / kind)
    return place


@pytest.fixture
def folder_of(saved, tmp_path):
    return lambda kind: shutil.copytree(saved / kind, tmp_path / kind)


def edit(folder, change) -> None:
    """Changes config.json in place."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder, match: str) -> None:
    """By both loaders, with the same reason."""
    with pytest.raises(FusionError, match=match):
        load_fused(folder)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    with pytest.raises(ValueError, match=match):
        LOADERS[kind].from_pretrained(folder)


# ---------------------------------------------------------------- what is no folder of a fused model


def test_error_says_what_the_folder_holds_instead(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "recipe").mkdir()
    shutil.copy(saved / "foe" / "fusion.yaml", tmp_path / "recipe")
    save_lora(tmp_path / "lora", "me/base")
    cases = {
        "me/fused-model": "no folder.*\n.*hf download me/fused-model",
        tmp_path / "nowhere": "there is no folder",
        saved / "foe" / "config.json": "is a file, not the folder",
        tmp_path / "empty": "is empty",
        tmp_path / "notes": "config.json is missing",
        tmp_path / "recipe": "a recipe, but not its model.*\n.*hf-fusion fuse",
        tmp_path / "lora": "a LoRA adapter, not a fused model.*\n.*hf-fusion fuse",
        "a\0b": "there is no folder",
    }
    for given, match in cases.items():
        with pytest.raises(FusionError, match=match):
            load_fused(given)


def test_a_pipe_is_not_read(folder_of):
    folder = folder_of("foe")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(FusionError, match="is a pipe or a device"):
        load_fused(folder)


def test_a_recipe_of_another_model_is_refused(folder_of, saved):
    folder = folder_of("foe")
    shutil.copy(saved / "wemoe" / "fusion.yaml", folder)
    with pytest.raises(FusionError, match="says wemoe, but config.json says 'foe'; they belong to different models"):
        load_fused(folder)
    text = (saved / "foe" / "fusion.yaml").read_text().replace("- me/bert-0\n", "- me/bert-0\n- me/bert-9\n")
    (folder / "fusion.yaml").write_text(text)
    with pytest.raises(FusionError, match="names 3 experts, but config.json names 2"):
        load_fused(folder)


# ---------------------------------------------------------------- configs

FIELDS = {
    "no experts": ("foe", lambda c: c.update(experts=[]), r"experts is \[\]; it must be a list of at least 1"),
    "an expert is a text": ("foe", lambda c: c["experts"].append("x"), r"experts\[2\] is 'x'"),
    "no name": ("foe", lambda c: c["experts"][1].pop("name"), r"experts\[1\].name is missing"),
    "an odd name": ("foe", lambda c: c["experts"][0].update(name="a\x1b[31m"), r"experts\[0\].name is 'a\\x1b"),
    "no backbone": ("foe", lambda c: c["experts"][0].update(backbone=7), r"experts\[0\].backbone is 7"),
    "NaN": ("foe", lambda c: c["experts"][0].update(cost=float("nan")), r"experts\[0\].cost is nan"),
    "a label without a class": (
        "foe",
        lambda c: c["experts"][0].update(label_map=[0]),
        r"experts\[0\].label_map is \[0\]; it must be a fused class for each label",
    ),
    "a class that is not there": ("foe", lambda c: c["experts"][0].update(label_map=[0, 2]), "numbers below 2"),
    "labels that are not the head's": (
        "foe",
        lambda c: c["experts"][0].update(labels=["a", "b", "c"], label_map=[0, 1, 1]),
        r"backbones\[0\].num_labels is \[2\]; it must be \[3\]",
    ),
    "classes with a gap": ("foe", lambda c: c.update(id2label={"0": "a", "5": "b"}), "id2label"),
    "a giant fuser": ("foe", lambda c: c.update(fuser_hidden=[10**9]), "larger model than the files hold"),
    "a giant backbone": (
        "foe",
        lambda c: c["backbones"][0]["config"].update(vocab_size=10**9),
        "larger model than the files hold",
    ),
    "endless layers": (
        "foe",
        lambda c: c["backbones"][0]["config"].update(num_hidden_layers=10**12),
        r"backbones\[0\].config.num_hidden_layers is 1000000000000; it must be at most",
    ),
    "many layers": ("foe", lambda c: c["backbones"][0]["config"].update(num_hidden_layers=60_000), "larger model"),
    "another width": ("foe", lambda c: c.update(fuser_hidden=[9]), r"in the files, \[.*\] by config.json"),
    "a root of a negative number": (
        "foe",
        lambda c: c["backbones"][0]["config"].update(layer_norm_eps=-1e-5),
        "layer_norm_eps is -1e-05; it must be at least 0",
    ),
    "an unknown model": ("foe", lambda c: c["backbones"][1]["config"].update(model_type="x"), r"backbones\[1\].config"),
    "deep": ("foe", lambda c: c.update(recipe={"method": nested(100)}), "nested deeply"),
    "a method's name": ("foe", lambda c: c.update(save_pretrained=1), "save_pretrained is 1"),
    "a surrogate": ("foe", lambda c: c["experts"][0].update(license="\ud800"), "it must be Unicode"),
    "no experts per token": ("phatgoose", lambda c: c.update(num_experts_per_tok=0), "num_experts_per_tok is 0"),
    "no field": ("phatgoose", lambda c: c.pop("num_experts_per_tok"), "num_experts_per_tok is missing"),
    "a giant number": ("phatgoose", lambda c: c.update(num_experts_per_tok=10**30), "num_experts_per_tok is 10000"),
    "a temperature of 0": ("phatgoose", lambda c: c.update(router_temperature=0), "router_temperature is 0"),
    "the same name": ("phatgoose", lambda c: c["experts"][1].update(name="me/lora-0"), "another name for each"),
    "a rank too much": (
        "phatgoose",
        lambda c: c["profiles"][0]["ranks"].update({next(iter(c["profiles"][0]["ranks"])): 5}),
        "in the files, .* by config.json",
    ),
    "a path that is not there": ("phatgoose", lambda c: c["profiles"][0]["ranks"].update({"x.y": 4}), "AttributeError"),
    "no such expert": ("wemoe", lambda c: c.update(default_task="x"), "default_task is 'x'; it must be an expert"),
    "no units": ("wemoe", lambda c: c.update(units=[]), "units is"),
    "sizes of another kind": ("wemoe", lambda c: c["units"][0].update(sizes=[None, None]), r"units\[0\].sizes\[0\]"),
    "more entries than there are": ("wemoe", lambda c: c["units"][0]["sizes"].__setitem__(0, 10**9), "larger model"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field_is_named(case, folder_of):
    kind, change, match = FIELDS[case]
    folder = folder_of(kind)
    edit(folder, change)
    refused(folder, match if "config.json" in match or "Error" in match else f"config.json.*{match}")


@pytest.mark.parametrize("kind", LOADERS)
def test_newer_format_gives_a_hint(kind, folder_of):
    folder = folder_of(kind)
    assert json.loads((folder / "config.json").read_text())["format_version"] == 1
    edit(folder, lambda content: content.update(format_version=3))
    refused(
        folder, r"saved by a newer hf_fusion \(format 3, this one reads up to 1\): pip install -U hf_fusion, or load"
    )
    with pytest.raises(FusionError) as raised:
        load_fused(folder)
    assert raised.value.hint is None  # making it again would not help
    with pytest.raises(NewerFormatError, match="newer"):
        {"foe": FoEConfig, "phatgoose": PhatgooseConfig, "wemoe": WEMoEConfig}[kind](format_version=2)


@pytest.mark.parametrize("kind", LOADERS)
def test_folder_without_a_format_version_loads(kind, folder_of):
    folder = folder_of(kind)
    with torch.no_grad():
        wanted = load_fused(folder)[0](**TEXT).logits
        edit(folder, lambda content: content.pop("format_version"))
        assert torch.equal(load_fused(folder)[0](**TEXT).logits, wanted)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [*LOADERS, "static"])
def test_a_weight_that_is_not_finite_is_named(kind, value, folder_of):
    folder = folder_of(kind)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(key for key, own in tensors.items() if own.is_floating_point())[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if kind == "static":
        with pytest.raises(FusionError, match=f"{name} holds NaN or Inf"):
            load_fused(folder)
    else:
        refused(folder, f"{name} holds NaN or Inf")


def test_large_finite_weights_are_accepted(folder_of):
    """Their sum overflows float32, they do not; float16 does not hold them."""
    folder = folder_of("phatgoose")
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.lm_head.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    PhatgooseRouter.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"lm_head.weight holds NaN or Inf, as torch.float16"):
        PhatgooseRouter.from_pretrained(folder, dtype=torch.float16)


def test_bits_of_bfloat16_are_read_as_numbers(tmp_path):
    from tiny_fused import base_expert, bert_base, experts_of

    model = WEMoEModel.from_experts(experts_of(bert_base(), 2), base_expert(bert_base()), task_vectors="bfloat16")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith(".vectors"))
    tensors[name][3] = 0x7FC0  # NaN
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"):
        WEMoEModel.from_pretrained(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", LOADERS)
def test_no_weight_is_randomly_initialised(kind, folder_of):
    """Every tensor in turn: missing, or there twice under another name."""
    folder = folder_of(kind)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for name in names[:: max(1, len(names) // 6)]:
        rest = {key: own for key, own in tensors.items() if key != name}
        save_file(rest, folder / "model.safetensors", {"format": "pt"})
        refused(folder, f"lacks weights, 1, first {name}")
    save_file({**tensors, "nobody.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "has unknown weights, 1, first nobody.weight")


def test_places_of_sparse_entries_are_checked(folder_of):
    folder = folder_of("wemoe")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith(".index"))
    tensors[name][0] = 2**30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "index or counts are out of range")


def test_files_that_are_cut_off_missing_or_elsewhere(folder_of, tmp_path):
    folder = folder_of("phatgoose")
    raw = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", raw[:100], raw[:-1], struct.pack("<Q", 1 << 60) + raw[8:], raw[:8] + b"[" + raw[9:]):
        (folder / "model.safetensors").write_bytes(damaged)
        refused(folder, r"model.safetensors cannot be read: cut off or damaged")
    (folder / "model.safetensors").unlink()
    refused(folder, "to have a file named model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")  # is not even opened
    refused(folder, "to have a file named model.safetensors")
    shutil.copy(tmp_path / "phatgoose" / "config.json", tmp_path)
    (tmp_path / "elsewhere.safetensors").write_bytes(raw)
    for shard in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), 5):
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "model.safetensors.index.json names .*, which is not a file beside it")


def test_integers_are_not_taken_for_weights(folder_of):
    folder = folder_of("foe")
    tensors = load_file(folder / "model.safetensors")
    name = "fuser.output.weight"
    save_file({**tensors, name: tensors[name].int()}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"{name} is not of the type")


@pytest.mark.parametrize("kind", [*LOADERS, "static"])
def test_broken_tokenizer_is_reported_on_loading(kind, folder_of):
    folder = folder_of(kind)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FusionError, match="wemoe|static|foe|phatgoose"):
        load_fused(folder)


def test_a_missing_base_of_an_upscaled_linear_is_refused(tmp_path):
    """transformers does not count it among the missing keys."""
    folder = tmp_path / "model"
    KINDS["wemoe"][0](folder)
    file, name = folder / "model.safetensors", "backbone.bert.encoder.layer.1.intermediate.dense.base"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FusionError, match=f"lacks weights, first {name}"):
        load_fused(folder)
