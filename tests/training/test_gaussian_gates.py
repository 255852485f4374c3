"""Fitting Gaussian gates: moments of what the adapted base reads on the adapter's rows, and their file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import adapter, bert, llama, make_tokenizer, merged, t5
from torch.nn.functional import layer_norm

from hf_fusion import Expert, FusionError, save_gates, train_gates
from hf_fusion.hub.gates_file import gate_tensors, read_gates
from hf_fusion.training.gaussian_gates import ROWS

PROMPTS = ["the quick brown", "experts are", "a stitch in time", "said the router", "nine lazy", "any of them"]
TARGETS = [" fox jumps", " fused into one model", " saves nine", " to the gate", " dogs", " is one"]
WORDS = Dataset.from_dict({"prompt": PROMPTS, "target": TARGETS})
REVIEWS = Dataset.from_dict({"text": PROMPTS, "label": ["yes", "no"] * 3})
FIRST, ATTENTION = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"


def writer(targets: list[str]) -> Expert:
    base = llama()
    return Expert("me/writer", base, adapter(base, 4, None, 0, targets), make_tokenizer())


def reviewer() -> Expert:
    base = bert(["no", "yes"])
    lora = adapter(base, 4, 2, 0, ["1.attention.self.query"])
    return Expert("me/reviewer", base, lora, make_tokenizer(), ["no", "yes"])


def inputs_of(model: torch.nn.Module, path: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """LN of what a linear reads, (T, d) for each row."""
    found = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0][0].detach()))
    for row in rows:
        model(input_ids=row[None])
    hook.remove()
    return [layer_norm(x, x.shape[-1:]).double() for x in found]


def sequences(expert: Expert) -> list[torch.Tensor]:
    texts = [prompt + target for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    return [torch.tensor([*ids, 2]) for ids in expert.processor(texts).input_ids]


def assert_moments(gate, x: torch.Tensor) -> None:
    mean, covariance = x.mean(0), x.t().cov(correction=0)
    assert torch.allclose(gate.mean.double(), mean, atol=1e-5)
    assert torch.allclose(
        gate.variances.double(), torch.linalg.eigvalsh(covariance).flip(0)[: len(gate.variances)], atol=1e-4
    )
    v = gate.directions.double()
    assert torch.allclose(v @ v.t(), torch.eye(len(v), dtype=torch.float64), atol=1e-5)
    along = v[:4] @ covariance
    assert torch.allclose(along, gate.variances[:4, None].double() * v[:4], atol=1e-4)  # eigenvectors


@pytest.mark.parametrize("targets", [["1.self_attn.q_proj"], ["v_proj", "up_proj"]])
def test_a_gate_has_the_moments_of_all_tokens(targets):
    expert = writer(targets)
    gates = train_gates(expert, WORDS, batch_size=2, use_cpu=True)
    assert gates.kind == gates.description == "gaussian" and gates.facts == {"examples": 6}
    assert list(gates.gaussians) == [FIRST, ATTENTION] and not gates.vectors
    model = merged(expert.model, expert.adapter, [])  # an adapter changes what later linears read
    for path, gate in gates.gaussians.items():
        assert_moments(gate, torch.cat(inputs_of(model, path, sequences(expert))))
        assert len(gate.variances) == 32


def test_a_classifiers_gate_has_the_moments_of_examples():
    expert = reviewer()
    gates = train_gates(expert, REVIEWS, use_cpu=True)
    rows = [torch.tensor(ids) for ids in expert.processor(PROMPTS).input_ids]
    for path, gate in gates.gaussians.items():
        means = torch.stack([x.mean(0) for x in inputs_of(expert.model, path, rows)])
        assert len(gate.variances) == len(PROMPTS) - 1  # all that six examples can differ in
        assert_moments(gate, means)


def test_few_rows_are_read_and_the_base_stays_as_it_was():
    expert = writer(["q_proj"])
    before = {name: tensor.clone() for name, tensor in expert.model.state_dict().items()}
    many = Dataset.from_dict({"prompt": PROMPTS * 50, "target": TARGETS * 50})
    first, again = (train_gates(expert, many, use_cpu=True) for _ in range(2))
    assert first.facts == {"examples": ROWS}
    assert all(tensor.equal(gate_tensors(again)[name]) for name, tensor in gate_tensors(first).items())
    other = train_gates(expert, many, seed=1, use_cpu=True)
    assert not other.gaussians[FIRST].mean.equal(first.gaussians[FIRST].mean)
    assert all(tensor.equal(before[name]) for name, tensor in expert.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in expert.model.modules())


def test_what_does_not_apply_is_refused_or_named(caplog):
    expert = writer(["q_proj"])
    with caplog.at_level(logging.WARNING, "hf_fusion"):
        assert train_gates(expert, WORDS, steps=3, use_cpu=True).kind == "gaussian"
    assert "steps=3 is ignored" in caplog.text
    base = t5()
    encoder_decoder = Expert("me/t5", base, adapter(base, 4, None, 0, [".q"]), make_tokenizer())
    assert train_gates(encoder_decoder, WORDS, steps=1, use_cpu=True).kind == "trained"
    with pytest.raises(FusionError, match="Gaussian gates cannot route adapters of T5ForConditionalGeneration"):
        train_gates(encoder_decoder, WORDS, gates="gaussian")
    with pytest.raises(FusionError, match="gates='other'"):
        train_gates(expert, WORDS, gates="other")
    with pytest.raises(FusionError, match="batch_size=0: it must be greater than 0"):
        train_gates(expert, WORDS, batch_size=0)
    nan = replace(expert, model=llama())
    nan.model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(FusionError, match="NaN or Inf"):
        train_gates(nan, WORDS, use_cpu=True)


def test_gates_survive_their_file(tmp_path: Path):
    expert = writer(["q_proj"])
    gates = train_gates(expert, WORDS, use_cpu=True)
    save_gates(gates, tmp_path)
    again = read_gates(tmp_path, "me", expert.adapter, expert.model)
    assert (again.kind, again.facts, again.vectors) == ("gaussian", gates.facts, {})
    for name, tensor in gate_tensors(gates).items():
        assert torch.allclose(gate_tensors(again)[name], tensor, rtol=2e-3, atol=2e-3), name


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{ATTENTION}.mean"), f"lacks the tensor {ATTENTION}.mean"),
        (lambda tensors: tensors.update({"x.mean": torch.zeros(3)}), "has a tensor x.mean, which Gaussian gates"),
        (
            lambda tensors: tensors.update({f"{FIRST}.variances": torch.zeros(3)}),
            rf"has a Gaussian gate of shapes \[32\], \[32, 32\] and \[3\] for {FIRST}, whose input has 32 features",
        ),
        (lambda tensors: tensors[f"{FIRST}.mean"].fill_(float("nan")), f"has NaN or Inf in the gate of {FIRST}.mean"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, edit, message):
    expert = writer(["q_proj"])
    file = save_gates(train_gates(expert, WORDS, use_cpu=True), tmp_path)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"kind": "gaussian"})
    with pytest.raises(FusionError, match=message) as error:
        read_gates(tmp_path, "me", expert.adapter, expert.model)
    assert "fit gates" in error.value.hint
