"""WEMoE with bf16, gradient checkpointing, Trainer, torch.compile, device_map, copies and traces."""

from __future__ import annotations

import copy
import inspect
from collections import Counter

import pytest
import torch
from datasets import Dataset
from models.test_wemoe import close, first, fused, plain
from models.test_wemoe_experts import different_labels
from tiny import SUMS
from tiny_fused import IDS, MASK, TEXT, base_expert
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hf_fusion import WEMoEModel
from hf_fusion.models import linears_wemoe

STORAGES = {"exact": {}, "bfloat16": {}, "sparse": {}, "low-rank": {"rank": 5}, "low-rank-bfloat16": {"rank": 5}}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bfloat16_follows_float32(kind, storage, tmp_path):
    model, _, _, _, inputs = fused(kind, task_vectors=storage, **STORAGES[storage])
    model.save_pretrained(tmp_path)
    half = WEMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16) if kind == "bert" else copy.deepcopy(model)
    half = half.bfloat16()
    real = MASK.bool() if kind == "llama" else slice(None)
    with torch.no_grad():
        want, got = (first(m(**inputs)) for m in (model, half))
    assert got.dtype is torch.bfloat16
    assert close(got.float()[real], want[real]) < 0.05
    first(half(**inputs)).float().sum().backward()
    gradients = [p.grad for p in half.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("storage", STORAGES)
def test_autocast_follows_float32(storage):
    model, _, _, _, inputs = fused("bert", task_vectors=storage, **STORAGES[storage])
    want = model(**inputs).logits.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            assert close(model(**inputs).logits.float(), want) < 0.05
        loss = model(**inputs).logits.float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(kind):
    model, _, _, _, inputs = fused(kind)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
                    module.dropout = 0.0
        first(model(**inputs, **({} if kind == "bert" else {"use_cache": False}))).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for one, two in zip(*gradients):
        assert close(two, one) <= 1e-5


def test_blocks_of_any_size_give_the_same(monkeypatch):
    """Rows that do not divide, and more samples than are merged at a time."""
    model, base, experts, units, _ = fused("bert")
    ids = torch.randint(1, 300, (11, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    results = []
    for block, samples in ((32 * 24, 4), (10**6, 64)):
        monkeypatch.setattr(linears_wemoe, "BLOCK", block)
        monkeypatch.setattr(linears_wemoe, "SAMPLES", samples)
        assert model.units[0].linears[0].steps(11, "cpu") == ((16, 4) if samples == 4 else (64, 11))
        logits = model(**inputs).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    loop = plain(model, base, experts, units, inputs)
    loop.batch = 11
    assert close(results[0][0], loop.model(**inputs).logits.detach()) <= 1e-5
    for one, two in zip(*results):
        assert close(one, two) <= 1e-4


@pytest.mark.parametrize("storage", ["exact", "sparse"])
def test_equal_coefficients_are_merged_once(storage, monkeypatch):
    model, base, _, _, _ = fused("bert", task_vectors=storage)
    embed = base.get_input_embeddings()(torch.randint(1, 300, (11, 6), generator=torch.Generator().manual_seed(0)))
    given = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))[[0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 2]]
    merged = []
    product = linears_wemoe.UpscaledLinear._product
    monkeypatch.setattr(
        linears_wemoe.UpscaledLinear, "_product", lambda self, x, w: merged.append(len(w)) or product(self, x, w)
    )
    results = []
    for rows in (slice(None), *(slice(row, row + 1) for row in range(11))):
        x = embed[rows].detach().requires_grad_()
        with model.using(given[rows]):
            logits = model(inputs_embeds=x).logits
        results.append((logits, torch.autograd.grad(logits.square().sum(), x)[0]))
        if rows == slice(None):
            assert merged == [2, 1] * 4  # two groups of 3 samples, one of 5, in 4 linears
    for together, alone in zip(results[0], zip(*results[1:], strict=True), strict=True):
        assert close(together, torch.cat(alone)) <= SUMS
    merged.clear()
    model(inputs_embeds=embed[[0] * 11])  # the routers want each sample's own gradient
    assert merged == [11] * 4


def test_trainer_moves_routers_alone(tmp_path):
    base, experts = different_labels()
    model = WEMoEModel.from_experts(experts, base_expert(base))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = {"text": ["a", "b", "c"], "input_ids": IDS.tolist(), "attention_mask": MASK.tolist(), "labels": [0, 1, 1]}
    arguments = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict(rows))  # it drops "text" alone
    result = trainer.train()
    assert result.training_loss > 0
    with torch.no_grad():
        want = model.eval()(**TEXT, labels=torch.tensor(rows["labels"])).loss
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(float(want), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    trainer.save_model(str(tmp_path / "saved"))
    again = WEMoEModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**TEXT).logits, model.eval()(**TEXT).logits)


@pytest.mark.parametrize("kind", ["vit", "t5", "llama"])
def test_forward_shows_the_dense_models_arguments(kind):
    model, base, _, _, inputs = fused(kind)
    dense = inspect.signature(base.forward).parameters
    shown = inspect.signature(copy.deepcopy(model).forward).parameters
    assert set(inputs) <= dense.keys() < shown.keys()
    assert shown.keys() - dense.keys() == {"task", "prompt_mask"}
    assert [shown[name].default for name in dense] == [parameter.default for parameter in dense.values()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "storage"),
    [
        ("vit", "exact"),
        pytest.param("llama", "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama", "exact", marks=pytest.mark.slow),
        pytest.param("vit", "sparse", marks=pytest.mark.slow),
        pytest.param("vit", "low-rank", marks=pytest.mark.slow),
        pytest.param("vit", "low-rank-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_graph_break(kind, storage):
    model, _, _, _, inputs = fused(kind, task_vectors=storage, **STORAGES[storage])
    extra = {"use_cache": False} if kind == "llama" else {}
    with torch.no_grad():
        want = first(model(**inputs, **extra))
        compiled = torch.compile(model.backbone, backend="eager", fullgraph=True)  # a break would raise
        got = first(compiled(**inputs, **extra))
    torch._dynamo.reset()
    # of a change that is less than half of the weights here, any last bit of bfloat16 may fall otherwise
    assert close(got, want) <= (2**-8 / 2 if storage == "low-rank-bfloat16" else SUMS)


class Count(TorchDispatchMode):
    """Counts calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "storage"),
    [
        ("llama", "sparse"),
        pytest.param("llama", "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama", "low-rank", marks=pytest.mark.slow),
        pytest.param("llama", "low-rank-bfloat16", marks=pytest.mark.slow),
        pytest.param("llama", "smile", marks=pytest.mark.slow),
        pytest.param("t5", "exact", marks=pytest.mark.slow),
    ],
)
def test_few_accelerator_calls_without_synchronisation(kind, storage):
    """A device without values stands in for one: what would wait for a value of it raises."""
    how = {"task_vectors": "low-rank", "energy": 0.6, "routing": "smile"} if storage == "smile" else {}
    model, base, _, units, inputs = fused(kind, **(how or {"task_vectors": storage, **STORAGES[storage]}))
    for dense in (model.backbone, base):
        dense.set_attn_implementation("eager")
    if kind == "t5":  # dense encoders look at a mask's values themselves
        inputs = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    model, base, calls = model.to("meta"), base.to("meta"), {}
    for rows in (3, 30):
        given = {
            name: tensor.repeat(rows // 3, *[1] * (tensor.dim() - 1)).to("meta") for name, tensor in inputs.items()
        }
        with torch.no_grad(), Count() as calls[rows]:
            output = first(model(**given))
        with torch.no_grad(), Count() as calls["base"]:
            assert first(base(**given)).shape == output.shape
    assert calls[3].calls == calls[30].calls  # nothing is called for each sample
    assert calls[3].calls.total() - calls["base"].calls.total() <= 30 * sum(map(len, units.values()))
    output = first(model(**given))
    if storage != "smile":
        torch.autograd.grad(output.sum(), [p for p in model.parameters() if p.requires_grad])


def test_blocks_of_rows_are_concatenated(monkeypatch):
    monkeypatch.setattr(linears_wemoe, "BLOCK", 16 * 32)
    linear = fused("bert", task_vectors="sparse")[0].units[0].linears[0]
    assert (linear.step, linear.rows, linear.experts) == (16, 64, 3)
    apart = [linear.block(start, start + 16, [], torch.float32) for start in range(0, 64, 16)]
    assert torch.equal(linear.block(0, 64, [], torch.float32), torch.cat(apart, 1))
    assert torch.equal(linear.block(16, 64, [], torch.float32), torch.cat(apart[1:], 1))
    assert all(block.any() for block in apart)


@pytest.mark.parametrize("samples", [1, 3])
def test_bfloat16_rounds_the_change_of_a_single_sample(samples, monkeypatch):
    """One sample's change is rounded to bfloat16, several samples' are not; blocks need not be those of the store."""
    monkeypatch.setattr(linears_wemoe, "BLOCK", 16 * 32)
    linear = fused("bert", task_vectors="bfloat16")[0].units[0].linears[0]
    assert (linear.step, linear.rows, linear.columns) == (32, 64, 32)
    vectors = linear.block(0, 64, [], torch.float64)
    assert vectors.any()
    for start, stop in ((0, 16), (16, 48), (48, 64)):
        place = slice(start * 32, stop * 32)
        assert torch.equal(linear.block(start, stop, [], torch.float64), vectors[:, place])
    w = torch.rand(samples, 3, generator=torch.Generator().manual_seed(0))
    want = w.double() @ vectors
    got = linear.merge(w).flatten(1).double() - linear.base.flatten().double()
    assert close(got, want) <= (2**-8 if samples == 1 else 4 * torch.finfo(torch.float32).eps)
    assert (close(got, want) > 1e-4) == (samples == 1)
    x = torch.randn(samples, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        product = linear._product(x, w)
    weights = (linear.base.double().flatten() + got).view(samples, 64, 32)
    want = x.double() @ weights.transpose(1, 2) + linear._bias(w)[:, None].double()
    assert close(product.double(), want) <= 32 * torch.finfo(torch.float32).eps  # sums of 32 products


def test_routers_are_rounded_with_the_task_vectors(monkeypatch):
    monkeypatch.setattr(linears_wemoe, "CPU_HAS_BFLOAT16", True)
    coefficients = {}
    for storage in ("exact", "bfloat16"):
        model, _, _, _, inputs = fused("vit", task_vectors=storage)
        model.record_routing = True
        with torch.no_grad():
            model(**inputs)
        coefficients[storage] = model.routing_trace().coefficients()[:, 0]  # of the first unit, which read the same
    # two layers, of whose inputs and weights each is rounded by half of a last bit
    assert 0 < close(coefficients["bfloat16"], coefficients["exact"]) <= 2 * 2 * 2**-9


def test_device_map_and_copies(tmp_path):
    model, _, _, _, inputs = fused("llama", task_vectors="bfloat16")
    model.save_pretrained(tmp_path)
    placed = type(model).from_pretrained(tmp_path, device_map="cpu")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**inputs).logits
        assert torch.equal(placed(**inputs).logits, want)
        assert torch.equal(copied(**inputs).logits, want)
        for unit in copied.units:
            unit.routers[0].layers[1].bias.add_(1)
        assert not torch.allclose(copied(**inputs).logits, want)
        assert torch.equal(model(**inputs).logits, want)


def test_a_trace_holds_coefficients_by_layer_and_sample():
    model, _, _, units, inputs = fused("llama")
    with torch.no_grad():
        plain_logits = model(**inputs).logits
        with pytest.raises(ValueError, match="record_routing"):
            model.routing_trace()
        model.record_routing = True
        assert torch.equal(model(**inputs).logits, plain_logits)
    trace = model.routing_trace()
    assert trace.layers == list(units)
    assert trace.experts == model.experts
    assert trace.coefficients().shape == (3, 2, 3)
    assert torch.equal(trace.coefficients()[:, 1], trace.coefficients("model.layers.1"))
    model.generate(**inputs, num_beams=2, max_new_tokens=3, do_sample=False)
    assert close(model.routing_trace().coefficients(), trace.coefficients()) <= 1e-5  # a row a prompt, not a beam
    assert set(model.routing_trace().to_dict()) == {"experts", "layers"}


def test_summary_counts():
    model, base, _, units, _ = fused("llama")
    summary = model.summary()
    linears = [path for paths in units.values() for path in paths]
    size = sum(base.get_submodule(path).weight.numel() for path in linears)
    assert summary["upscaled_linears"] == len(linears)
    assert summary["upscaled_parameters"] == size
    assert summary["stored_bytes"] == 4 * 4 * size  # θ0 and three task vectors
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["trainable"] == 2 * (32 * 32 + 32 + 3 * 32 + 3)
    half = fused("llama", task_vectors="bfloat16")[0].summary()
    assert half["stored_bytes"] == (4 + 3 * 2) * size
    low = [fused("llama", task_vectors=kind, rank=5)[0].summary() for kind in ("low-rank", "low-rank-bfloat16")]
    assert low[0]["stored_bytes"] - 4 * size == 2 * (low[1]["stored_bytes"] - 4 * size)
    sparse = fused("llama", task_vectors="sparse")[0].summary()
    assert sparse["stored_bytes"] < 0.5 * summary["stored_bytes"]
