"""A published router in a fresh process without hf_fusion and peft, and with an empty cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from models.test_phatgoose import IDS, LLAMA, MASK, SHAPES, experts_of
from tiny import bert, llama, make_tokenizer, t5

from hf_fusion import PhatgooseRouter

LOAD = """
import sys
sys.modules["hf_fusion"] = sys.modules["peft"] = None  # as if they were not installed
import torch, transformers
model = transformers.{auto}.from_pretrained("{repo}", revision="{revision}", trust_remote_code=True)
inputs = torch.load("{inputs}")
with torch.no_grad():
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False) if {generates} else model(**inputs).logits
torch.save(out, "{answer}")
{then}
"""
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def heads_of_different_labels():
    """BERT experts that bring their own heads, with different classes."""
    base = bert(["x", "y"])
    rows = [(4, ("query", "value"))]
    experts = [experts_of(base, rows * 3, classes=classes)[seed] for seed, classes in enumerate((2, 3, 3))]
    labels = (["a", "b"], ["b", "c", "d"], ["a", "e", "c"])
    return base, [replace(e, labels=own) for e, own in zip(experts, labels, strict=True)]


@pytest.mark.parametrize(
    ("kind", "generates"),
    [
        pytest.param("llama mixed", False, marks=pytest.mark.slow),
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("t5", True, marks=pytest.mark.slow),
        pytest.param("bert", False, marks=pytest.mark.slow),
        pytest.param("vit", False, marks=pytest.mark.slow),
        pytest.param("heads", False, marks=pytest.mark.slow),
    ],
)
def test_fresh_process_gives_bitwise_equal_outputs(kind, generates, hub, fresh_python, tmp_path):
    if kind == "heads":
        (_, experts), inputs = heads_of_different_labels(), {"input_ids": IDS, "attention_mask": MASK}
    else:
        build, rows, inputs = SHAPES[kind]
        experts = experts_of(build(), rows)
    tokenizer = make_tokenizer()
    router = PhatgooseRouter.from_experts([replace(e, processor=tokenizer) for e in experts])
    inputs = {k: v for k, v in inputs.items() if not (generates and k == "decoder_input_ids")}
    with torch.no_grad():
        wanted = router.generate(**inputs, max_new_tokens=6, do_sample=False) if generates else router(**inputs).logits
    user = f"goose-{kind.replace(' ', '-')}"
    api = HfApi(endpoint=hub.endpoint, token=hub.token(user))
    router.save_pretrained(tmp_path / "router")
    api.create_repo(f"{user}/router")
    commit = api.upload_folder(repo_id=f"{user}/router", folder_path=tmp_path / "router").oid
    torch.save(inputs, tmp_path / "inputs.pt")
    again = f'model.push_to_hub("{user}/again")' if kind == "llama" else ""  # its code travels on
    fill = {"auto": AUTO[router.config.head], "inputs": tmp_path / "inputs.pt", "generates": generates}
    code = LOAD.format(repo=f"{user}/router", revision=commit, answer=tmp_path / "answer.pt", then=again, **fill)
    fresh_python(code, hub, token=hub.token(user))
    assert torch.equal(torch.load(tmp_path / "answer.pt"), wanted)
    if again:
        fill["auto"] = "AutoModel"
        code = LOAD.format(repo=f"{user}/again", revision="main", answer=tmp_path / "second.pt", then="", **fill)
        fresh_python(code, hub)
        assert torch.equal(torch.load(tmp_path / "second.pt"), wanted)


@pytest.mark.parametrize("build", [llama, pytest.param(t5, marks=pytest.mark.slow)], ids=["llama", "t5"])
def test_a_base_by_reference_is_fetched_at_its_commit(build, hub, fresh_python, tmp_path):
    user = f"reference-{build.__name__}"
    api = HfApi(endpoint=hub.endpoint, token=hub.token(user))
    base = build()
    base.save_pretrained(tmp_path / "base")
    api.create_repo(f"{user}/base")
    sha = api.upload_folder(repo_id=f"{user}/base", folder_path=tmp_path / "base").oid
    experts = experts_of(base, [(4, LLAMA), (2, LLAMA)] if build is llama else [(4, (".q", ".wo")), (4, (".v",))])
    for expert in experts:
        expert.adapter.base, expert.adapter.base_revision = f"{user}/base", sha
    router = PhatgooseRouter.from_experts(experts, base_by_reference=True)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    wanted = router.generate(**inputs, max_new_tokens=6, do_sample=False)
    router.save_pretrained(tmp_path / "router")
    weights = (tmp_path / "router" / "model.safetensors").stat().st_size
    assert weights < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size
    api.create_repo(f"{user}/router")
    commit = api.upload_folder(repo_id=f"{user}/router", folder_path=tmp_path / "router").oid
    # The base's main moves on; the router stays with its commit.
    api.upload_folder(repo_id=f"{user}/base", folder_path=_zeroed(base, tmp_path / "zeroed"))
    torch.save(inputs, tmp_path / "inputs.pt")
    fill = {"auto": AUTO[router.config.head], "inputs": tmp_path / "inputs.pt", "answer": tmp_path / "answer.pt"}
    code = LOAD.format(repo=f"{user}/router", revision=commit, generates=True, then="", **fill)
    fresh_python(code, hub)
    assert torch.equal(torch.load(tmp_path / "answer.pt"), wanted)


def _zeroed(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    return folder


def test_a_file_without_an_expert_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    router = PhatgooseRouter.from_experts(experts_of(llama(), [(4, LLAMA), (4, LLAMA)]))
    router.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith("gates"))
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights, 1, first {dropped}"):
        PhatgooseRouter.from_pretrained(tmp_path)
