"""Checkpoints with all experts and gates, as PHATGOOSE's authors store them: equal routing."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import make_tokenizer, save_phatgoose_checkpoint, t5
from torch.nn.functional import layer_norm

from hf_fusion import PhatgooseRouter
from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, fuse_recipe, save_fused
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.publishing.publish import publish
from hf_fusion.recipe import Recipe
from hf_fusion.types import ModelRef

EXPERTS, RANK = 5, 4
INPUTS = {"input_ids": torch.arange(3, 27).reshape(2, 12), "decoder_input_ids": torch.arange(5, 15).reshape(2, 5)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Experts are written out here."""
    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repo(owner, tmp_path):
    """The checkpoint and its base on the Hub: (id, commit)."""
    base, own = tmp_path / "base", tmp_path / "own"
    t5().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    owner.push("base", base)
    own.mkdir()
    save_phatgoose_checkpoint(own / "best.pt", t5(), EXPERTS, RANK)
    (own / "README.md").write_text(f"---\nlicense: mit\nbase_model: {owner.name}/base\n---\n")
    return f"{owner.name}/experts", owner.push("experts", own)


def authors(model, tensors):
    """The model with the authors' layers, written from r-three/phatgoose: `Router` and `FFNExperts`, top-2, A2."""

    def layer(path):
        first, second, gates = (
            torch.stack([tensors[f"{path}._addons.{name}__{number}"] for number in range(EXPERTS)])
            for name in ("expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings")
        )

        def hook(module, inputs, output):
            x, width = inputs[0], module.in_features
            scores = layer_norm(x, (width,)) @ layer_norm(gates, (width,)).T * math.sqrt(1 / width)
            weights, chosen = scores.softmax(-1).topk(2)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
            spread = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, weights)
            own = torch.einsum("bti,eir,ero->bteo", x, first, second) / RANK
            return output + (own * spread[..., None]).sum(-2)

        return hook

    for path, module in model.named_modules():
        if f"{path}._addons.expert_lora.layer1__0" in tensors:
            module.register_forward_hook(layer(path))
    return model


@torch.no_grad()
def test_routing_equals_the_reference_implementation(repo, owner, tmp_path):
    name, sha = repo
    experts = load_experts([f"{name}#{number}" for number in range(EXPERTS)], api=owner.api)
    assert [expert.name for expert in experts] == [f"{name}#{number}" for number in range(EXPERTS)]
    assert {expert.revision for expert in experts} == {sha}
    assert {expert.license for expert in experts} == {"mit"}
    router = PhatgooseRouter.from_experts(experts, top_k=2).eval()
    tensors = torch.load(tmp_path / "own" / "best.pt", weights_only=True)
    wanted = authors(t5(), tensors)(**INPUTS).logits
    found = router(**INPUTS).logits
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=1e-3)  # gates are kept in half precision
    assert (wanted - t5()(**INPUTS).logits).abs().max() > 1


def test_a_router_of_them_is_published(repo, owner, tmp_path):
    name, sha = repo
    model = fuse("phatgoose", [f"{name}#{number}" for number in (4, 0)], api=owner.api)
    assert [expert.model for expert in model.fusion_recipe.experts] == [f"{name}#{number}@{sha}" for number in (4, 0)]
    save_fused(model, tmp_path / "fused")
    again = fuse_recipe(Recipe.load(tmp_path / "fused"), api=owner.api)
    assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    commit = publish(tmp_path / "fused", f"{owner.name}/routed", api=owner.api).sha
    card = ModelCard.load(owner.api.hf_hub_download(f"{owner.name}/routed", "README.md", revision=commit))
    assert card.data.base_model == [name, f"{owner.name}/base"]
    assert f"[{name}&#35;4](/{name})" in card.text
    assert owner.api.model_info(f"{owner.name}/routed").card_data.base_model == [name, f"{owner.name}/base"]


def test_an_expert_is_written_out_once(repo, owner, hub, cache):
    name, sha = repo
    first = resolve(f"{name}#3@{sha}", owner.api)
    assert (first.name, first.revision, first.pinned, first.is_adapter) == (f"{name}#3", sha, True, True)
    assert first.folder.is_relative_to(cache)
    hub.requests.clear()
    load_experts([f"{name}#3@{sha}"], base=f"{owner.name}/base", api=owner.api)
    assert not [path for _, path, _ in hub.requests if "best.pt" in path or "%23" in path]


def test_unknown_experts_are_named(repo, owner, tmp_path):
    name, _ = repo
    with pytest.raises(FusionError, match=rf"{name} has the experts #0 to #4, but no #9"):
        resolve(f"{name}#9", owner.api)
    with pytest.raises(FusionError, match=r"base has 0 checkpoints \(\*\.pt\) instead of one"):
        resolve(f"{owner.name}/base#0", owner.api)
    (tmp_path / "own" / "best.pt").write_bytes(b"no checkpoint")
    owner.push("experts", tmp_path / "own")
    with pytest.raises(FusionError, match=rf"(?s){name}: best.pt cannot be read .*download it again"):
        resolve(f"{name}#0", owner.api)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "own" / "best.pt")
    owner.push("experts", tmp_path / "own")
    with pytest.raises(FusionError, match="best.pt is not a checkpoint in the format of PHATGOOSE's"):
        resolve(f"{name}#0", owner.api)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name#7", ("owner/name", 7)),
        ("owner/name#7@main", ("owner/name@main", 7)),
        ("owner/name", ("owner/name", None)),
        ("owner/name@main", ("owner/name@main", None)),
        ("owner/name#last", ("owner/name#last", None)),
    ],
)
def test_numbers_in_names(name, parts):
    ref = ModelRef.parse(name)
    assert (str(ModelRef(ref.repo, ref.revision)), ref.number) == parts
    assert str(ref) == name
