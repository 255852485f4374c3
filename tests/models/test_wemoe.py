"""WEMoEModel compared with a plain loop, for each architecture and storage; heads, generation, merging, errors."""

from __future__ import annotations

import pytest
import torch
from models.wemoe_reference import out_in, reference
from tiny_fused import SHAPES, base_expert, experts_of

from hf_fusion import WEMoEModel
from hf_fusion.models import linears_wemoe


def shuffled(model: WEMoEModel, seed: int = 0) -> WEMoEModel:
    """Routers as adaptation leaves them: coefficients that differ from sample to sample and layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in f".{name}":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def first(output) -> torch.Tensor:
    """The tensor that a model of any kind answers with."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(output)


def plain(model: WEMoEModel, base, experts, units, inputs):
    """The reference of a model, with the tokens that its routers have to read."""
    routers = {}
    for name, parameter in model.named_parameters():
        path, router, leaf = name.removeprefix("backbone.").partition(".router.")
        if router:
            unit = next(unit for unit, paths in units.items() if path == paths[0])
            routers.setdefault(unit, {})[leaf] = parameter
    result = reference(base, [expert.model.state_dict() for expert in experts], units, routers, model.config.scaling)
    for unit in units:
        if "attention_mask" in inputs and "vision_model" not in unit:
            share = inputs["attention_mask"].float()
            if "decoder_input_ids" in inputs and "decoder" in unit:
                share = torch.zeros(inputs["decoder_input_ids"].shape)
                share[:, 0] = 1
            result.shares[unit] = share / share.sum(1, keepdim=True)
    return result


def fused(kind: str, layers: int = 2, **options):
    build, units, inputs = SHAPES[kind]
    base = build()
    experts = experts_of(base)
    heads = {} if options.get("heads") else {"heads": "shared"}
    model = WEMoEModel.from_experts(experts, base_expert(base), router_layers=layers, **heads, **options)
    return shuffled(model), base, experts, units, inputs


def close(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("kind", "layers"), [*((kind, 2) for kind in SHAPES), ("bert", 0), ("bert", 1), ("gpt2", 1), ("t5", 0), ("t5", 1)]
)
def test_equals_the_plain_loop_sample_by_sample(kind, layers):
    model, base, experts, units, inputs = fused(kind, layers)
    assert [unit.name for unit in model.units] == list(units)
    loop = plain(model, base, experts, units, inputs)
    model.record_routing = True
    with torch.no_grad():
        got, want, untouched = (first(m(**inputs)) for m in (model, loop.model, base))
    assert close(got, want) <= 1e-5
    assert close(untouched, want) > 1e-2  # the experts do something
    trace = model.routing_trace()
    assert set(trace.layers) == set(units)
    for unit, w in loop.coefficients.items():
        assert close(trace.coefficients(unit), w.detach()) <= 1e-5
        assert layers == 0 or float((w - w[:1]).abs().max()) > 1e-3  # samples differ
    assert all(".router." in f".{name}" for name, p in model.named_parameters() if p.requires_grad)
    assert_same(model, loop.model, inputs)


def stored(kind: str, base: torch.nn.Module, experts, paths) -> list[dict[str, torch.Tensor]]:
    """The experts' states as a storage keeps them, by textbook means."""
    states = []
    for expert in experts:
        state = dict(expert.model.state_dict())
        for key in (f"{path}.bias" for path in paths if kind == "low-rank-bfloat16"):
            if key in state:
                own = base.state_dict()[key]
                state[key] = own + (state[key] - own).bfloat16().float()
        for key in (f"{path}.weight" for path in paths):
            own = base.state_dict()[key]
            tau = state[key] - own
            if kind == "bfloat16":
                tau = tau.bfloat16().float()
            elif kind == "sparse":
                least = tau.abs().flatten().sort(descending=True).values[round(0.1 * tau.numel()) - 1]
                tau = torch.where(tau.abs() >= least, tau, 0.0)
            elif kind == "low-rank":
                u, s, vt = torch.linalg.svd(tau.double(), full_matrices=False)
                tau = (u[:, :5] @ torch.diag(s[:5]) @ vt[:5]).float()
            elif kind == "low-rank-bfloat16":
                linear = base.get_submodule(key.removesuffix(".weight"))
                u, s, vt = torch.linalg.svd(out_in(linear, tau.double()), full_matrices=False)
                tau = out_in(linear, (u[:, :5] * s[:5]).bfloat16().float() @ vt[:5].bfloat16().float())
            state[key] = own + tau
        states.append(state)
    return states


STORAGES = {
    "bfloat16": {},
    "sparse": {"density": 0.1},
    "low-rank": {"rank": 5},
    "low-rank-bfloat16": {"rank": 5},
}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("storage", STORAGES)
def test_storages_equal_a_loop_over_stored_values(storage, kind, monkeypatch):
    monkeypatch.setattr(linears_wemoe, "CPU_HAS_BFLOAT16", False)  # products in fp32 of what was rounded once
    model, base, experts, units, inputs = fused(kind, task_vectors=storage, **STORAGES[storage])
    states = stored(storage, base, experts, [path for paths in units.values() for path in paths])
    for expert, state in zip(experts, states, strict=True):
        expert.model.load_state_dict(state)
    loop = plain(model, base, experts, units, inputs)
    assert_same(model, loop.model, inputs)
    if storage == "low-rank-bfloat16":
        # Products in bfloat16 round x, x Aᵀ and the change: 2^-9 each, of a change that is a tenth of the output.
        monkeypatch.setattr(linears_wemoe, "CPU_HAS_BFLOAT16", True)
        assert_same(model, loop.model, inputs, 2**-10, 2**-6)
        with torch.no_grad():
            assert close(first(model(**inputs)), first(loop.model(**inputs))) > 1e-5


def assert_same(model, loop, inputs, output: float = 1e-5, gradient: float = 1e-4) -> None:
    """Outputs and the routers' gradients."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    with torch.no_grad():
        assert close(first(model(**inputs)), first(loop(**inputs))) <= output
    for m in (model, loop):
        output = first(m(**inputs))
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        gradients.append(torch.autograd.grad((output * weight).sum(), list(parameters.values())))
    for name, got, want in zip(parameters, *gradients, strict=True):
        assert close(got, want) <= gradient, name
        assert float(want.abs().sum()) > 0


ATTENTION = {
    "bert": {
        f"bert.encoder.layer.{i}.attention": ("self.query", "self.key", "self.value", "output.dense") for i in (0, 1)
    },
    "vit": {f"vit.layers.{i}.attention": ("q_proj", "k_proj", "v_proj", "o_proj") for i in (0, 1)},
    "gpt2": {f"transformer.h.{i}": ("attn.c_attn", "attn.c_proj") for i in (0, 1)},
    "llama": {f"model.layers.{i}.self_attn": ("q_proj", "k_proj", "v_proj", "o_proj") for i in (0, 1)},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_can_be_upscaled(kind):
    model, base, experts, _, inputs = fused(kind, modules="attention")
    units = {name: [f"{name}.{linear}" for linear in linears] for name, linears in ATTENTION[kind].items()}
    assert {unit.name: unit.paths for unit in model.units} == units
    assert_same(model, plain(model, base, experts, units, inputs).model, inputs)


def test_a_pattern_and_a_shared_router():
    model, base, experts, _, inputs = fused("llama", modules=r"\.(gate|up)_proj$", shared_router=True)
    units = {f"model.layers.{i}.mlp": [f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up")] for i in (0, 1)}
    assert {unit.name: unit.paths for unit in model.units} == units
    own = {name.removeprefix("router."): p for name, p in model.named_parameters() if name.startswith("router.")}
    assert sum(p.numel() for p in own.values()) == model.summary()["trainable"]
    loop = plain(model, base, experts, units, inputs)
    loop.routers.update(dict.fromkeys(units, own))
    assert_same(model, loop.model, inputs)
