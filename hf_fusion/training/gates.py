"""PHATGOOSE's gates: trained for one adapter alone, and the two stand-ins that need no training.

A gate is one vector per linear that an adapter updates (and per linear head that it saves). It is learned after the
adapter and apart from all others, so that anyone may publish it beside the adapter (arXiv 2402.05859).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_fusion.errors import FusionError
from hf_fusion.hub.gates import gate_sizes
from hf_fusion.hub.load import load_experts
from hf_fusion.progress import phase
from hf_fusion.training.batches import Examples, equal_lengths, read_examples, to_model
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.runs import Trained, digest, on_device, resumable, training_arguments
from hf_fusion.training.whitening import Whitening, standardised
from hf_fusion.types import Expert, Gates

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

logger = logging.getLogger(__name__)

PROBE_BATCHES = 4  # batches on which the loss is taken before and after
START_ROWS = 128  # of which the mean is taken that a whitened gate starts at
START = 2.0  # logit of a whitened gate on its own tokens at first: they meet most of the update, and it can move
RUN_FILE = "gate_training.json"  # says whose checkpoints lie in a folder

# (module, inputs, output, A of (r, d_in) or None for a saved head, B of (d_out, r) or None) -> the output instead
Update = Callable[[str, torch.Tensor, torch.Tensor, Any, Any], torch.Tensor]


def train_gates(
    expert: ExpertLike,
    dataset: Dataset,
    *,
    base: str | Path | PreTrainedModel | None = None,
    steps: int = 100,
    learning_rate: float | None = None,
    warmup: float = 0.06,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
    whitening: Whitening | None = None,
    output_dir: str | Path | None = None,
    **more: Any,
) -> Gates:
    """Trains the gates of one adapter; its weights and the base's stay as they are.

    Every adapted linear becomes ``y = Wx + σ(vᵀx)·BAx``, every saved linear head ``y = σ(vᵀx)·(Wx + b)``, with v = 0
    at first; only v is trained, on the adapter's own loss: AdamW without decay, clipped at 1, warm-up then constant
    (arXiv 2402.05859). The base runs as it does in use, without dropout. On transformers' Trainer, so
    `accelerate launch` spreads it over processes. The same seed gives the same gates.

    Args:
        expert: an adapter, as `load_experts` takes it.
        dataset: what the adapter was trained on, or like it. Columns ``prompt`` and ``target`` for language models
            (the loss is the target's), ``text`` (``text_pair``) or ``image`` with ``label`` for classifiers.
        base: the adapter's base, where it is not the one it records.
        steps: optimizer steps.
        learning_rate: after warm-up; default is 5e-3, with a whitening 1e-4.
        warmup: share of the steps in which the rate rises from 0.
        batch_size: examples a step, per process.
        max_length: the longest sequence, in tokens; long prompts lose their beginning.
        seed: of the order of the examples.
        whitening: how the base's activations lie in general (`fit_whitening`). The gates then read whitened inputs,
            ``σ(uᵀ Σ^(-1/2) (LN(x) - μ))``, and start at their mean, which sets experts of like tasks apart; the
            paper's gates read x and start at 0.
        output_dir: checkpoints (of the gates alone) are kept there, and a run that was interrupted goes on from them.
        more: of transformers' ``TrainingArguments``, such as ``bf16=True`` or ``use_cpu=True``.

    Returns:
        The gates, fp32 on the CPU, with the loss before and after in ``facts``.

    Raises:
        FusionError: for an expert that is no adapter, data it cannot learn from, or a loss that is not finite.
    """
    if learning_rate is None:
        learning_rate = 5e-3 if whitening is None else 1e-4
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup, **more}
    with training_arguments(output_dir, steps, learning_rate, batch_size, seed, **schedule) as arguments:
        loaded = _adapter_of(expert, base)
        needed = steps * arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        chosen = dataset.shuffle(seed).select(range(min(needed, len(dataset))))
        examples = read_examples(loaded, chosen, max_length)
        _check_whitening(whitening, loaded)
        checkpoint = None
        if output_dir:
            settings = {
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "max_length": max_length,
                "whitening": whitening and digest(whitening.mean),
                "seed": seed,
            }
            checkpoint = resumable(Path(output_dir), RUN_FILE, {**_run_of(loaded), **settings}, steps)
        with on_device(loaded.model, arguments.device):
            return _train(loaded, examples, arguments, checkpoint, whitening)


def average_activation(
    expert: ExpertLike,
    dataset: Dataset,
    *,
    base: str | Path | PreTrainedModel | None = None,
    examples: int = 1000,
    batch_size: int = 16,
    max_length: int = 512,
    whitening: Whitening | None = None,
) -> Gates:
    """The mean input of every adapted linear, as gates: the paper's baseline that needs data but no training.

    The adapter is on. All tokens of prompt and target count alike; there is no padding, since only examples of equal
    lengths share a batch.

    Args:
        expert: an adapter, as `load_experts` takes it.
        dataset: see `train_gates`.
        base: the adapter's base, where it is not the one it records.
        examples: the first so many are read.
        batch_size: at most so many at once.
        max_length: the longest sequence, in tokens.
        whitening: see `train_gates`; the gates are then those of linear discriminant analysis.

    Raises:
        FusionError: see `train_gates`.
    """
    loaded = _adapter_of(expert, base)
    _check_whitening(whitening, loaded)
    read = read_examples(loaded, dataset.select(range(min(examples, len(dataset)))), max_length)
    means = _mean_inputs(loaded, read, len(read.rows), batch_size, whitening)
    return Gates(means, kind="average") if whitening is None else _calibrated(means, means, whitening, "average")


@torch.no_grad()
def _mean_inputs(
    expert: Expert, read: Examples, count: int, batch_size: int, whitening: Whitening | None
) -> dict[str, torch.Tensor]:
    """Module path → mean of what its gate reads on the first rows, (d_in,), fp32 on the CPU; the adapter is on."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add_up(path: str, x: torch.Tensor, output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        tokens = (x if whitening is None else standardised(x)).reshape(-1, x.shape[-1])  # (N, d_in)
        sums[path] = sums.get(path, 0) + tokens.sum(0, dtype=torch.float64)
        counts[path] = counts.get(path, 0) + len(tokens)
        return output if a is None else output + nn.functional.linear(nn.functional.linear(x, a), b)

    with _adapted(expert, add_up), phase("Averaging inputs", min(count, len(read.rows))) as told:
        for batch in equal_lengths(read.rows, batch_size, count):
            read.loss(expert.model, to_model(read.collate(batch), expert.model))
            told.advance(len(batch))
    means = {path: (sums[path] / counts[path]).float().cpu() for path in sums}
    if whitening is None:
        return means
    return {path: whitening.factor[path] @ (mean - whitening.mean[path]) for path, mean in means.items()}


def arrow_prototypes(expert: ExpertLike, *, base: str | Path | PreTrainedModel | None = None) -> Gates:
    """The direction that every adapted linear amplifies most, as gates: Arrow's prototypes (arXiv 2405.11157).

    That is the top right-singular vector of ``ΔW = BA`` (of the weight, for a saved head), of unit length and with its
    largest entry positive; zero where ΔW is. ΔW itself is never built.

    Args:
        expert: an adapter, as `load_experts` takes it.
        base: the adapter's base, where it is not the one it records.

    Raises:
        FusionError: for an expert that is no adapter.
    """
    loaded = _adapter_of(expert, base)
    adapter = loaded.adapter
    assert adapter is not None  # _adapter_of has seen to it
    vectors = {}
    for path, size in gate_sizes(adapter, loaded.model).items():
        if path in adapter.lora:
            vector = _top_direction(*adapter.lora[path])
        else:
            weight = adapter.saved[f"{path}.weight"]
            vector = _top_direction(weight if weight.shape[1] == size else weight.T)  # GPT-2's are transposed
        vectors[path] = vector.float().cpu()
    return Gates(vectors, kind="arrow")


def _top_direction(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Top right-singular vector of ``b @ a`` or of ``a`` alone, (d_in,), in double precision."""
    basis, upper = torch.linalg.qr(a.double().T)  # (d_in, r), (r, r)
    core = upper.T if b is None else torch.linalg.qr(b.double()).R @ upper.T
    _, values, right = torch.linalg.svd(core, full_matrices=False)
    vector: torch.Tensor = basis @ right[0]
    is_nonzero: torch.Tensor = values[0] > 0
    return vector * vector[vector.abs().argmax()].sign() * is_nonzero


def _adapter_of(expert: ExpertLike, base: Any) -> Expert:
    loaded = load_experts([expert], base=base, gates=False)[0]  # broken ones must not stop those that replace them
    if loaded.adapter is None:
        raise FusionError(
            f"{loaded.name} is a full model: only LoRA adapters have gates", hint="pass an adapter's id or folder"
        )
    return loaded


@contextmanager
def gated(
    expert: Expert, device: torch.device | None = None, whitening: Whitening | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """An adapter on its base with a gate in front of every update, all zero at first; afterwards the base is as before.

    Args:
        expert: an adapter whose base is at hand.
        device: of the gates; default is the base's.
        whitening: of what the gates read; without, they read the inputs as they are.

    Yields:
        Module path → gate (d_in,), fp32, the only parameters that want a gradient.
    """
    assert expert.adapter is not None, f"{expert.name} is no adapter"
    sizes = gate_sizes(expert.adapter, expert.model)
    gates = {
        path: nn.Parameter(torch.zeros(size, device=device or expert.model.device)) for path, size in sizes.items()
    }

    white = {
        path: (whitening.factor[path].to(gate.device), whitening.mean[path].to(gate.device))
        for path, gate in gates.items()
        if whitening
    }

    def update(path: str, x: torch.Tensor, output: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        vector: torch.Tensor = gates[path]
        bias, seen = None, x
        if whitening:  # σ(uᵀ Σ^(-1/2) (LN(x) - μ)): one vector and one number take the place of the product with Σ
            factor, mean = white[path]
            with torch.autocast(vector.device.type, enabled=False):  # differences of large numbers
                vector = factor @ vector
                bias = -(vector @ mean).to(x.device, x.dtype)[None]
            seen = standardised(x)
        gate = torch.sigmoid(nn.functional.linear(seen, vector.to(x.device, x.dtype)[None], bias))  # (…, 1)
        if a is None:
            return output * gate
        return output + nn.functional.linear(nn.functional.linear(x, a) * gate, b)

    with _adapted(expert, update):
        yield gates


@contextmanager
def _adapted(expert: Expert, update: Update) -> Iterator[None]:
    """The base with an adapter on it, `update` deciding what each adapted linear gives; afterwards as before.

    The base's own modules stay in place: forward hooks do the work, and saved tensors stand in for the base's.
    """
    model, adapter = expert.model, expert.adapter
    assert adapter is not None  # _adapter_of has seen to it
    modules = dict(model.named_modules())
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    handles = []
    try:
        model.eval().requires_grad_(False)
        for name, tensor in adapter.saved.items():
            owner, _, key = name.rpartition(".")
            old = modules[owner]._parameters[key]
            replaced.append((modules[owner], key, old))
            modules[owner]._parameters[key] = nn.Parameter(_like(tensor, old), requires_grad=False)
        for path in gate_sizes(adapter, model):
            halves = adapter.lora.get(path, (None, None))
            a, b = (half if half is None else _like(half, modules[path].weight) for half in halves)
            handles.append(modules[path].register_forward_hook(partial(_hook, update, path, a, b)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, key, old in reversed(replaced):
            module._parameters[key] = old
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)


def _hook(update: Update, path: str, a: Any, b: Any, module: nn.Module, inputs: Any, output: Any) -> torch.Tensor:
    return update(path, inputs[0], output, a, b)


def _like(tensor: torch.Tensor, other: Any) -> torch.Tensor:
    """A tensor on another's device and in its dtype."""
    return tensor.detach().to(other.device, other.dtype if other.is_floating_point() else tensor.dtype)


def _train(
    expert: Expert,
    examples: Examples,
    arguments: TrainingArguments,
    checkpoint: str | None,
    whitening: Whitening | None,
) -> Gates:
    """Trains new gates on an expert whose base lies on the Trainer's device."""
    rows = examples.rows
    probe = [rows[i] for i in range(min(len(rows), PROBE_BATCHES * arguments.per_device_train_batch_size))]
    means: dict[str, torch.Tensor] = {}
    if whitening:
        means = _mean_inputs(expert, examples, START_ROWS, arguments.per_device_train_batch_size, whitening)
    with gated(expert, arguments.device, whitening) as gates:
        with torch.no_grad():
            for path, mean in means.items():  # the own tokens' mean product with the gate is START
                gates[path].copy_(START * mean / mean.square().sum().clamp(min=1e-12))
        task = Trained(gates, partial(examples.loss, expert.model))
        trainer = Trainer(model=task, args=arguments, train_dataset=rows, data_collator=examples.collate)
        set_progress(trainer, f"Training the gates of {expert.name}")
        before = _mean_loss(trainer, examples, probe)
        if not torch.isfinite(before):
            raise FusionError(
                f"the loss of {expert.name} on this data is not finite", hint="look for NaN in its inputs"
            )
        trainer.train(resume_from_checkpoint=checkpoint)
        after = _mean_loss(trainer, examples, probe)
    vectors = {path: gate.detach().float().cpu() for path, gate in gates.items()}
    if not torch.isfinite(after) or not all(vector.isfinite().all() for vector in vectors.values()):
        raise FusionError(f"the gates of {expert.name} became NaN or Inf in training", hint="lower learning_rate")
    found = Gates(vectors) if whitening is None else _calibrated(vectors, means, whitening, "trained")
    found.facts = {
        "steps": trainer.state.global_step,
        "examples": len(rows),
        "loss_before": float(before),
        "loss_after": float(after),
    }
    return found


def _check_whitening(whitening: Whitening | None, expert: Expert) -> None:
    assert expert.adapter is not None  # _adapter_of has seen to it
    if whitening is None:
        return
    for path, size in gate_sizes(expert.adapter, expert.model).items():
        if path not in whitening.mean or len(whitening.mean[path]) != size:
            raise FusionError(
                f"the whitening knows nothing of {path}, which {expert.name} adapts",
                hint="fit_whitening(base, rows, modules=…) with all modules that the adapter adapts",
            )


def _calibrated(
    vectors: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor], whitening: Whitening, kind: str
) -> Gates:
    """Gates of whitened inputs z as gates of standardised ones, their scores made comparable between experts.

    The length of a gate says how long it was trained, not how well it fits; as LN(v) does, this keeps its direction û
    alone. Along it, reference tokens have mean 0 and variance 1, the expert's own a mean of a: the score is
    ``a ûᵀz - a²/2``, the log-likelihood ratio of "one of mine" to "any" for normal distributions.

    Args:
        vectors: gates u of whitened inputs, (d_in,).
        means: mean whitened inputs of the expert's own tokens, (d_in,).
    """
    gates = Gates({}, kind)
    for path, vector in vectors.items():
        direction = nn.functional.normalize(vector.double(), dim=0)
        mean = float((direction @ means[path].double()).clamp(min=0))
        gates.vectors[path] = (mean * (whitening.factor[path].double() @ direction)).float()
        gates.offsets[path] = float(gates.vectors[path].double() @ whitening.mean[path].double()) + mean**2 / 2
    return gates


@torch.no_grad()
def _mean_loss(trainer: Trainer, examples: Examples, rows: list[Any]) -> torch.Tensor:
    """Mean loss over batches of some rows, with the gates as they are."""
    size = trainer.args.per_device_train_batch_size
    losses = []
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        for start in range(0, len(rows), size):
            batch = trainer._prepare_inputs(examples.collate(rows[start : start + size]))
            losses.append(trainer.model(**batch)["loss"].float())
    return torch.stack(losses).mean()


def _run_of(expert: Expert) -> dict[str, str]:
    """What says that a run trains this adapter's gates."""
    assert expert.adapter is not None  # _adapter_of has seen to it
    halves = {f"{path}.{side}": half for path, pair in expert.adapter.lora.items() for side, half in zip("AB", pair)}
    return {"expert": expert.name, "adapter": digest({**halves, **expert.adapter.saved})}
