"""Concrete: a mask shared by all task vectors, learned without labels, then the coefficients."""

from __future__ import annotations

import datasets
import pytest
import torch
from tiny import SUMS, TEXTS, make_tokenizer
from tiny_fused import base_expert, bert_base, experts_of

from hf_fusion import adapt_routers
from hf_fusion.training.concrete import ConcreteMerge
from hf_fusion.training.routers import _entropy_loss

ROWS = datasets.Dataset.from_dict({"text": [f"{text} {i}" for i in range(6) for text in TEXTS], "label": [0, 1] * 12})
FEW = {"steps": 12, "batch_size": 4, "learning_rate": 0.2, "loss": "entropy", "diversity": 0, "guard": False}


def concrete(**options):
    experts = experts_of(bert_base(), 2, ["no", "yes"], scale=0.5)
    for expert in experts:
        expert.processor = make_tokenizer()
    return ConcreteMerge(experts, base_expert(bert_base()).model, **options)


def tokens():
    return make_tokenizer()(list(ROWS["text"][:4]), padding=True, return_tensors="pt")


def test_at_first_it_is_task_arithmetic_and_an_expert_alone_is_whole():
    model = concrete(scaling=0.4)
    inputs, task = tokens(), model.experts[1]
    with torch.no_grad():
        got = model(**inputs, task=task).logits
        with model.using([0.4, 0.4]):
            wanted = model(**inputs, task=task).logits
        torch.testing.assert_close(got, wanted)
        for logits in model.mask_logits:
            logits.normal_()
        assert (model(**inputs, task=task).logits - wanted).abs().max() > 1e-4
        torch.testing.assert_close(model(**inputs, task=task).logits, model.dense(task)(**inputs).logits)
        with model.using([0.4, 0.4]):
            assert model(**inputs, task=task).logits.equal(wanted)
    assert all(float(mask.detach().mean()) == pytest.approx(1, abs=1e-5) for mask in model.masks())


def test_masks_are_relaxed_bernoulli_over_their_mean():
    model = concrete()
    with torch.no_grad():
        for logits in model.mask_logits:
            logits.fill_(1.2)
    torch.manual_seed(0)
    drawn = model.masks()
    torch.manual_seed(0)
    for logits, mask in zip(model.mask_logits, drawn, strict=True):
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        wanted = torch.sigmoid((logits + torch.log(uniform / (1 - uniform))) / 0.5)
        torch.testing.assert_close(mask, wanted / wanted.mean())
    kept = torch.cat([(mask > 0.5 * mask.max()).flatten() for mask in drawn]).float().mean()
    assert float(kept) == pytest.approx(torch.sigmoid(torch.tensor(1.2)).item(), abs=0.02)
    with torch.no_grad():
        medians = model.masks()  # alike everywhere
    model.learn("coefficients")
    for mask in [*medians, *model.masks()]:
        torch.testing.assert_close(mask, torch.ones_like(mask))
    with torch.no_grad():
        for logits in model.mask_logits:
            logits.fill_(-1e4)
    assert not any(mask.any() for mask in model.masks())  # nothing is kept: 0, not 0 / 0


@pytest.mark.long
def test_the_mask_learns_then_the_coefficients():
    model = concrete(granularity="layer")
    before = [logits.clone() for logits in model.mask_logits]
    facts = adapt_routers(model, dict.fromkeys(model.experts, ROWS), **FEW)
    assert any(not logits.equal(old) for logits, old in zip(model.mask_logits, before, strict=True))
    assert bool((model.coefficients == 0.3).all())
    assert sum(h.entropy for h in facts.after.values()) < sum(h.entropy for h in facts.before.values())
    again = concrete(granularity="layer")
    adapt_routers(again, dict.fromkeys(model.experts, ROWS), **FEW)
    assert all(a.equal(b) for a, b in zip(model.mask_logits, again.mask_logits, strict=True))
    learned = [logits.clone() for logits in model.mask_logits]
    model.learn("coefficients")
    then = adapt_routers(model, dict.fromkeys(model.experts, ROWS), **(FEW | {"learning_rate": 0.05}))
    assert all(logits.equal(old) for logits, old in zip(model.mask_logits, learned, strict=True))
    assert not bool((model.coefficients == 0.3).all())
    assert sum(h.entropy for h in then.after.values()) < sum(h.entropy for h in then.before.values())


def test_inner_step_precedes_the_mask_update():
    """Its gradient beside that of the two steps in plain words."""
    model, rate = concrete(inner_rate=0.7), 0.7
    batches = dict.fromkeys(model.experts, tokens())

    def loss(batches):
        return _entropy_loss(model, 0.0, batches)

    torch.manual_seed(3)
    model.objective(loss)(batches).backward()
    got = [logits.grad.clone() for logits in model.mask_logits]
    assert bool((model.coefficients == 0.3).all()) and model.coefficients.grad is None

    def plain(coefficients, masks):
        known = {**dict(model.backbone.named_parameters())}
        tensors = {}
        for number, (name, mask) in enumerate(zip(model.tensors, masks, strict=True)):
            vectors = getattr(model, f"vectors_{number}")
            tensors[name] = known[name] + mask * sum(c * v for c, v in zip(coefficients, vectors, strict=True))
        total = torch.zeros(())
        for task in model.experts:
            model(**tokens(), task=task)  # its head from now on
            p = torch.func.functional_call(model.backbone, tensors, kwargs=dict(tokens())).logits.softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        return total

    model.zero_grad()
    torch.manual_seed(3)
    masks = model.masks()
    start = torch.full((2,), 0.3, requires_grad=True)
    [slope] = torch.autograd.grad(plain(start, [mask.detach() for mask in masks]), start)
    assert slope.abs().max() > 1e-4
    plain((start - rate * slope).detach(), masks).backward()
    # biases of keys have no gradient but rounding: the scale is that of all
    room = SUMS * max(float(logits.grad.abs().max()) for logits in model.mask_logits)
    for logits, wanted in zip(model.mask_logits, got, strict=True):
        torch.testing.assert_close(wanted, logits.grad, rtol=1e-3, atol=room)
