"""Parts of WEMoE: coefficients, heads, adapters, towers, SMILE, and export of plain models."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from models.test_wemoe import close, first, fused, shuffled
from tiny import SUMS, adapter, bert, distilbert, gpt2, merged
from tiny_fused import (
    IDS,
    MASK,
    PIXELS,
    SHAPES,
    TEXT,
    base_expert,
    bert_base,
    clip,
    clip_vision,
    experts_of,
    fine_tuned,
)
from torch import nn
from transformers import BertModel

from hf_fusion import Expert, WEMoEModel
from hf_fusion.errors import FusionError
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.models.assembly_wemoe import low_rank

LAYERS = [f"bert.encoder.layer.{i}" for i in (0, 1)]


def arithmetic(base: nn.Module, experts, scaling: float = 0.3) -> nn.Module:
    """Task arithmetic, the plain way."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            own = base.state_dict()[name]
            if tensor.is_floating_point():
                tensor.copy_(own + scaling * sum(e.model.state_dict()[name] - own for e in experts))
    return model


@pytest.mark.parametrize("kind", SHAPES)
def test_constant_routers_are_task_arithmetic(kind):
    build, _, inputs = SHAPES[kind]
    base = build()
    experts = experts_of(base)
    model = WEMoEModel.from_experts(experts, base_expert(base), router_layers=0, heads="shared")
    dense = arithmetic(base, experts)
    with torch.no_grad():
        want = first(dense(**inputs))
        assert close(first(model(**inputs)), want) <= 1e-5
        merged = model.merge_for(coefficients=[0.3] * 3)
    assert type(merged) is type(base)
    assert merged.state_dict().keys() == base.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.allclose(merged.state_dict()[name], tensor, atol=1e-6), name


@pytest.mark.long
@pytest.mark.parametrize("kind", SHAPES)
def test_one_hot_coefficients_are_that_experts_mlps(kind):
    model, base, experts, units, inputs = fused(kind)
    for _index, expert in enumerate(experts):
        dense = arithmetic(base, experts)
        own = {
            k: t
            for k, t in expert.model.state_dict().items()
            if k.startswith(tuple(p for u in units.values() for p in u))
        }
        dense.load_state_dict(own, strict=False)
        assert len(own) >= 2 * len(units)
        with torch.no_grad(), model.using(expert.name):
            assert close(first(model(**inputs)), first(dense(**inputs))) <= 1e-5
    rows = torch.eye(3)  # each sample its own expert
    with torch.no_grad(), model.using(rows):
        together = first(model(**inputs))
    with torch.no_grad(), model.using(dict.fromkeys(units, rows)):
        assert torch.equal(first(model(**inputs)), together)


def test_input_is_matched_to_its_plain_model():
    model, base, _, _, inputs = fused("bert")
    with torch.no_grad():
        want = model(**inputs).logits
        for row in range(3):
            alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            dense = model.merge_for(alone)
            assert type(dense) is type(base)
            assert close(dense(**alone).logits[0], want[row]) <= 1e-5
    with pytest.raises(ValueError, match="pass inputs, coefficients or task"):
        model.merge_for()
    with pytest.raises(ValueError, match="not both"):
        model.merge_for(inputs, coefficients=[1, 0, 0])
    with pytest.raises(ValueError, match="2 coefficients were given, but there are 3 experts"):
        model.merge_for(coefficients=[1, 0])
    with pytest.raises(ValueError, match="no unit 'bert'"):
        model.merge_for(coefficients={"bert": [1, 0, 0]})
    with pytest.raises(ValueError, match="no coefficients for bert.encoder.layer.1"):
        model.merge_for(coefficients={LAYERS[0]: [1, 0, 0]})
    dense = fused("clip")[0].merge_for(coefficients=[0.1, 0.2, 0.3])
    assert first(dense(**SHAPES["clip"][2])).isfinite().all()
    model, _, _, _, inputs = fused("t5")
    encoded = model.get_encoder()(input_ids=IDS, attention_mask=MASK)
    with pytest.raises(ValueError, match="these inputs do not reach encoder.block.0.layer.1"):
        model.merge_for({"encoder_outputs": encoded, "decoder_input_ids": inputs["decoder_input_ids"]})


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "t5 gated"])
@pytest.mark.parametrize(
    ("storage", "rounding"),
    [
        ("exact", SUMS),
        ("low-rank", SUMS),
        # of a change that is less than half of the weights here: any last bit may fall otherwise, where sums are added
        # up in another order; alone it is merged in bfloat16
        ("low-rank-bfloat16", 2**-8 / 2),
        ("bfloat16", 2**-8 / 2),
    ],
)
def test_neighbours_and_padding_do_not_change_an_answer(kind, storage, rounding):
    """Not bitwise, since products choose another kernel for another number of rows: the dense base's are not either.

    It is one function all the same: in float64 the difference is that much smaller.
    """
    model, base, _, _, inputs = fused(kind, task_vectors=storage, **({"rank": 5} if "rank" in storage else {}))
    assert apart(model, inputs) <= rounding + apart(base, inputs)
    double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    assert apart(model.double(), double) <= SUMS * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def apart(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference that a sample alone, without its padding, makes to the sample in the batch."""
    worst = 0.0
    with torch.no_grad():
        together = first(model(**inputs))
        for row in range(3):
            alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            real = int(alone.get("attention_mask", torch.ones(1, 99)).sum())
            cut = {k: t[:, :real] if k in ("input_ids", "attention_mask") else t for k, t in alone.items()}
            got, want = first(model(**cut))[0], together[row]
            worst = max(worst, close(got, want[: len(got)] if got.dim() > 1 else want))
    return worst


def test_routers_begin_at_task_arithmetic():
    """Paper, section 3.2: weights N(0, 0.01²), last biases λ, all others 0; reproducible for the same experts."""
    base = bert_base()
    experts = experts_of(base)
    model, again = (WEMoEModel.from_experts(experts, base_expert(base), scaling=0.25) for _ in range(2))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(own) == 8
    for name, parameter in own.items():
        assert torch.equal(parameter, again.get_parameter(name))
        if name.endswith("weight"):
            assert float(parameter.std()) == pytest.approx(0.01, rel=0.3)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.25 if "layers.1.bias" in name else 0.0))


def test_merge_per_batch_only_with_the_option():
    model, _, _, _, inputs = fused("bert")
    with torch.no_grad():
        apart = model(**inputs).logits
        model.config.batch_reduce, model.record_routing = True, True
        together = model(**inputs).logits
        w = model.routing_trace().coefficients()
    assert w.shape == (3, 2, 3)
    assert torch.equal(w[0], w[1])
    assert close(together, apart) > 1e-4
    twice = {name: tensor[[1, 1]] for name, tensor in inputs.items()}
    model.config.batch_reduce = False
    with torch.no_grad():
        assert close(model(**twice).logits[0], apart[1]) <= SUMS


def different_labels() -> tuple[nn.Module, list[Expert]]:
    """Three classifiers on one trunk, with classes of their own."""
    labels = (["a", "b"], ["b", "c", "d"], ["a", "e", "c", "f"])
    base, experts = bert_base(), []
    for k, own in enumerate(labels):
        model = bert(own, seed=10 + k)
        trunk = fine_tuned(base, k).bert
        model.bert.load_state_dict(trunk.state_dict())
        experts.append(Expert(f"me/task-{k}", model, labels=own))
    return base, experts


def test_every_task_keeps_its_head():
    base, experts = different_labels()
    trunk = BertModel(base.config).eval()
    trunk.load_state_dict(base.bert.state_dict())
    model = shuffled(WEMoEModel.from_experts(experts, Expert("me/trunk", trunk)))  # a base without a head
    assert model.task == "me/task-0"
    with torch.no_grad():
        for expert in experts:
            logits = model(**TEXT, task=expert.name).logits
            assert logits.shape == (3, len(expert.labels))
            dense = model.merge_for({k: t[:1] for k, t in TEXT.items()}, task=expert.name)
            assert close(dense(**TEXT).logits[0], logits[0]) <= 1e-5
            assert torch.equal(dense.classifier.weight, expert.model.classifier.weight)
            assert list(dense.config.id2label.values()) == expert.labels
            loss = model(**TEXT, task=expert.name, labels=torch.tensor([0, 1, len(expert.labels) - 1])).loss
            assert loss.isfinite()
        assert model(**TEXT).logits.shape == (3, 2)
        assert model.config.id2label == {0: "a", 1: "b"}  # a task named in a call is forgotten after it
        model.task = "me/task-2"
        assert model(**TEXT).logits.shape == (3, 4)
        assert list(model.config.id2label.values()) == ["a", "e", "c", "f"]
    with pytest.raises(ValueError, match="no expert 'nobody'; there are me/task-0"):
        model(**TEXT, task="nobody")
    with pytest.raises(ValueError, match="have different labels: no single head"):
        WEMoEModel.from_experts(experts, base_expert(base), heads="shared")
    with pytest.raises(ValueError, match="the base has no head"):
        WEMoEModel.from_experts(experts, Expert("me/trunk", trunk), heads="base")
    with pytest.raises(ValueError, match="default_task is 'nobody'"):
        WEMoEModel.from_experts(experts, base_expert(base), default_task="nobody")


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_layer_before_the_classifier_comes_from_the_expert(kind):
    """BERT's pooler, DistilBERT's first linear: of one width for all, whatever the number of classes behind it."""
    build, path = {"bert": (bert, "bert.pooler.dense"), "distilbert": (distilbert, "pre_classifier")}[kind]
    base = build(["x", "y"])
    experts = []
    for k, labels in enumerate((["a", "b"], ["c", "d", "e"])):
        model = build(labels)
        trunk = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith("classifier")}
        model.load_state_dict(trunk, strict=False)
        experts.append(Expert(f"me/{k}", fine_tuned(model, k), labels=labels))
    fused = WEMoEModel.from_experts(experts, base_expert(base))
    for k, expert in enumerate(experts):
        dense = fused.merge_for(task=expert.name)
        assert dense.get_submodule(path).weight.equal(expert.model.get_submodule(path).weight)
        assert dense(**TEXT).logits.shape == (3, 2 + k)
        with torch.no_grad(), fused.using(expert.name):
            assert close(fused(**TEXT, task=expert.name).logits, dense(**TEXT).logits) <= 1e-5


def test_adapters_are_experts_like_any_other():
    base = bert_base()
    adapters = [adapter(base, rank, 2, seed, ("query", "dense")) for seed, rank in enumerate((3, 5))]
    for lora in adapters:
        lora.lora = {path: (a * 0.3, b * 0.3) for path, (a, b) in lora.lora.items()}
    loras = [Expert(f"me/{k}", base, lora, labels=["x", "y"]) for k, lora in enumerate(adapters)]
    full = [Expert(f"me/{k}", merged(base, lora, ["x", "y"]), labels=["x", "y"]) for k, lora in enumerate(adapters)]
    models = [
        shuffled(WEMoEModel.from_experts(experts, given))
        for experts, given in ((loras, None), (full, base_expert(base)), ([loras[0], full[1]], base_expert(base)))
    ]
    with torch.no_grad():
        want = models[1](**TEXT, task="me/1").logits
        for model in models:
            assert close(model(**TEXT, task="me/1").logits, want) <= 1e-5
    conv = gpt2()
    lora = adapter(conv, 3, None, 0, ("c_fc", "c_proj"))
    model = WEMoEModel.from_experts([Expert("me/0", conv, lora)])
    with torch.no_grad(), model.using("me/0"):
        dense = model.merge_for(task="me/0")
        for path, (a, b) in lora.lora.items():
            if "mlp" in path:
                want = conv.get_submodule(path).weight + (b @ a).t()
                assert torch.allclose(dense.get_submodule(path).weight, want, atol=1e-6)


def test_towers_of_a_base_are_experts_too():
    base = clip()
    towers = [fine_tuned(clip_vision(), k) for k in range(2)]
    start = clip_vision()
    start.load_state_dict(base.vision_model.state_dict())
    towers = [fine_tuned(start, k) for k in range(2)]
    model = shuffled(WEMoEModel.from_experts([Expert(f"me/{k}", t) for k, t in enumerate(towers)], base_expert(base)))
    assert [unit.name for unit in model.units] == [f"vision_model.encoder.layers.{i}" for i in (0, 1)]
    whole = []
    for tower in towers:  # the same as full models whose text tower is the base's
        whole.append(copy.deepcopy(base))
        whole[-1].vision_model.load_state_dict(tower.state_dict())
    other = shuffled(WEMoEModel.from_experts([Expert(f"me/{k}", t) for k, t in enumerate(whole)], base_expert(base)))
    inputs = {**TEXT, "pixel_values": PIXELS}
    with torch.no_grad():
        got = model(**inputs).logits_per_image
        assert torch.equal(got, other(**inputs).logits_per_image)
        assert close(got, base(**inputs).logits_per_image) > 1e-3


def test_smile_token_by_token():
    model, base, experts, units, inputs = fused(
        "llama", task_vectors="low-rank", rank=6, routing="smile", top_k=2, gate_rank=4
    )
    assert model.summary()["trainable"] == 0
    loop = arithmetic(base, experts)
    for paths in units.values():
        for path in paths:
            linear = loop.get_submodule(path)
            linear.weight.data.copy_(base.get_submodule(path).weight)
            updates = [e.model.get_submodule(path).weight.detach() - linear.weight.detach() for e in experts]
            factors = [torch.linalg.svd(u.double(), full_matrices=False) for u in updates]

            def hook(module, args, output, factors=factors):
                for token, x in zip(output.view(-1, output.shape[-1]), args[0].view(-1, args[0].shape[-1])):
                    scores = torch.stack([(vt[:4].float() @ x).norm() for _, _, vt in factors]).softmax(0)
                    chosen = scores.argsort(descending=True)[:2]
                    for k in chosen:
                        u, s, vt = factors[k]
                        change = (u[:, :6] * s[:6]) @ vt[:6]
                        token += scores[k] / scores[chosen].sum() * (change.float() @ x)
                return output

            linear.register_forward_hook(hook)
    with torch.no_grad():
        assert close(model(**inputs).logits[MASK.bool()], loop(**inputs).logits[MASK.bool()]) <= 1e-5
    with pytest.raises(ValueError, match="no dense model does the same"):
        model.merge_for(coefficients=[1, 0, 0])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(model.generate(IDS[:2], use_cache=cached, **options) for cached in (True, False)))


def test_energy_decides_the_rank():
    model, base, experts, _, _ = fused("bert", task_vectors="low-rank", energy=0.7)
    summary = model.summary()
    path = "bert.encoder.layer.1.output.dense"
    taus = [e.model.get_submodule(path).weight - base.get_submodule(path).weight for e in experts]
    values = [torch.linalg.svdvals(tau.detach()) ** 2 for tau in taus]
    kept = [v.cumsum(0) / v.sum() for v in values]
    ranks = [int((k < 0.7).sum()) + 1 for k in kept]
    assert model.units[1].linears[1].ranks == ranks
    assert len(set(ranks)) > 0
    want = sum(float(k[r - 1]) for k, r in zip(kept, ranks)) / 3
    assert summary["energy"][path] == pytest.approx(want, abs=1e-5)
    assert min(summary["energy"].values()) >= 0.7


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # gpt2 stores weights transposed
@pytest.mark.parametrize(
    ("merge", "scaling"), [("linear", None), ("ties", None), ("ties", 0.5), ("tsv_m", None), ("model_stock", None)]
)
def test_a_model_starts_from_any_static_merge_and_holds_every_expert(kind, merge, scaling):
    """The merged model is the base of the task vectors: no coefficients give the merge, an expert's own the expert."""
    build, units, inputs = SHAPES[kind]
    base = build()
    experts = experts_of(base)
    model = WEMoEModel.from_experts(experts, base_expert(base), heads="shared", merge=merge, scaling=scaling)
    given = {} if scaling is None else {"scaling": scaling}
    want = merge_states(merge, base.state_dict(), [expert.model.state_dict() for expert in experts], **given)
    for name, tensor in model.merge_for(coefficients=[0.0] * 3).state_dict().items():
        assert torch.allclose(tensor, want[name].to(tensor.dtype), atol=1e-6), name
    alone = model.merge_for(coefficients=[0.0, 1.0, 0.0])
    for path in (path for paths in units.values() for path in paths):
        for name, tensor in alone.get_submodule(path).state_dict().items():
            assert torch.allclose(tensor, experts[1].model.get_submodule(path).state_dict()[name], atol=1e-6), path
    with torch.no_grad():  # routers start from coefficients near 0
        dense = model.merge_for(coefficients=[0.0] * 3)
        assert close(first(model(**inputs)), first(dense(**inputs))) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "ties", "task_vectors": "sparse"}, "merge='ties' needs task_vectors='exact' or 'bfloat16'"),
        ({"merge": "ties", "task_vectors": "low-rank", "rank": 2}, "merge='ties' needs task_vectors="),
        ({"merge": "regmean"}, "regmean cannot be what routers start from: it needs statistics of data"),
        ({"merge": "slerp"}, "slerp cannot be what routers start from: it does not merge 3 models"),
        ({"merge": "tis"}, "'tis' is not a static method"),
        ({"merge": "linear", "scaling": 0.5}, "scaling"),
    ],
)
def test_a_merge_to_start_from_is_refused(options, message):
    base = bert_base()
    with pytest.raises((ValueError, FusionError), match=re.escape(message)):
        WEMoEModel.from_experts(experts_of(base), base_expert(base), **options)


def test_base_and_experts_are_unchanged():
    base = bert_base()
    experts = experts_of(base)
    before = [copy.deepcopy(m.state_dict()) for m in (base, *(e.model for e in experts))]
    model = shuffled(WEMoEModel.from_experts(experts, base_expert(base)))
    model(**TEXT).logits.sum().backward()
    for state, m in zip(before, (base, *(e.model for e in experts))):
        assert all(torch.equal(tensor, m.state_dict()[name]) for name, tensor in state.items())
        assert all(p.requires_grad and p.grad is None for p in m.parameters())


def test_one_expert_and_32():
    base = bert_base()
    with torch.no_grad():
        for count in (1, 32):
            experts = experts_of(base, count, scale=0.02)
            model = WEMoEModel.from_experts(experts, base_expert(base), router_layers=0, scaling=0.1, heads="shared")
            assert close(model(**TEXT).logits, arithmetic(base, experts, 0.1)(**TEXT).logits) <= 1e-5


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_directions_of_zero_are_not_kept(shape):
    """Singular vectors of zero are arbitrary: SMILE's gates would read what the processor's eigensolver left there."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    found_a, found_b, share = low_rank(b @ a, 8, None)
    assert found_a.shape == (3, shape[1]) and found_b.shape == (3, shape[0]) and share == pytest.approx(1)
    assert torch.allclose(found_b.T @ found_a, b @ a, atol=1e-5 * float((b @ a).abs().max()))
    assert torch.allclose(found_a @ found_a.T, torch.eye(3), atol=1e-5)
    assert len(low_rank(torch.zeros(shape), 8, None)[0]) == 1
    assert len(low_rank(torch.randn(shape, generator=generator), None, None)[0]) == 12
