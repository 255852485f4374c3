"""Fusers that read hidden states: values by hand, experts left out or added, saved folders, querying few experts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import SUMS, TEXTS, adapter, bert, distilbert, gpt2, llama, make_tokenizer

from hf_fusion import Expert, FoEModel, load_fused
from hf_fusion.models.attention_foe import AttentionFuser
from hf_fusion.models.frugal_foe import FrugalPolicy, candidate_subsets
from hf_fusion.models.fuser_foe import build_fuser
from hf_fusion.models.gated_foe import LEAST_LOG, GatedFuser, confidence, log_probabilities

MISSING = float("-inf")
ABC = ["a", "b", "c"]


def odds(*probabilities: float) -> list[float]:
    """Logits of a softmax; -inf for a label that an expert does not know."""
    return [torch.tensor(p).log().item() if p else MISSING for p in probabilities]


def gated(**options: bool) -> GatedFuser:
    """Two experts with embeddings of width 2, three labels, of which the second lacks the last. All weights are 0."""
    fuser = GatedFuser([2, 2], 3, experts=2, **{"selection": False, "gates": True, "labels": False, **options})
    for linear in fuser.evidence:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    if not fuser.selection:
        fuser.known.copy_(torch.tensor([[True, True, True], [True, True, False]]))
    return fuser


FEATURES = torch.tensor([[*odds(0.5, 0.25, 0.25), 1.0, 2.0, *odds(0.2, 0.8, 0), 3.0, -1.0]])
BOTH, FIRST = torch.tensor([[True, True]]), torch.tensor([[True, False]])


def test_confidence_by_hand():
    found = confidence(torch.tensor([[*odds(0.5, 0.25, 0.25)], [*odds(0.2, 0.8, 0)], [MISSING] * 3]))
    entropies = [-0.5 * torch.tensor(0.5).log() - 0.5 * torch.tensor(0.25).log(), torch.tensor(0.5004024)]
    torch.testing.assert_close(found[:2, 0], torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:2, 1], torch.stack(entropies), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[:2, 2].exp(), torch.tensor([0.5, 0.8]))
    torch.testing.assert_close(found[:2, 3].exp(), torch.tensor([2.0, 4.0]))
    assert found.isfinite().all()
    assert log_probabilities(torch.full((1, 3), MISSING)).eq(LEAST_LOG).all()


def test_gates_mix_calibrated_probabilities():
    fuser = gated()
    torch.testing.assert_close(fuser(FEATURES).exp(), torch.tensor([[0.35, 0.525, 0.125]]))
    with torch.no_grad():
        fuser.bias.copy_(torch.tensor([3.0, 1.0]).log())
    torch.testing.assert_close(fuser(FEATURES).exp(), torch.tensor([[0.425, 0.3875, 0.1875]]))
    with torch.no_grad():
        fuser.temperature.copy_(torch.tensor([1.0, 2.0]))  # squares: 0.04 : 0.64
    torch.testing.assert_close(fuser(FEATURES).exp()[0, 0], torch.tensor(0.75 * 0.5 + 0.25 * 0.04 / 0.68))


def test_evidence_is_scaled_by_how_many_experts_were_queried():
    """Expert 1 has the evidence ln 3 for itself, from the first number of its embedding: alone that counts twice."""
    fuser = gated(selection=True)
    with torch.no_grad():
        fuser.evidence[0].weight[0, 0] = 3.0
        fuser.evidence[1].weight[1, 0] = 1.0
    shown = fuser.read(FEATURES)
    torch.testing.assert_close(fuser.combine(shown, BOTH), torch.tensor([[3.0, 3.0]]))
    torch.testing.assert_close(fuser.combine(shown, FIRST), torch.tensor([[6.0, 0.0]]))
    torch.testing.assert_close(fuser.position(shown, FIRST), torch.tensor([[6.0, 0.0]]).softmax(1))


def test_an_expert_that_was_not_queried_or_failed_does_not_count():
    fuser = gated()
    alone = torch.tensor([[0.5, 0.25, 0.25]])
    torch.testing.assert_close(fuser.combine(fuser.read(FEATURES), FIRST).exp(), alone)
    broken = FEATURES.clone()
    broken[:, 5:8] = MISSING
    torch.testing.assert_close(fuser(broken).exp(), alone)
    broken[:, :3] = MISSING
    assert fuser(broken).isfinite().all()


def test_stacking_adds_up_evidence_for_labels():
    fuser = gated(gates=False, labels=True)
    with torch.no_grad():
        fuser.evidence[0].weight[2, -3] = 2.0  # for the last label, by expert 1's log-probability of the first
        fuser.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(fuser(FEATURES), torch.tensor([[0.0, 1.0, 2 * torch.tensor(0.5).log()]]))
    both = gated(labels=True)
    with torch.no_grad():
        both.bias[2:] = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(both(FEATURES), gated()(FEATURES) + torch.tensor([0.0, 1.0, 0.0]))


def attention(selection: bool = False) -> tuple[AttentionFuser, torch.Tensor]:
    torch.manual_seed(1)
    fuser = AttentionFuser([4, 6, 3], 5, experts=3, selection=selection).eval()
    return fuser, torch.randn(7, sum(fuser.widths))


def test_attention_does_not_mind_the_order_of_experts():
    fuser, features = attention()
    order = [2, 0, 1]
    other = AttentionFuser([fuser.sizes[k] for k in order], 5, experts=3, selection=False).eval()
    state = {name: tensor for name, tensor in fuser.state_dict().items() if not name.startswith("projections")}
    state["names"] = state["names"][order]
    for new, old in enumerate(order):
        for name, tensor in fuser.projections[old].state_dict().items():
            state[f"projections.{new}.{name}"] = tensor
    other.load_state_dict(state)
    parts = features.split(fuser.widths, 1)
    torch.testing.assert_close(other(torch.cat([parts[k] for k in order], 1)), fuser(features), rtol=SUMS, atol=SUMS)
    assert not torch.allclose(other(features), fuser(features), atol=1e-3)


@pytest.mark.parametrize("selection", [False, True])
def test_an_expert_is_added_to_attention(selection):
    fuser, features = attention(selection)
    wider = fuser.with_expert(8).eval()
    more = torch.cat([features, torch.randn(7, 5 + 8)], 1)
    queried = torch.tensor([[True, True, True, False]]).expand(7, -1)
    before, after = fuser(features), wider.combine(wider.read(more), queried)
    torch.testing.assert_close(after[:, : before.shape[1]], before, rtol=SUMS, atol=SUMS)
    assert not torch.allclose(wider(more)[:, : before.shape[1]], before, atol=1e-3)


# ---------------------------------------------------------------- in a model


def classifiers(tokenizer) -> list[Expert]:
    base = bert(ABC)
    lora = [
        Expert(f"me/{k}", base, adapter(base, 4, 3, k, ["query", "dense"]), processor=tokenizer, labels=ABC)
        for k in range(2)
    ]
    return [*lora, Expert("me/full", distilbert(ABC[:2], seed=7), processor=tokenizer, labels=ABC[:2])]


def with_fuser(experts: list[Expert], kind: str, mode: str = "output", frugal: bool = False) -> FoEModel:
    """A model with a random fuser of a kind; if frugal, with a random policy."""
    model = FoEModel.from_experts(experts, mode=mode)
    config = model.config
    config.fuser, config.feature_depths, config.fitted = kind, [0.5, 1.0], True
    widths = [expert["feature_size"] for expert in FoEModel.from_experts(experts, mode="selection").config.experts]
    for expert, width in zip(config.experts, widths, strict=True):
        expert["feature_size"] = None if kind == "stacking" else 2 * width
    torch.manual_seed(3)
    model.fuser = build_fuser(config).eval()
    for parameter in model.fuser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model.fuser, "known"):
        for index, expert in enumerate(config.experts):
            model.fuser.known[index, expert["label_map"]] = True
    if frugal:
        subsets = candidate_subsets(len(experts))
        config.frugal = {"rows": 12, "subsets": len(subsets), "neighbors": 2, "cost_weight": 0.01}
        model.policy = FrugalPolicy(12, len(experts), model.fuser.shown_size, len(subsets), 2)
        model.policy.subsets.copy_(subsets)
        model.policy.outputs.uniform_()
        model.policy.losses.uniform_()
    return model.eval()


KINDS = ["stacking", "gating", "gated-stacking", "attention"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["output", "selection"])
def test_saved_and_loaded(kind, mode, tmp_path):
    if mode == "selection" and "stacking" in kind:
        pytest.skip("predicts labels")
    model = with_fuser(classifiers(make_tokenizer()), kind, mode, frugal=True)
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert (tmp_path / "gated_foe.py").exists()
    loaded, _ = load_fused(tmp_path)
    inputs = model.processor(text=TEXTS)
    half = FoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        for budget in (None, 0.4):
            wanted = model(**inputs, budget=budget).logits
            assert torch.equal(loaded(**inputs, budget=budget).logits, wanted)
            assert half(**inputs, budget=budget).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_querying_everyone_by_turns_equals_the_forward(kind):
    """With a policy whose losses make it query all experts, and padding that the examples do not have alone."""
    model = with_fuser(classifiers(make_tokenizer()), kind, frugal=True)
    sizes = model.policy.subsets.sum(1)
    model.policy.losses.copy_(10.0 * (3 - sizes[:, None]).expand_as(model.policy.losses))
    model.record_routing = True
    inputs = model.processor(text=TEXTS)
    with torch.no_grad():
        everyone, by_turns = model(**inputs).logits, model(**inputs, budget=1.0).logits
    assert (model.routing_trace()["order"] > 0).all()
    torch.testing.assert_close(by_turns, everyone, rtol=SUMS, atol=SUMS)


def test_a_frugal_selection_runs_the_expert_that_it_chooses():
    model = with_fuser(classifiers(make_tokenizer()), "gating", "selection", frugal=True)
    model.policy.losses[model.policy.subsets.sum(1) > 1] += 100  # one is enough
    model.record_routing = True
    inputs = model.processor(text=TEXTS)
    with torch.no_grad():
        logits = model(**inputs, budget=1.0).logits
        everyone = model.expert_outputs(inputs)[0]
    trace = model.routing_trace()
    choice = trace["scores"].argmax(1)
    rows = torch.arange(len(choice))
    assert (trace["order"][rows, choice] > 0).all()
    assert (trace["order"] > 0).sum(1).max() <= 2
    torch.testing.assert_close(logits.exp(), everyone[rows, choice].clamp(min=1e-8), rtol=SUMS, atol=SUMS)
    with pytest.raises(ValueError, match="without frugal=True"):
        with_fuser(classifiers(make_tokenizer()), "gating", "selection")(**inputs, budget=0.5)


def language_models(frugal: bool = True) -> FoEModel:
    tokenizer = make_tokenizer()
    experts = [Expert("me/llama", llama(5), processor=tokenizer), Expert("me/gpt2", gpt2(6, 300), processor=tokenizer)]
    return with_fuser(experts, "gating", "selection", frugal)


def test_language_models_are_selected_by_a_cheap_one_first():
    model = language_models()
    inputs = model.processor(text=TEXTS)
    model.record_routing = True
    whole = model.select(inputs)
    model.policy.losses.copy_(torch.where(model.policy.subsets.sum(1)[:, None] == 2, 0.0, 10.0).expand(3, 12))
    assert torch.equal(model.select(inputs, budget=1.0), whole)
    assert (model.routing_trace()["order"] > 0).all()
    model.policy.losses.zero_()  # then one is enough: the first
    model.select(inputs, budget=1.0)
    assert (model.routing_trace()["order"] > 0).sum(1).tolist() == [1] * len(TEXTS)
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, budget=1.0)
    choice = model.select(inputs, budget=1.0)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=3, do_sample=False, choice=choice))
    with pytest.raises(ValueError, match="without frugal=True"):
        language_models(frugal=False).select(inputs, budget=1.0)


def test_threads_get_what_one_thread_gets():
    model = with_fuser(classifiers(make_tokenizer()), "gated-stacking", frugal=True)
    chooser = with_fuser(classifiers(make_tokenizer()), "gating", "selection", frugal=True)
    calls = [
        partial(each, **each.processor(text=texts), budget=budget)
        for texts in (TEXTS, TEXTS[:1], TEXTS[1:])
        for each in (model, chooser)
        for budget in (None, 0.4, 1.0)
    ]
    with torch.no_grad():
        wanted = [call().logits for call in calls]

    def run(index: int) -> torch.Tensor:
        with torch.no_grad():
            return calls[index]().logits

    with ThreadPoolExecutor(4) as pool:
        for index, found in zip([*range(len(calls))] * 2, pool.map(run, [*range(len(calls))] * 2), strict=True):
            torch.testing.assert_close(found, wanted[index], rtol=SUMS, atol=SUMS)


def test_a_folder_of_before_the_kinds_of_fusers_loads(tmp_path: Path):
    """Its config names no kind, and its tensors are an MLP's, in both modes."""
    for mode in ("output", "selection"):
        model = FoEModel.from_experts(classifiers(make_tokenizer()), mode=mode, fuser_hidden=[8])
        folder = tmp_path / mode
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        for name in ("fuser", "feature_depths"):
            config.pop(name, None)
        (folder / "config.json").write_text(json.dumps(config))
        names = {name for name in model.state_dict() if name.startswith("fuser.")}
        assert names == {f"fuser.{layer}.{part}" for layer in ("hidden.0", "output") for part in ("weight", "bias")}
        loaded = FoEModel.from_pretrained(folder)
        inputs = model.processor(text=TEXTS)
        outputs, embeddings = model.expert_outputs(inputs, embed=True)
        read = outputs.flatten(1) if mode == "output" else torch.cat(embeddings, 1)
        state = model.state_dict()
        hidden = torch.relu(read @ state["fuser.hidden.0.weight"].T + state["fuser.hidden.0.bias"])
        scores = hidden @ state["fuser.output.weight"].T + state["fuser.output.bias"]
        with torch.no_grad():
            found = loaded(**inputs).logits
        if mode == "selection":
            scores = outputs[torch.arange(len(scores)), scores.argmax(1)].clamp(min=1e-8).log()
        torch.testing.assert_close(found, scores, rtol=SUMS, atol=SUMS)
