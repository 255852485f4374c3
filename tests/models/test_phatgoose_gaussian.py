"""Gaussian gates: where a router decides, by what density, and that the decision holds for the linears that follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models.test_phatgoose import IDS, MASK, SHAPES, experts_of
from tiny import bert, gpt2, llama, resnet, t5, vit
from tiny_fused import clip
from torch.distributions import MultivariateNormal
from torch.nn.functional import layer_norm

from hf_fusion import Expert, PhatgooseForGeneration, PhatgooseRouter
from hf_fusion.models.context_phatgoose import CURRENT, DECAY
from hf_fusion.models.points_phatgoose import NOISE, GatePoint, before_points, gate_points, prepared
from hf_fusion.models.state_phatgoose import RoutingCalls
from hf_fusion.types import Gates, Gaussian

ATTENTION = "model.layers.0.self_attn.o_proj"  # the last gate point of the tiny Llama


def gaussian(width: int, rank: int, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q.t()
    variances = torch.rand(rank, generator=generator) * 3
    return Gaussian(torch.randn(width, generator=generator) * 0.5, directions, variances)


def with_gaussians(experts: list[Expert], ranks: tuple[int, ...] = (5, 3)) -> list[Expert]:
    """The experts with random Gaussian gates, of different ranks."""
    base = experts[0].model
    changed = []
    for seed, expert in enumerate(experts):
        found = {}
        for path in gate_points(base):
            weight = base.get_submodule(path).weight
            width = weight.shape[0] if "c_attn" in path else weight.shape[1]
            found[path] = gaussian(width, ranks[seed % len(ranks)], 100 * seed + len(found))
        changed.append(replace(expert, gates=Gates({}, "gaussian", gaussians=found)))
    return changed


def density(gate: Gaussian, z: torch.Tensor) -> torch.Tensor:
    """log N(z; m, V diag(λ) Vᵀ + σ² I)."""
    v = gate.directions.double()
    covariance = v.t() @ (gate.variances.double()[:, None] * v) + NOISE * torch.eye(v.shape[1], dtype=torch.float64)
    return MultivariateNormal(gate.mean.double(), covariance).log_prob(z.double())


def router_of(shape: str, **options) -> PhatgooseRouter:
    build, rows, _ = SHAPES[shape]
    return PhatgooseRouter.from_experts(with_gaussians(experts_of(build(), rows)), **options)


def test_points_are_the_first_input_and_the_outputs_of_attention():
    assert gate_points(llama()) == ["model.layers.0.self_attn.q_proj", ATTENTION]
    assert gate_points(gpt2()) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    layer = "bert.encoder.layer.0.attention"
    assert gate_points(bert(["x", "y"])) == [f"{layer}.self.query", f"{layer}.output.dense"]
    assert [path.rpartition(".")[2] for path in gate_points(vit(["x", "y"]))] == ["q_proj", "o_proj"]
    assert gate_points(t5()) == gate_points(resnet(["x", "y"])) == gate_points(clip()) == []
    deep = llama()
    deep.config.num_hidden_layers = 30
    deep.model.layers = torch.nn.ModuleList([deep.model.layers[0]] * 30)
    outputs = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(30)]
    found = [path for path in outputs if path in gate_points(_unshared(deep))]
    assert found == [outputs[layer] for layer in (3, 6, 10, 13)]


def _unshared(model):
    import copy

    model.model.layers = torch.nn.ModuleList([copy.deepcopy(layer) for layer in model.model.layers])
    return model


def test_scores_are_log_densities_up_to_what_all_experts_share():
    gates = [gaussian(6, 2, 0), gaussian(6, 4, 1)]
    point = GatePoint(0, [0], 6, 2, 4, False, RoutingCalls(None))
    with torch.no_grad():
        for expert, gate in enumerate(gates):
            for target, source in zip(point.slot(expert), prepared(gate), strict=True):
                (target if source.dim() == 0 else target[: len(source)]).copy_(source)
    z = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    scores = point(z).double()
    want = NOISE * (density(gates[0], z) - density(gates[1], z))
    assert torch.allclose(scores[:, 0] - scores[:, 1], want, atol=1e-4)


def expected(experts: list[Expert], inputs: dict, pools: bool) -> torch.Tensor:
    """The expert of the largest density at each token's last gate point, where only later linears are adapted."""
    base, read = experts[0].model, {}
    points = gate_points(base)
    hooks = [
        base.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: read.update({path: args[0]}))
        for path in points
    ]
    with torch.no_grad():
        base(**inputs)
    for hook in hooks:
        hook.remove()
    scores = 0
    for path in points if pools else points[1:]:
        z = layer_norm(read[path], read[path].shape[-1:])
        if pools:
            mask = inputs["attention_mask"][..., None]
            z = ((z * mask).sum(1) / mask.sum(1))[:, None].expand_as(z)
        scores = scores + torch.stack([density(expert.gates.gaussians[path], z) for expert in experts], -1)
    return (scores if pools else in_context(scores, inputs["attention_mask"])).argmax(-1)


def in_context(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores (B, T, E) with those of the real tokens before, as the definition has it."""
    found = CURRENT * scores
    for row in range(scores.shape[0]):
        for token in range(scores.shape[1]):
            weights = torch.tensor([DECAY ** (token - u) * bool(mask[row, u]) for u in range(token + 1)]).double()
            found[row, token] += weights @ scores[row, : token + 1] / weights.sum()
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", ["llama", "bert"])
def test_every_linear_follows_the_last_decision(shape, padded):
    build, rows, inputs = SHAPES[shape]
    base = build()
    experts = with_gaussians(experts_of(base, rows))
    for expert in experts:  # nothing before the gate points is adapted, so that the base alone tells their inputs
        expert.adapter.lora = {path: pair for path, pair in expert.adapter.lora.items() if ".0." not in path}
    mask = MASK if padded else torch.ones_like(MASK)
    inputs = {**inputs, "attention_mask": mask}
    router = PhatgooseRouter.from_experts(experts, top_k=1)
    router.record_routing = 4096
    with torch.no_grad():
        got = router(**inputs).logits
    trace = router.routing_trace()
    want = expected(experts, inputs, pools=shape == "bert")
    real = mask.bool()
    if shape == "llama":
        assert len(want[real].unique()) > 1
    for path in trace.modules:
        if "pooler" not in path:
            chosen = trace.expert_weights(path).argmax(-1)
            adapts = torch.tensor([path in expert.adapter.lora for expert in experts])
            follows = real & adapts[want]
            assert chosen[follows].equal(want[follows]), path
            assert not trace.expert_weights(path)[real & ~adapts[want]].any()
    if shape == "bert":
        for row in range(len(IDS)):
            with torch.no_grad(), router.using(experts[want[row, 0]].name):
                alone = router(input_ids=IDS[row : row + 1][:, real[row]]).logits
            assert torch.allclose(got[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("shape", ["llama mixed", "gpt2"])
def test_decoding_with_a_cache_equals_decoding_without(shape):
    router = router_of(shape)
    with torch.no_grad():
        whole = router(input_ids=IDS).logits
        start = router(input_ids=IDS[:, :3], use_cache=True)
        parts, cache = [start.logits], start.past_key_values
        for position in range(3, IDS.shape[1]):
            step = router(input_ids=IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": MASK.flip(1)}
    plain = router.generate(input_ids=IDS, use_cache=False, **options)
    assert router.generate(input_ids=IDS, **options).equal(plain)
    assert router.generate(input_ids=IDS, num_beams=3, **options).equal(
        router.generate(input_ids=IDS, num_beams=3, use_cache=False, **options)
    )


@pytest.mark.parametrize("shape", ["llama mixed", "gpt2", "bert", "vit"])
def test_a_saved_router_answers_the_same(shape, tmp_path):
    router, inputs = router_of(shape), SHAPES[shape][2]
    router.save_pretrained(tmp_path)
    family = PhatgooseForGeneration if isinstance(router, PhatgooseForGeneration) else PhatgooseRouter
    again = family.from_pretrained(tmp_path)
    with torch.no_grad():
        assert again(**inputs).logits.equal(router(**inputs).logits)


def test_experts_come_and_go_without_a_change_of_the_others():
    build, rows, inputs = SHAPES["llama mixed"]
    experts = with_gaussians(experts_of(build(), rows))
    whole = PhatgooseRouter.from_experts(experts)
    grown = PhatgooseRouter.from_experts(experts[:2])
    with torch.no_grad():
        before = grown(**inputs).logits
        grown.add_experts(experts[2:])
        assert grown(**inputs).logits.equal(whole(**inputs).logits)
        grown.remove_experts([expert.name for expert in experts[2:]])
        assert torch.allclose(grown(**inputs).logits[MASK.bool()], before[MASK.bool()], atol=1e-6)


def test_kinds_of_gates_are_not_mixed():
    build, rows, _ = SHAPES["llama"]
    paper = experts_of(build(), rows)
    gaussians = with_gaussians(paper)
    with pytest.raises(ValueError, match=r"me/expert-0 has gaussian gates, the other experts gates of every linear"):
        PhatgooseRouter.from_experts([gaussians[0], paper[1]])
    router = PhatgooseRouter.from_experts(gaussians[:2])
    with pytest.raises(ValueError, match=r"me/expert-2 has trained gates, the other experts Gaussian ones"):
        router.add_experts(paper[2:3])
    broken = replace(gaussians[2], gates=Gates({}, "gaussian", gaussians={ATTENTION: gaussian(32, 2, 0)}))
    with pytest.raises(ValueError, match=r"has no Gaussian gate at model\.layers\.0\.self_attn\.q_proj"):
        router.add_experts([broken])
    PhatgooseRouter.from_experts([gaussians[0], paper[1]], routing="uniform")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_learn_under_gaussian_gates(checkpointing):
    router = router_of("llama mixed")
    plain = router_of("llama mixed")
    if checkpointing:
        router.gradient_checkpointing_enable()
    for model in (router, plain):
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, got), (_, want) in zip(router.named_parameters(), plain.named_parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        assert got.grad is None or torch.allclose(got.grad, want.grad, atol=1e-6), name
    assert all(router.get_parameter(f"{name}.lora_A").grad.any() for name in _modules(router))


def _modules(router: PhatgooseRouter) -> list[str]:
    return [f"backbone.{paths[0]}.experts" for paths, _ in router._groups if ".0.self_attn.q" in paths[0]]


@pytest.mark.parametrize("shape", ["llama", "bert"])
def test_models_compile_without_a_graph_break(shape):
    router, inputs = router_of(shape), {"input_ids": IDS}
    with torch.no_grad():
        want = router(**inputs).logits
        got = torch.compile(router, backend="aot_eager", fullgraph=True)(**inputs).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_the_summary_counts_gates_once_per_decision():
    router = router_of("llama")
    facts = router.summary()
    gates = 2 * 4 * (1 + 5) * 32  # points, experts, mean and directions, width
    base = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    updates = 2 * 2 * 4 * (64 + 64 + 48 * 2 + 96 * 3)  # layers, top-k, rank, Σ (d_in + d_out)
    assert facts["relative_cost"] == pytest.approx(1 + (gates + updates) / base)
    assert facts["gates"] == ["gaussian"] * 4


def test_a_linear_before_the_first_block_needs_the_papers_gates():
    base = gpt2()
    base.transformer.drop = torch.nn.Linear(48, 48)  # runs before the blocks, though not before them in the file
    modules = base.transformer._modules
    base.transformer._modules = {name: modules[name] for name in ("wte", "wpe", "drop", "h", "ln_f")}
    experts = with_gaussians(experts_of(base, [(4, ("drop", "c_attn"))]))
    assert before_points(base, experts[0].adapter.lora) == "transformer.drop"
    with pytest.raises(ValueError, match=r"me/expert-0 adapts transformer\.drop, before any input of Gaussian gates"):
        PhatgooseRouter.from_experts(experts, top_k=1)


def test_an_input_that_no_decision_needs_is_not_scored():
    experts = with_gaussians(experts_of(llama(), SHAPES["llama"][1]))
    whole = PhatgooseRouter.from_experts(experts)
    for expert in experts:
        expert.adapter.lora = {path: pair for path, pair in expert.adapter.lora.items() if ".1." in path}
    upper = PhatgooseRouter.from_experts(experts)
    for router, expected_points in ((whole, {0, 1}), (upper, {1})):
        with torch.no_grad():
            router(input_ids=IDS)
        assert router.calls.last().decisions.keys() == expected_points
    upper.add_experts([replace(SPARE, model=upper.backbone)])  # adapts the first block: its decision is needed again
    with torch.no_grad():
        upper(input_ids=IDS)
    assert upper.calls.last().decisions.keys() == {0, 1}


SPARE = replace(with_gaussians(experts_of(llama(), [(4, ("q_proj",))]))[0], name="me/spare")
