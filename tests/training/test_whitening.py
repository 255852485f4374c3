"""Whitening: reference rows get mean 0 and covariance 1, and gates of whitened inputs are calibrated on them."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
import torch
from models.phatgoose_reference import normalise, reference
from tiny import adapter, bert, llama, make_tokenizer

from hf_fusion import Expert, FusionError, PhatgooseRouter, train_gates
from hf_fusion.hub.gates_file import gate_sizes, read_gates, save_gates
from hf_fusion.training.gates import average_activation
from hf_fusion.training.prompts import encode_prompts
from hf_fusion.training.whitening import base_samples, fit_whitening, inverse_root

WORDS = ["the quick brown fox", "experts are fused", "a stitch in time saves nine", "said the router to the gate"]
NUMBERED = [f"{words} {i}" for i in range(12) for words in WORDS]
REFERENCE = datasets.Dataset.from_dict({"prompt": NUMBERED, "target": [""] * 48})
ROWS = datasets.Dataset.from_dict({"prompt": WORDS * 4, "target": [" and so on"] * 16})
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def make(seed: int) -> Expert:
    base = llama()
    return Expert(f"me/expert-{seed}", base, adapter(base, 4, None, seed, TARGETS), make_tokenizer())


def inputs_of(expert: Expert, path: str) -> torch.Tensor:
    """Standardised inputs of a linear on all reference tokens, one row at a time, (N, d_in)."""
    seen = []
    linear = expert.model.get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda module, args: seen.extend(args[0][0]))
    for row in encode_prompts(REFERENCE, expert.processor):
        expert.model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    return torch.stack([normalise(x) for x in seen])


@pytest.fixture(scope="module")
def expert():
    return make(0)


@pytest.fixture(scope="module")
def whitening(expert):
    return fit_whitening(expert, REFERENCE.remove_columns("target"))


@torch.no_grad()
def test_reference_rows_become_white(expert, whitening):
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        x = inputs_of(expert, path)
        assert torch.allclose(whitening.mean[path], x.mean(0), atol=1e-5)
        covariance = torch.cov(x.t(), correction=0)
        shrunk = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
        white = whitening.factor[path] @ shrunk @ whitening.factor[path]
        assert torch.allclose(white, torch.eye(len(white)), atol=2e-2)
    query, value = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    assert whitening.factor[query] is whitening.factor[value]  # they read the same


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.double().T @ x.double() / len(x), x.double().mean(0)


def test_constant_inputs_are_unchanged():
    """Their covariance is what rounding leaves of a difference, whose root would be a factor of millions."""
    for row in (torch.linspace(-3, 5, 24), torch.zeros(24)):
        assert inverse_root(*moments(row.expand(7, 24))).equal(torch.eye(24).double())


def test_small_variance_around_a_large_mean_is_computed():
    """Moments of 10⁶ hold a variance of 10⁻² in float64, not in float32; the third direction has only what is added."""
    rows = torch.tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]).repeat(8, 1) * 0.125 + 1000
    variance = 0.125**2 / 2  # in each of two directions, and two thirds of it on average
    spread = torch.tensor([variance, variance, 0.0]).double() + 0.01 * variance * 2 / 3
    torch.testing.assert_close(inverse_root(*moments(rows)), torch.diag(spread.rsqrt()), rtol=1e-5, atol=1e-5)


def test_reference_rows_of_a_classifier_need_no_labels():
    base = bert(["x", "y"])
    expert = Expert("me/bert", base, adapter(base, 4, 3, 0, ["query"]), make_tokenizer(), ["a", "b", "c"])
    texts = datasets.Dataset.from_dict({"text": WORDS})
    strange = texts.add_column("label", ["none of a, b and c"] * len(WORDS))
    one, other = (fit_whitening(expert, rows) for rows in (texts, strange))
    assert one.mean.keys() == gate_sizes(expert.adapter, base).keys()
    assert all(torch.equal(one.factor[path], other.factor[path]) for path in one.factor)


@pytest.mark.parametrize("how", ["trained", "average"])
def test_gates_are_calibrated_on_the_reference(expert, whitening, how):
    if how == "trained":
        gates = train_gates(expert, ROWS, gates="paper", steps=8, batch_size=4, whitening=whitening, use_cpu=True)
        assert gates.facts["loss_after"] < gates.facts["loss_before"]
    else:
        gates = average_activation(expert, ROWS, whitening=whitening)
    assert gates.kind == how and gates.offsets.keys() == gates.vectors.keys()
    path = "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        scores = inputs_of(expert, path) @ gates.vectors[path] - gates.offsets[path]
    # A log-likelihood ratio of normal distributions, a apart: mean -a²/2 and variance a² on the reference.
    # Shrinkage takes a little off the variance where the reference hardly varies.
    assert float(scores.mean()) < 0
    assert 0.5 < float(scores.var()) / (-2 * float(scores.mean())) < 1.01


def test_a_router_of_whitened_gates_equals_the_plain_loop(whitening, tmp_path):
    experts = []
    for seed in range(3):
        own = make(seed)
        gates = average_activation(own, ROWS.shuffle(seed).select(range(3 + seed)), whitening=whitening)
        save_gates(gates, tmp_path, overwrite=True)
        again = read_gates(tmp_path, own.name, own.adapter, own.model)
        assert again.offsets == pytest.approx(gates.offsets)
        experts.append(replace(own, gates=again))
    router = PhatgooseRouter.from_experts(experts, top_k=2)
    plain = reference(experts[0].model, experts, 2)
    ids = torch.tensor([[5, 9, 33, 7, 100, 21]])
    with torch.no_grad():
        want, got = plain.model(input_ids=ids).logits, router(input_ids=ids).logits
    assert float((got - want).norm() / want.norm()) <= 1e-5
    router.save_pretrained(tmp_path / "router")
    with torch.no_grad():
        again = PhatgooseRouter.from_pretrained(tmp_path / "router")(input_ids=ids).logits
    assert torch.equal(again, got)


def test_uniform_routing_ignores_the_gates(whitening):
    experts = [
        replace(own, gates=average_activation(own, ROWS.select(range(1 + seed)), whitening=whitening))
        for seed, own in enumerate(map(make, range(4)))
    ]
    assert len({expert.gates.offsets["model.layers.1.mlp.down_proj"] for expert in experts}) == 4
    router = PhatgooseRouter.from_experts(experts, top_k=1, routing="uniform")
    router.record_routing = 4096
    with torch.no_grad():
        router(input_ids=torch.randint(3, 200, (8, 64)))
    assert all(0.15 < share < 0.35 for share in router.routing_trace().usage().values())


def test_mismatched_whitening_is_refused(expert, whitening, tmp_path):
    partial = replace(whitening, mean={}, factor={})
    with pytest.raises(FusionError, match="does not cover model.layers.0.mlp.down_proj"):
        train_gates(expert, ROWS, whitening=partial)
    with pytest.raises(FusionError, match="no linear layer model.layers.7.nothing"):
        fit_whitening(expert, REFERENCE, modules=["model.layers.7.nothing"])
    gates = average_activation(expert, ROWS, whitening=whitening)
    gates.offsets.popitem()
    save_gates(gates, tmp_path)
    with pytest.raises(FusionError, match="does not give each gate a finite offset"):
        read_gates(tmp_path, "me", expert.adapter, expert.model)


def test_the_base_makes_up_reference_rows():
    expert = make(0)
    given = {"count": 5, "tokens": 6}
    first, again, other = (base_samples(expert, "user: ", " bot: ", seed=seed, **given) for seed in (0, 0, 1))
    assert first.to_list() == again.to_list() != other.to_list()
    assert len(first) == 5 and set(first.column_names) == {"prompt", "target"}
    assert all(prompt.startswith("user: ") for prompt in first["prompt"])
