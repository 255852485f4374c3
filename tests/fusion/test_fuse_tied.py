"""Adapters that train tied weights, in each family: correct results, or an error with a hint that works."""

import shutil

import pytest
import torch
from peft_adapters import IDS, logits, save_adapter, save_llama
from tiny import make_tokenizer

from hf_fusion import FusionError, fuse
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import with_adapter

KINDS = {
    "save embeddings": {"modules_to_save": ["embed_tokens"]},
    "save the head": {"modules_to_save": ["lm_head"]},
    "save both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the head": {"target_modules": ["up_proj", "lm_head"]},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, logits of about 10 from sums of 16 to 24 products


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    save_llama(folder / "base", tied=True, vocabulary=300)
    make_tokenizer().save_pretrained(folder / "base")
    models = {}
    for seed, (name, options) in enumerate({**KINDS, "neither": {}}.items(), 1):
        models[name] = save_adapter(folder / name, folder / "base", seed, **{"target_modules": ["up_proj"], **options})
        for file in (folder / "base").glob("token*"):
            shutil.copy(file, folder / name)
    fuse("linear", [folder / "base"], untie=True).save_pretrained(folder / "untied")
    make_tokenizer().save_pretrained(folder / "untied")
    return folder, models


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "neither"])
def test_phatgoose_and_models_in_memory(kind, made):
    folder, models = made
    router = fuse("phatgoose", [folder / kind], missing_gates="arrow", top_k=1)
    torch.testing.assert_close(logits(router), logits(models[kind]), **CLOSE)
    [expert] = load_experts([folder / kind])
    alone = with_adapter(expert.model, expert.adapter)
    torch.testing.assert_close(logits(alone), logits(models[kind]), **CLOSE)
    assert alone.config.tie_word_embeddings == (kind == "neither")
    assert expert.model.config.tie_word_embeddings  # the base is as it was
    torch.testing.assert_close(logits(fuse("linear", [expert])), logits(models[kind]), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["foe", "wemoe"])
def test_foe_and_wemoe_give_a_hint(family, kind, made):
    folder, models = made
    options = {"foe": {"mode": "selection"}, "wemoe": {"scaling": 1.0}}[family]
    experts = [folder / kind, folder / "neither"]
    with pytest.raises(FusionError, match=r"trains .*, which its base ties to .*: untie the base") as caught:
        fuse(family, experts, **options)
    assert "--experts BASE --set untie=true" in str(caught.value)
    if family == "wemoe":  # one expert with the factor 1, to the precision of its routers' answer to noise
        fused = fuse(family, experts[:1], base=folder / "untied", **options)
        assert (logits(fused) - logits(models[kind])).abs().max() < 0.01
        return
    fused = fuse(family, experts, base=folder / "untied", **options)
    with torch.no_grad():
        chosen = fused(input_ids=IDS).logits
    sides = [logits(models[name]) for name in (kind, "neither")]
    assert any(torch.allclose(chosen, side, **CLOSE) for side in sides)
