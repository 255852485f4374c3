"""Dense models that fused models become: plain folders of transformers that compute what the fused model computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import SUMS, TEXTS, adapter, bert, image_processor, llama, make_tokenizer, merged, vit
from tiny_exports import LABELS, ROWS, logits, lora_of, read, router, saved, wemoe, with_update
from tiny_fused import PIXELS, bert_base, experts_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_fusion import Expert, FoEModel, FusionError, PhatgooseRouter, fuse, save_fused
from hf_fusion.exporting.export import export
from hf_fusion.types import Gates

# ---------------------------------------------------------------- WEMoE


def test_a_wemoe_of_a_task_is_its_expert_alone(tmp_path):
    model = wemoe(default_task="me/expert-1")
    done = export(saved(model, tmp_path / "wemoe"), tmp_path / "dense", task="expert-1")
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    with model.using("me/expert-1"):
        expected = logits(model, read())
    assert torch.allclose(logits(dense, read()), expected, atol=SUMS * expected.abs().max())
    assert done.tensors == len(dense.state_dict())
    assert not list((tmp_path / "dense").glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer(TEXTS).input_ids == make_tokenizer()(TEXTS).input_ids


def test_a_wemoe_of_one_row_computes_what_it_computes_for_it(tmp_path):
    model = wemoe()
    export(saved(model, tmp_path / "wemoe"), tmp_path / "dense", rows=ROWS.select([1]))
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    expected = logits(model, read(TEXTS[1:2]))
    assert torch.allclose(logits(dense, read(TEXTS[1:2])), expected, atol=SUMS * expected.abs().max())
    others = logits(model, read(TEXTS[:1]))
    assert not torch.allclose(logits(dense, read(TEXTS[:1])), others, atol=SUMS * expected.abs().max())


def test_rows_of_a_wemoe_are_averaged_and_a_task_chooses_the_head(tmp_path):
    model = wemoe()
    facts = export(saved(model, tmp_path / "wemoe"), tmp_path / "d", rows=ROWS, task="me/expert-1").facts
    trace = model.trace_forward(**read())
    for layer in trace.layers:
        assert [*facts["coefficients"][layer].values()] == pytest.approx(trace.coefficients(layer).mean(0).tolist())
    head = load_file(tmp_path / "d" / "model.safetensors")["classifier.weight"]
    assert torch.equal(head, experts_of(bert_base(), 2)[1].model.classifier.weight)
    assert facts["head"] == "me/expert-1"


def test_a_wemoe_needs_a_task_or_rows_and_smile_has_no_dense_model(tmp_path):
    saved(wemoe(), tmp_path / "wemoe")
    with pytest.raises(FusionError, match=r"merged per input.*\n.*me/expert-0, me/expert-1.*--input"):
        export(tmp_path / "wemoe", tmp_path / "dense")
    with pytest.raises(FusionError, match=r"no expert 'expert-7'"):
        export(tmp_path / "wemoe", tmp_path / "dense", task="expert-7")
    smile = wemoe(routing="smile", task_vectors="low-rank", rank=2)
    with pytest.raises(FusionError, match="token by token"):
        export(saved(smile, tmp_path / "smile"), tmp_path / "dense", task="expert-0")
    assert not (tmp_path / "dense").exists()
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- PHATGOOSE


@pytest.mark.parametrize("task, weights", [("lora-1", (0, 1)), (None, (0.5, 0.5))])
def test_a_router_becomes_its_base_with_updates(tmp_path, task, weights):
    export(saved(router(), tmp_path / "router"), tmp_path / "dense", task=task)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = with_update(llama(), *((lora_of(k), weight) for k, weight in enumerate(weights)))
    assert {*dense.state_dict()} == {*expected.state_dict()}
    want = logits(expected, read())
    assert torch.allclose(logits(dense, read()), want, atol=SUMS * want.abs().max())


def test_rows_weight_the_experts_of_a_router_by_their_use(tmp_path):
    model = router(top_k=1)
    facts = export(saved(model, tmp_path / "router"), tmp_path / "dense", rows=ROWS).facts
    model.record_routing = 1
    use = torch.zeros(2)
    for text in TEXTS:
        logits(model, read([text]))
        use += torch.tensor([*model.routing_trace().usage().values()]) / len(TEXTS)
    assert [*facts["weights"].values()] == pytest.approx(use.tolist(), rel=1e-5)
    assert 0 < use[0] < 1
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    want = logits(with_update(llama(), *((lora_of(k), float(use[k])) for k in range(2))), read())
    assert torch.allclose(logits(dense, read()), want, atol=SUMS * want.abs().max())


def test_a_router_of_classifiers_gets_the_head_of_the_expert(tmp_path):
    base, experts = bert(LABELS), []
    for k, labels in enumerate((LABELS, ["a", "b", "c"])):
        own = adapter(base, 2, len(labels), k, ["query", "value"])
        gates = Gates({path: torch.ones(a.shape[1]) for path, (a, _) in own.lora.items()})
        experts.append(Expert(f"me/lora-{k}", base, own, make_tokenizer(), labels, gates=gates))
    saved(PhatgooseRouter.from_experts(experts), tmp_path / "router")
    export(tmp_path / "router", tmp_path / "dense", task="lora-1")
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert [*dense.config.id2label.values()] == ["a", "b", "c"]
    want = logits(merged(bert(LABELS), experts[1].adapter, ["a", "b", "c"]), read())
    assert torch.allclose(logits(dense, read()), want, atol=SUMS * want.abs().max())
    with pytest.raises(FusionError, match=r"different labels.*\n.*--task"):
        export(tmp_path / "router", tmp_path / "mean")


def test_an_update_of_a_tied_head_leaves_the_embeddings_alone(tmp_path):
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    own = adapter(base, 2, None, 0, ["q_proj", "lm_head"])
    gates = Gates({path: torch.ones(a.shape[1]) for path, (a, _) in own.lora.items()})
    model = PhatgooseRouter.from_experts([Expert("me/lora", base, own, make_tokenizer(), gates=gates)], top_k=1)
    want = logits(model, read(TEXTS[:1]))
    export(saved(model, tmp_path / "router"), tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.allclose(logits(dense, read(TEXTS[:1])), want, atol=SUMS * want.abs().max())


# ---------------------------------------------------------------- Fusion of Experts, static merges


def foe_of_adapters() -> FoEModel:
    base, experts = bert(LABELS), []
    for k, labels in enumerate((LABELS, ["yes", "no", "never"])):
        own = adapter(base, 2 + k, len(labels), k, ["query", "value"])
        experts.append(Expert(f"me/lora-{k}", base, own, make_tokenizer(), labels))
    return FoEModel.from_experts(experts, mode="selection", fuser_hidden=[8])


@pytest.mark.parametrize("k", [0, 1])
def test_an_expert_of_a_foe_of_adapters(tmp_path, k):
    model = foe_of_adapters()
    export(saved(model, tmp_path / "foe"), tmp_path / "dense", task=f"lora-{k}")
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    labels = (LABELS, ["yes", "no", "never"])[k]
    own = adapter(bert(LABELS), 2 + k, len(labels), k, ["query", "value"])
    want = logits(merged(bert(LABELS), own, labels), read())
    assert torch.allclose(logits(dense, read()), want, atol=SUMS * want.abs().max())
    assert [*dense.config.id2label.values()] == labels


def test_rows_choose_the_expert_that_is_selected_most(tmp_path):
    model = foe_of_adapters()
    model.record_routing = True
    logits(model, model.processor(text=TEXTS))
    counts = model.routing_trace()["order"].sum(0)
    facts = export(saved(model, tmp_path / "foe"), tmp_path / "dense", rows=ROWS).facts
    assert [*facts["selected"].values()] == pytest.approx((counts / counts.sum()).tolist())
    assert facts["task"] == f"me/lora-{int(counts.argmax())}"


def test_an_expert_of_a_foe_of_full_models(tmp_path):
    experts = [Expert(f"me/vit-{k}", vit(LABELS, k), None, image_processor(16), LABELS) for k in range(2)]
    saved(FoEModel.from_experts(experts, fuser_hidden=[8]), tmp_path / "foe")
    with pytest.raises(FusionError, match=r"several models.*\n.*--task NAME \(me/vit-0, me/vit-1\)"):
        export(tmp_path / "foe", tmp_path / "dense")
    export(tmp_path / "foe", tmp_path / "dense", task="vit-1")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(dense, {"pixel_values": PIXELS}), logits(vit(LABELS, 1), {"pixel_values": PIXELS}))


def test_an_expert_of_a_foe_of_language_models(tmp_path):
    experts = [Expert(f"me/llama-{k}", llama(k), processor=make_tokenizer()) for k in range(2)]
    saved(FoEModel.from_experts(experts, mode="selection", fuser_hidden=[8]), tmp_path / "foe")
    done = export(tmp_path / "foe", tmp_path / "dense", rows=ROWS)
    chosen = int(done.facts["task"][-1])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(dense, read()), logits(llama(chosen), read()))
    assert dense.generation_config.eos_token_id == 2


def test_a_static_merge_is_dense_already(tmp_path):
    experts = [Expert(f"me/llama-{k}", llama(k), None, make_tokenizer()) for k in range(2)]
    save_fused(fuse("linear", experts), tmp_path / "merge")
    with pytest.raises(FusionError, match=r"dense model already.*\n.*as it is"):
        export(tmp_path / "merge", tmp_path / "dense")
    with pytest.raises(FusionError, match=r"dense model already.*\n.*extract-lora"):
        export(tmp_path / "merge", tmp_path / "lora", "adapter")


# ---------------------------------------------------------------- what lies beside the weights


def test_recipe_licence_and_commits_are_kept(tmp_path):
    model = router()
    for row, sha in zip(model.config.experts, "ab"):
        row |= {"revision": sha * 40, "license": "mit"}
    saved(model, tmp_path / "router")
    (tmp_path / "router" / "LICENSE").write_text("the terms")
    done = export(tmp_path / "router", tmp_path / "dense", task="lora-0")
    facts = json.loads((tmp_path / "dense" / "export.json").read_text())
    assert facts == done.facts
    assert facts["recipe"]["experts"] == [f"me/lora-0@{'a' * 40}", f"me/lora-1@{'b' * 40}"]
    assert facts["from"].startswith("router@sha256:")
    assert facts["weights"] == {"me/lora-0": 1.0}
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "license: mit" in card
    assert "a" * 40 in card
    assert "base_model:\n- me/lora-0\n- me/lora-1" in card
    assert str(tmp_path) not in card + json.dumps(facts)
    assert (tmp_path / "dense" / "LICENSE").read_text() == "the terms"


def test_nothing_is_replaced_unasked(tmp_path):
    saved(router(), tmp_path / "router")
    export(tmp_path / "router", tmp_path / "out", task="lora-0")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FusionError, match="already contains a model"):
        export(tmp_path / "router", tmp_path / "out", task="lora-1")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "out" / "README.md").write_text("by hand")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    export(tmp_path / "router", tmp_path / "out", "adapter", task="lora-1", overwrite=True)
    assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "README.md").read_text() == "by hand"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(FusionError, match="overlaps"):
        export(tmp_path / "router", tmp_path / "router", task="lora-1", overwrite=True)
