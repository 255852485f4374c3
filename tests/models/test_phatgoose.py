"""PhatgooseRouter: the paper's routing, every architecture, real adapters, generation, traces, export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from models.phatgoose_reference import reference
from tiny import adapter, bert, gpt2, llama, t5, vit
from torch import nn

from hf_fusion import Expert, PhatgooseRouter
from hf_fusion.hub.lora import read_adapter
from hf_fusion.models import routing_phatgoose
from hf_fusion.types import Gates

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


def test_base_is_unchanged(shape):
    base, experts, inputs = shape
    before = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        want = base(**inputs).logits
        PhatgooseRouter.from_experts(experts)(**inputs)
        assert torch.equal(base(**inputs).logits, want)
    assert base.state_dict().keys() == before.keys()


def test_one_expert_equals_peft(tmp_path):
    """The adapter as PEFT saves it, with rsLoRA, rank and alpha patterns, read without PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        target_modules=list(LLAMA),
        rank_pattern={"down_proj": 8},
        alpha_pattern={"q_proj": 3},
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(llama(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path)
    lora = read_adapter(tmp_path, "me/peft")
    gates = Gates({path: torch.randn(a.shape[1]) for path, (a, _) in lora.lora.items()})
    router = PhatgooseRouter.from_experts([Expert("me/peft", llama(), lora, gates=gates)], top_k=1)
    peft = PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        got, want = (model(input_ids=IDS, attention_mask=MASK).logits for model in (router, peft))
    assert float((got - want)[MASK.bool()].norm() / want[MASK.bool()].norm()) < 1e-5


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.8},
}


@pytest.mark.parametrize("kind", ["llama", "llama mixed", "gpt2", "t5"])
@pytest.mark.parametrize("how", GENERATION)
def test_cached_generation_equals_uncached(kind, how):
    build, rows, _ = SHAPES[kind]
    router = PhatgooseRouter.from_experts(experts_of(build(), rows))
    if how == "static cache" and kind == "gpt2":
        pytest.skip("GPT-2 has no static cache in transformers")
    inputs = {
        "input_ids": IDS.flip(1) if kind != "t5" else IDS,
        "attention_mask": MASK.flip(1) if kind != "t5" else MASK,
    }
    options = {"min_new_tokens": 8, "max_new_tokens": 8, **GENERATION[how]}
    answers = []
    for use_cache in (True, False):
        if not use_cache:
            options.pop("cache_implementation", None)
        torch.manual_seed(0)
        answers.append(router.generate(**inputs, **options, use_cache=use_cache))
    assert answers[0].shape == answers[1].shape
    assert torch.equal(*answers)


def test_left_padding_and_batches_do_not_change_an_answer():
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama"][1]))
    alone = router.generate(input_ids=IDS[1:, :5], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    padded = {
        "input_ids": torch.cat([IDS[:1], IDS[1:].roll(1, 1)]),
        "attention_mask": torch.cat([MASK[:1], MASK[1:].flip(1)]),
    }
    batch = router.generate(**padded, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(batch[1, -6:], alone[0, -6:])


def test_bfloat16_follows_float32():
    experts = experts_of(llama(), SHAPES["llama mixed"][1])
    with torch.no_grad():
        want = PhatgooseRouter.from_experts(experts)(input_ids=IDS).logits
        router = copy.deepcopy(PhatgooseRouter.from_experts(experts)).bfloat16()
        got = router(input_ids=IDS).logits
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_gates_experts_and_base(checkpointing):
    base = llama()
    router = PhatgooseRouter.from_experts(experts_of(base, SHAPES["llama mixed"][1]))
    router.train()
    if checkpointing:
        router.gradient_checkpointing_enable()
    router(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in router.named_parameters() if p.grad is not None}
    for part in ("gates", "lora_A", "lora_B.0", "q_proj.weight"):
        assert any(name.endswith(part) and float(g.abs().sum()) > 0 for name, g in gradients.items()), part


def test_gradients_equal_the_plain_loop():
    """Against autograd through dense sums over all experts, in double precision."""
    base = llama().double()
    experts = experts_of(base, SHAPES["llama"][1])
    for expert in experts:
        expert.adapter.lora = {p: (a.double(), b.double()) for p, (a, b) in expert.adapter.lora.items()}
    results = []
    for few in (10**9, 0):  # gathered, grouped
        routing_phatgoose.FEW = few
        try:
            router = PhatgooseRouter.from_experts(experts)
            router(input_ids=IDS, labels=IDS).loss.backward()
        finally:
            routing_phatgoose.FEW = 64
        results.append({name: p.grad.clone() for name, p in router.named_parameters() if ".experts." in name})
        router.zero_grad()
    for name, gradient in results[0].items():
        assert torch.allclose(gradient, results[1][name], rtol=1e-9, atol=1e-12), name


def test_experts_are_added_and_removed():
    base = llama()
    experts = experts_of(base, SHAPES["llama mixed"][1])
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        want = PhatgooseRouter.from_experts(experts)(**inputs).logits
        router = PhatgooseRouter.from_experts(experts[:2])
        first = router(**inputs).logits
        router.add_experts(experts[2:])
        assert router.experts == [e.name for e in experts]
        assert torch.equal(router(**inputs).logits, want)
        router.remove_experts([e.name for e in experts[2:]])
        assert router.experts == [e.name for e in experts[:2]]
        assert torch.equal(router(**inputs).logits, first)
        router.remove_experts([experts[1].name])
        router.add_experts(experts[1:2])
        assert torch.equal(router(**inputs).logits, first)  # top_k is as it was
    with pytest.raises(ValueError, match="no expert 'nobody'"):
        router.remove_experts(["nobody"])
    with pytest.raises(ValueError, match="two experts called me/expert-0"):
        router.add_experts(experts[:1])
    with torch.no_grad():
        assert torch.equal(router(**inputs).logits, first)  # a refused expert leaves no trace


def test_weights_can_be_given():
    experts = experts_of(llama(), SHAPES["llama"][1])
    router = PhatgooseRouter.from_experts(experts)
    with torch.no_grad():
        alone = [PhatgooseRouter.from_experts([e], top_k=1)(input_ids=IDS).logits for e in experts]
        with router.using("me/expert-2"):
            assert torch.allclose(router(input_ids=IDS).logits, alone[2], atol=1e-5)
        with router.using(torch.eye(4)[[3, 1]]):  # each example its own expert
            got = router(input_ids=IDS).logits
        assert torch.allclose(got[0], alone[3][0], atol=1e-5)
        assert torch.allclose(got[1], alone[1][1], atol=1e-5)
        with router.using(None):
            assert torch.equal(router(input_ids=IDS).logits, experts[0].model(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="3 weights were given, but there are 4 experts"), router.using([1, 2, 3]):
        pass


@pytest.mark.parametrize("weights", [None, {"me/expert-0": 0.7, "me/expert-3": 0.3}])
def test_export_is_the_weighted_mean_in_peft(weights, tmp_path):
    from peft import PeftModel

    experts = experts_of(llama(), SHAPES["llama mixed"][1])
    router = PhatgooseRouter.from_experts(experts)
    folder = router.to_adapter(tmp_path / "adapter", weights)
    given = [weights.get(name, 0) if weights else 1 / 4 for name in router.experts]
    with torch.no_grad():
        with router.using(given):
            want = router(input_ids=IDS).logits
        got = PeftModel.from_pretrained(llama(), folder)(input_ids=IDS).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_export_of_heads_needs_weights_that_have_a_mean(tmp_path):
    experts = experts_of(bert(["a", "b"]), [(2, ["query"])] * 2, classes=2)
    for expert in experts:
        expert.labels = ["a", "b"]
    router = PhatgooseRouter.from_experts(experts)
    with pytest.raises(ValueError, match="these weights add up to 0"):
        router.to_adapter(tmp_path / "none", {"me/expert-0": 0.5, "me/expert-1": -0.5})
    assert not (tmp_path / "none").exists()


def test_export_can_be_cut_to_a_rank(tmp_path):
    experts = experts_of(llama(), [(4, LLAMA)] * 3)
    router = PhatgooseRouter.from_experts(experts)
    router.to_adapter(tmp_path / "cut", rank=6)
    cut = read_adapter(tmp_path / "cut", "cut")
    path = "model.layers.0.mlp.up_proj"
    mean = sum(b @ a for a, b in (e.adapter.lora[path] for e in experts)) / 3
    a, b = cut.lora[path]
    assert a.shape[0] == 6
    best = torch.linalg.svdvals(mean)[6:].norm()  # Eckart-Young
    assert float((b @ a - mean).norm()) == pytest.approx(float(best), rel=1e-3)


def test_trace_of_a_generation():
    experts = experts_of(llama(), SHAPES["llama"][1])
    router = PhatgooseRouter.from_experts(experts)
    router.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="record_routing"):
        router.routing_trace()
    router.record_routing = 4096
    tokens = router.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    trace = router.routing_trace()
    path = "model.layers.1.self_attn.v_proj"
    weights = trace.expert_weights(path)
    assert weights.shape == (2, tokens.shape[1] - 1, 4)  # the last token was never read
    sums = weights.sum(-1)
    assert torch.allclose(sums[0], torch.ones(9), atol=1e-5)
    assert float(sums[1, 5]) == 0  # padding is routed to no expert
    assert sum(trace.usage().values()) == pytest.approx(1)
    assert set(trace.to_dict()["modules"]) == set(trace.modules)
    router.record_routing = 12  # 2 rows x 6 tokens: the prompt alone fills it
    router.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    small = router.routing_trace()
    assert small.choices(path)[0].shape[1] <= 6
    assert small.dropped[path] > 0
    router.record_routing = 10  # less than the prompt: the newest 5 positions of each row
    router.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    tiny = router.routing_trace()
    for kept, whole in zip(tiny.choices(path), small.choices(path), strict=True):
        assert torch.equal(kept, whole[:, -5:])
    assert tiny.dropped[path] == 2 * 9 - 10


def test_traced_and_untraced_answers_are_the_same():
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama"][1]))
    with torch.no_grad():
        plain = router(input_ids=IDS).logits
        router.record_routing = 4096
        assert torch.equal(router(input_ids=IDS).logits, plain)


BAD: dict[str, tuple[Callable[[list[Expert]], object], str]] = {
    "NaN": (lambda e: e[1].adapter.lora["model.layers.0.mlp.up_proj"][0].fill_(float("nan")), "me/expert-1 has NaN"),
    "gate NaN": (lambda e: e[0].gates.vectors["model.layers.0.mlp.up_proj"].fill_(float("nan")), "the gate of"),
    "wrong base": (lambda e: setattr(e[1].adapter, "base", "other/base"), "adapts other/base, the others me/base"),
    "wrong shapes": (
        lambda e: e[1].adapter.lora.update({"model.layers.0.mlp.up_proj": (torch.ones(4, 31), torch.ones(64, 4))}),
        "do not fit 32→64",
    ),
    "rank 0": (
        lambda e: e[1].adapter.lora.update({"model.layers.0.mlp.up_proj": (torch.ones(0, 32), torch.ones(64, 0))}),
        "rank 0",
    ),
    "huge rank": (
        lambda e: e[1].adapter.lora.update({"model.layers.0.mlp.up_proj": (torch.ones(999, 32), torch.ones(64, 999))}),
        "rank 999",
    ),
    "unknown target": (
        lambda e: e[1].adapter.lora.update({"model.layers.7.x": (torch.ones(4, 32), torch.ones(64, 4))}),
        "model.layers.7.x, which the base does not have",
    ),
    "no linear": (
        lambda e: e[1].adapter.lora.update({"model.norm": (torch.ones(4, 32), torch.ones(32, 4))}),
        "not a linear layer",
    ),
    "no gates": (lambda e: setattr(e[1], "gates", None), "me/expert-1 has no gates"),
    "a gate missing": (lambda e: e[1].gates.vectors.pop("model.layers.0.mlp.up_proj"), "no gate for"),
    "empty": (lambda e: e.clear(), "the list is empty"),
    "saved norm": (
        lambda e: e[1].adapter.saved.update({"model.norm.weight": torch.full((32,), 2.0)}),
        "differ in model.norm.weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mismatched_experts_are_refused(name):
    experts = experts_of(llama(), [(4, LLAMA), (4, LLAMA)])
    for expert in experts:
        expert.adapter.base = "me/base"
    spoil, message = BAD[name]
    spoil(experts)
    with pytest.raises(ValueError, match=message):
        PhatgooseRouter.from_experts(experts)


def test_more_experts_per_token_than_experts():
    with pytest.raises(ValueError, match="top_k=3, but there are only 2 experts"):
        PhatgooseRouter.from_experts(experts_of(llama(), [(4, LLAMA)] * 2), top_k=3)


def test_missing_gates_become_prototypes_with_the_option():
    experts = experts_of(llama(), [(4, LLAMA)] * 3)
    experts[1].gates = None
    router = PhatgooseRouter.from_experts(experts, missing_gates="arrow")
    assert [row["gates"] for row in router.config.experts] == ["trained", "arrow", "trained"]
    with torch.no_grad():
        assert router(input_ids=IDS).logits.isfinite().all()


def test_arrow_scores_by_absolute_value():
    experts = experts_of(llama(), [(4, LLAMA)] * 3)
    router = PhatgooseRouter.from_experts(experts, routing="arrow", top_k=1)
    router.record_routing = 4096
    path = "model.layers.0.self_attn.q_proj"
    seen = []
    router.backbone.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        router(input_ids=IDS)
    updates = [b @ a for a, b in (e.adapter.lora[path] for e in experts)]
    prototypes = torch.stack([torch.linalg.svd(update).Vh[0] for update in updates])
    assert torch.equal(
        router.routing_trace().choices(path)[0][..., 0].long(), (seen[0] @ prototypes.T).abs().argmax(-1)
    )


def test_summary_counts():
    router = PhatgooseRouter.from_experts(experts_of(llama(), [(4, LLAMA)] * 3))
    summary = router.summary()
    assert summary["routed_linears"] == 14
    assert summary["parameters"] == sum(p.numel() for p in router.parameters())
    assert summary["relative_cost"] > 1


@pytest.mark.parametrize("alone", [False, True])
def test_routed_linears_compile_without_a_graph_break(alone):
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama mixed"][1]))
    block, x = router.backbone.model.layers[0].mlp, torch.randn(2, 40, 32)
    with torch.no_grad(), router.using("me/expert-2") if alone else nullcontext():
        want = block(x)
        got = torch.compile(block, backend="eager", fullgraph=True)(x)  # a break would raise
    torch._dynamo.reset()
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_models_compile_without_a_graph_break(kind):
    build, rows, inputs = SHAPES[kind]
    router = PhatgooseRouter.from_experts(experts_of(build(), rows))
    real = MASK.bool() if kind in ("llama", "llama mixed", "gpt2") else slice(None)
    with torch.no_grad():
        want = router(**inputs).logits[real]
        got = torch.compile(router, backend="aot_eager", fullgraph=True)(**inputs).logits[real]
    torch._dynamo.reset()
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.slow
def test_generation_with_a_static_cache_compiles():
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama mixed"][1]))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    want = router.generate(input_ids=IDS.flip(1), attention_mask=MASK.flip(1), **options)
    router.backbone.forward = torch.compile(router.backbone.forward, backend="aot_eager", fullgraph=True)
    got = router.generate(input_ids=IDS.flip(1), attention_mask=MASK.flip(1), **options)
    torch._dynamo.reset()
    assert torch.equal(got, want)
