"""Experts that `discover` groups can be fused: same labels and base, without broken ones."""

from __future__ import annotations

import os
import re
import shlex

import pytest
import torch
from quick_python import run_python
from safetensors.torch import load_file, save_file
from tiny import gpt2, make_tokenizer
from tiny_experts import BERT, save_bert
from tiny_routed import save_base, save_lora
from transformers import BertConfig

from hf_fusion import ExpertInfo, check_compatibility, discover
from hf_fusion.hub.groups import drop_broken, group_experts

CARD = "license: mit\ntags: [hf-fusion-expert]\npipeline_tag: text-classification"
SEQUENCE = "BertForSequenceClassification"


def info(name: str, labels: tuple[str, ...] = (), **more) -> ExpertInfo:
    return ExpertInfo(f"me/{name}", "0" * 40, architecture=more.pop("architecture", SEQUENCE), labels=labels, **more)


def names(groups) -> list[list[str]]:
    return [[expert.id.partition("/")[2] for expert in group.experts] for group in groups]


def named(labels) -> BertConfig:
    return BertConfig(**{**BERT.to_dict(), "id2label": dict(enumerate(labels)), "label2id": None})


def test_labels_overlap_directly_or_through_others():
    experts = [
        info("a", ("one", "two")), info("spam", ("spam", "ham")), info("c", ("Three", "four")),
        info("b", ("two", "three")), info("mail", ("SPAM", "ham")), info("score", ("anything",)),
        info("nameless", ("LABEL_0", "LABEL_1")), info("silent"),
        info("cat", ("one", "two"), architecture="ViTForImageClassification"),
        info("chat", architecture="LlamaForCausalLM"), info("talk", architecture="GPT2LMHeadModel"),
    ]  # fmt: skip
    groups = group_experts(experts)
    assert names(groups) == [
        ["a", "c", "b"], ["spam", "mail"], ["chat", "talk"], ["nameless", "silent"], ["score"], ["cat"],
    ]  # fmt: skip
    assert [group.options for group in groups[:3]] == [
        ("--method", "foe"), ("--method", "foe"), ("--method", "foe", "--set", "mode=selection"),
    ]  # fmt: skip
    assert groups[3].command is None and "label_maps" in groups[3].why_not
    assert groups[4].command is None


def test_experts_that_share_no_label_are_selected_among():
    (group,) = group_experts([info("a", ("one", "two")), info("b", ("spam", "ham"))])
    assert group.options == ("--method", "foe", "--set", "mode=selection")


def test_adapters_by_base_and_commit():
    pinned = [info(f"p{i}", base_model="me/base", base_revision=f"{i // 2}" * 40, is_adapter=True) for i in range(4)]
    loose = info("loose", base_model="me/base", is_adapter=True)
    other = info("other", base_model="me/else", is_adapter=True)
    groups = group_experts([*pinned[:2], loose, other], "phatgoose")
    assert names(groups) == [["p0", "p1", "loose"], ["other"]]
    assert groups[0].options == ("--method", "phatgoose", "--base", f"me/base@{'0' * 40}")
    assert names(group_experts([*pinned, loose], "phatgoose")) == [["p0", "p1"], ["p2", "p3"], ["loose"]]
    path = info("path", base_model="/home/me/base", is_adapter=True)
    (group,) = group_experts([path, loose], "wemoe", "me/base")
    assert group.options == ("--method", "wemoe", "--base", "me/base")
    (group,) = group_experts([path, path], "wemoe")
    assert group.command is None


@pytest.fixture(scope="module")
def shelf(hub, tmp_path_factory):
    """A Hub's shelf: experts that fit, one with NaN, ones of other labels, language models, adapters with gates."""
    from huggingface_hub import HfApi

    place, api = tmp_path_factory.mktemp("shelf"), HfApi(endpoint=hub.endpoint, token=hub.token("shelf"))
    folders = {f"mood-{seed}": save_bert(place / f"mood-{seed}", seed, card=CARD) for seed in range(3)}
    folders["mood-nan"] = save_bert(place / "mood-nan", 7, card=CARD)
    tensors = load_file(place / "mood-nan" / "model.safetensors")
    tensors["classifier.weight"][0, 0] = torch.nan
    save_file(tensors, place / "mood-nan" / "model.safetensors", metadata={"format": "pt"})
    for seed in (0, 1):
        folders[f"loops-{seed}"] = save_bert(
            place / f"loops-{seed}", seed, card=CARD, config=named(["no loop", "closed loop"])
        )
        chat = folders[f"chat-{seed}"] = place / f"chat-{seed}"
        gpt2(seed).save_pretrained(chat)
        make_tokenizer().save_pretrained(chat)
        (chat / "README.md").write_text("---\ntags: [hf-fusion-expert]\n---\n")
    llama = save_base(place / "llama")
    for seed in range(3):
        folders[f"lora-{seed}"] = save_lora(place / f"lora-{seed}", "shelf/llama", seed)
    broken = load_file(place / "lora-2" / "adapter_model.safetensors")
    next(iter(broken.values()))[0, 0] = torch.inf
    save_file(broken, place / "lora-2" / "adapter_model.safetensors")
    for name, folder in {**folders, "llama": llama}.items():
        api.create_repo(f"shelf/{name}")
        api.upload_folder(repo_id=f"shelf/{name}", folder_path=folder)
    return api


def test_experts_with_nan_are_rejected_and_others_grouped(shelf):
    found = discover(author="shelf", task="text-classification", api=shelf)
    verdict = check_compatibility(found, api=shelf)
    assert len(verdict.accepted) == 6
    groups = drop_broken(verdict, api=shelf)
    assert [sorted(group) for group in names(groups)] == [["mood-0", "mood-1", "mood-2"], ["loops-0", "loops-1"]]
    (rejected,) = verdict.rejected
    assert rejected.info.id == "shelf/mood-nan"
    assert str(rejected.reasons[0]) == "not finite: has NaN or Inf in classifier.weight"


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--task", "text-classification"), {"mood-0", "mood-1", "mood-2"}),
        (("--task", "text-generation"), {"chat-0", "chat-1", "lora-0", "lora-1"}),
        (("--tag", "phatgoose-gates", "--gates"), {"lora-0", "lora-1"}),
    ],
    ids=["labels", "language", "gates"],
)
def test_the_command_that_is_proposed_runs(words, wanted, shelf, hub, tmp_path):
    """As printed, in a shell."""
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token("shelf")}

    def run(*line: str):
        return run_python("-m", "hf_fusion.cli", *line, env={**os.environ, **home}, cwd=tmp_path)

    done = run("discover", "--author", "shelf", *words, "--check")
    assert done.returncode == 0, done.stderr
    if "--task" in words:
        assert "Groups by labels and base" in done.stdout
    (proposal,) = re.findall(r"→ (hf-fusion fuse .*)", done.stderr)
    assert {name.partition("@")[0].partition("/")[2] for name in re.findall(r"shelf/\S+", proposal)} - {
        "llama"
    } == wanted
    made = run(*shlex.split(proposal)[1:])
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "fused" / "model.safetensors").exists()
    if "--gates" in words:  # another proposal goes to another folder
        assert "--output fused-2" in run("discover", "--author", "shelf", *words, "--check").stderr
