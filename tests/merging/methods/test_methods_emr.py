"""EMR against a float64 reference over whole models; invariants of model recombination."""

from __future__ import annotations

import pytest
import torch
from in_memory import adversarial, merged, product
from on_disk import model, recipe_of
from safetensors.torch import load_file

from hf_fusion.merging.engine.tensors import MemoryReader, Tensors, WholeModel, merge_tensors
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods.emr import emr

CASES = adversarial(3)


def reference(model, rescale):
    """Algorithm 1 of the paper: (τ, masks, λ) of a model's [(base, experts)]."""
    taus, masks, own, kept = [], [], torch.zeros(3).double(), torch.zeros(3).double()
    for base, experts in model:
        deltas = torch.stack([e.double() - base.double() for e in experts])
        sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0).double()
        agree = deltas * sign > 0
        tau = sign * (deltas.abs() * agree).amax(0)
        size = tau.numel() if rescale == "tensors" else 1
        own += deltas.abs().reshape(3, -1).sum(1) / size
        kept += (tau.abs() * agree).reshape(3, -1).sum(1) / size
        taus.append(tau)
        masks.append(agree)
    return taus, masks, torch.where(kept > 0, own / kept, 1.0)


@pytest.mark.parametrize(("case", "expert"), product(CASES, [0, 1, 3]))
def test_emr(case, expert):
    base, experts = CASES[case]
    [tau], [masks], factors = reference([CASES[case]], "elements")
    wanted = base.double() + (tau * masks[expert - 1] * factors[expert - 1] if expert else tau)
    got = merged("emr", base, experts, expert=expert).double()
    deltas = torch.stack([e.double() - base.double() for e in experts])
    # where a sum is 0 but for rounding, either sign is right
    sure = (deltas.sum(0).abs() > 1e-6 * deltas.abs().sum(0)) | (deltas.sum(0) == 0)
    size = max(float(x.double().abs().max()) for x in (wanted, base, *experts))
    torch.testing.assert_close(torch.where(sure, got, wanted), wanted, rtol=0, atol=3e-6 * size)
    assert sure.double().mean() > 0.99 or case == "opposite deltas"


@pytest.mark.parametrize("rescale", ["elements", "tensors"])
@torch.inference_mode()
def test_emr_rescales_over_the_whole_model(rescale):
    cases = [CASES["random"], CASES["vector"], CASES["chunks"]]
    parts = []
    model = WholeModel(lambda: parts)
    parts += [
        Tensors(str(i), MemoryReader(b), list(map(MemoryReader, e)), model=model) for i, (b, e) in enumerate(cases)
    ]
    taus, masks, factors = reference(cases, rescale)
    other = reference(cases, "elements" if rescale == "tensors" else "tensors")[2]
    assert (factors / other - 1).abs().max() > 1e-3
    for tensors, (base, _), tau, mask in zip(parts, cases, taus, masks, strict=True):
        flat = torch.cat([v.clone() for _, v in merge_tensors(tensors, emr(tensors, expert=2, rescale=rescale))])
        wanted = base.double() + tau * mask[1] * factors[1]
        torch.testing.assert_close(flat.view(base.shape).double(), wanted, rtol=0, atol=1e-5)


def test_emr_of_files(tmp_path):
    folders = [model(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two", "three"))]
    base, *experts = (load_file(folder / "model.safetensors") for folder in folders)
    taus, masks, factors = reference([(base[name], [e[name] for e in experts]) for name in base], "elements")
    merge(recipe_of(folders, "emr", expert=3), tmp_path / "out", threads=2)
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, tau, mask in zip(base, taus, masks, strict=True):
        wanted = base[name].double() + tau * mask[2] * factors[2]
        torch.testing.assert_close(got[name].double(), wanted, rtol=0, atol=1e-5)


def test_emr_of_one_expert_is_the_expert():
    base, [expert, *_] = CASES["random"]
    torch.testing.assert_close(merged("emr", base, [expert], expert=1), expert)
    torch.testing.assert_close(merged("emr", base, [expert], expert=0), expert)


@torch.inference_mode()
def test_emr_refuses_experts_that_are_not_there():
    base, experts = CASES["random"]
    with pytest.raises(ValueError, match="has 3 experts, but expert is 4"):
        merged("emr", base, experts, expert=4)
    parts = []
    model = WholeModel(lambda: parts)
    parts += [
        Tensors(name, MemoryReader(base), list(map(MemoryReader, e)), model=model)
        for name, e in (("whole", experts), ("lacking", experts[:2]))
    ]
    with pytest.raises(ValueError, match="lacking has 2 of 3 experts"):
        emr(parts[0], expert=1)


def chosen(names, count=4, **parameters):
    """Which expert each tensor is."""
    experts = [torch.full((3,), float(i)) for i in range(count)]
    return [int(merged("recombination", None, experts, name=name, **parameters)[0]) for name in names]


LAYERS = [f"model.layers.{i}.{name}" for i in range(30) for name in ("attn.q.weight", "attn.q.bias", "mlp.up.weight")]


def test_recombination_keeps_layers_together():
    by_layer = [set(chosen(LAYERS[i : i + 3], seed=5)) for i in range(0, 90, 3)]
    assert all(len(found) == 1 for found in by_layer)
    assert set.union(*by_layer) == {0, 1, 2, 3}
    assert chosen(LAYERS, seed=5) != chosen(LAYERS, seed=6)


def test_recombination_by_smaller_units():
    modules = chosen(LAYERS, unit="module")
    assert modules[0::3] == modules[1::3] and modules[0::3] != modules[2::3]
    tensors = chosen(LAYERS, unit="tensor")
    assert tensors[0::3] != tensors[1::3]
    assert len(set(chosen(["norm.weight", "norm.bias"]))) == 1


def test_recombined_models_share_the_experts_out():
    models = [chosen(LAYERS, number=number) for number in (1, 2, 3, 4)]
    assert all(sorted(experts) == [0, 1, 2, 3] for experts in zip(*models, strict=True))
    with pytest.raises(ValueError, match="number is 5"):
        chosen(LAYERS[:1], number=5)
