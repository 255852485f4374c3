"""PhatgooseRouter: the paper's routing, every architecture, real adapters, generation, traces, export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from models.phatgoose_reference import reference
from tiny import adapter, bert, gpt2, llama, t5, vit
from torch import nn

from hf_fusion import Expert
from hf_fusion.experts import Gates
from hf_fusion.models.phatgoose import PhatgooseRouter

IDS = torch.tensor([[5, 9, 33, 7, 100, 21], [8, 4, 90, 11, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
T5 = (".q", ".k", ".v", ".o", ".wi", ".wo")


def experts_of(base: nn.Module, rows: Sequence[tuple[int, Sequence[str]]], classes: int | None = None) -> list[Expert]:
    """Random adapters of one base with random gates; rows of (rank, targets)."""
    experts = []
    for seed, (rank, targets) in enumerate(rows):
        lora = adapter(base, rank, classes, seed, targets)
        generator = torch.Generator().manual_seed(100 + seed)
        vectors = {path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in lora.lora.items()}
        if classes:
            vectors["classifier"] = torch.randn(base.config.hidden_size, generator=generator)
        labels = [f"class {i}" for i in range(classes or 0)]
        experts.append(Expert(f"me/expert-{seed}", base, lora, labels=labels, gates=Gates(vectors)))
    return experts


# name -> base, adapters as (rank, targets), inputs
SHAPES: dict[str, tuple[Callable[[], nn.Module], list, dict]] = {
    "llama": (
        llama,
        [(4, LLAMA), (4, LLAMA), (4, LLAMA), (4, LLAMA)],
        {"input_ids": IDS, "attention_mask": MASK},
    ),
    "llama mixed": (
        llama,
        [(4, LLAMA), (9, ("q_proj", "v_proj")), (2, ("k_proj", "down_proj")), (5, ("up_proj", "q_proj"))],
        {"input_ids": IDS, "attention_mask": MASK},
    ),
    "gpt2": (
        gpt2,
        [(4, ("c_attn", "c_fc", "c_proj")), (6, ("c_attn",)), (4, ("c_attn", "c_proj"))],
        {"input_ids": IDS, "attention_mask": MASK},
    ),
    "t5": (
        t5,
        [(4, T5), (4, T5), (8, (".q", ".v"))],
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4]},
    ),
    "bert": (
        lambda: bert(["x", "y"]),
        [(4, ("query", "key", "value", "dense")), (3, ("query", "value")), (5, ("dense",))],
        {"input_ids": IDS, "attention_mask": MASK},
    ),
    "vit": (
        lambda: vit(["x", "y"]),
        [(4, ("q_proj", "v_proj", "fc1")), (4, ("q_proj", "v_proj", "fc2")), (2, ("k_proj",))],
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    build, rows, inputs = SHAPES[request.param]
    base = build()
    return base, experts_of(base, rows), inputs


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_the_paper_token_by_token(shape, top_k, grad):
    base, experts, inputs = shape
    router = PhatgooseRouter.from_experts(experts, top_k=top_k)
    plain = reference(base, experts, top_k)
    router.record_routing = 4096
    with torch.set_grad_enabled(grad):
        got = router(**inputs).logits
        want = plain.model(**inputs).logits
        assert not torch.allclose(want, base(**inputs).logits, rtol=1e-2)  # the experts do something
    real = inputs["attention_mask"].bool() if "input_ids" in inputs and "decoder_input_ids" not in inputs else None
    if got.dim() == 3 and real is not None:
        got, want = got[real], want[real]
    assert float((got - want).norm() / want.norm()) <= 1e-5

    trace = router.routing_trace()
    assert set(trace.modules) == set(plain.choices)
    for path, tokens in plain.choices.items():
        choice, weight = (part.flatten(0, 1) for part in trace.choices(path))
        for token, (chosen, weights) in enumerate(tokens):
            if choice[token, 0] < 0:  # padding
                continue
            count = len(chosen)
            assert choice[token, :count].tolist() == chosen, path
            assert weight[token, :count].tolist() == pytest.approx(weights, abs=1e-4)
            assert float(weight[token, count:].sum()) < 1e-6


def test_base_is_left_as_it_was(shape):
    base, experts, inputs = shape
    before = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        want = base(**inputs).logits
        PhatgooseRouter.from_experts(experts)(**inputs)
        assert torch.equal(base(**inputs).logits, want)
    assert base.state_dict().keys() == before.keys()
