"""PHATGOOSE gates of one adapter: Gaussian ones, the paper's, which are trained, and two substitutes for these.

The paper's gate is a vector per linear layer that the adapter updates (and per linear head that it saves). Gates are
made after the adapter and independently of other adapters, so that anyone can publish them beside it (arXiv
2402.05859).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_fusion.errors import FusionError
from hf_fusion.hub.gates_file import gate_sizes
from hf_fusion.hub.load import load_experts
from hf_fusion.models.points_phatgoose import before_points, gate_points
from hf_fusion.progress import phase
from hf_fusion.training.batches import Examples, equal_length_batches, read_examples, to_model
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.gaussian_gates import ROWS, fit_gaussians
from hf_fusion.training.runs import TrainedParameters, digest, find_checkpoint, on_device, training_arguments
from hf_fusion.training.whitening import Whitening, standardised
from hf_fusion.types import Expert, Gates

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

logger = logging.getLogger(__name__)

PROBE_BATCHES = 4  # batches for the loss before and after training
INIT_ROWS = 128  # rows whose mean input initialises a whitened gate
INIT_LOGIT = 2.0  # of a whitened gate on the mean token: most of the update passes, and σ is not saturated
RUN_FILE = "gate_training.json"  # identifies the run whose checkpoints a folder holds

# (path, input, output, A (r, d_in) or None for a saved head, B (d_out, r) or None) -> the new output
Update = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def train_gates(
    expert: ExpertLike,
    dataset: Dataset,
    *,
    gates: Literal["gaussian", "paper"] | None = None,
    base: str | Path | PreTrainedModel | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    warmup: float = 0.06,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
    whitening: Whitening | None = None,
    output_dir: str | Path | None = None,
    **more: Any,
) -> Gates:
    """Trains the gates of one adapter; its weights and the base's are frozen.

    Gaussian gates are one pass over at most 256 rows: mean and principal directions of what a few linears of the base
    read, see `hf_fusion.models.points_phatgoose`. One decision then serves all linears until the next, and for
    classifiers all tokens of an example.

    The paper's gates are trained (arXiv 2402.05859). Every adapted linear becomes ``y = Wx + σ(vᵀx)·BAx``, every saved
    linear head ``y = σ(vᵀx)·(Wx + b)``, with v initialised to 0. Only v is trained, on the adapter's training loss,
    with AdamW without weight decay, gradient norm clipped to 1, warm-up and then a constant rate, and without dropout.
    Runs on transformers' Trainer, so `accelerate launch` distributes it. The same seed gives the same gates.

    Args:
        expert: an adapter, as `load_experts` takes it.
        dataset: the adapter's training data, or similar data. Columns ``prompt`` and ``target`` for language models
            (the loss is on the target), ``text`` (``text_pair``) or ``image`` with ``label`` for classifiers.
        gates: "gaussian", or "paper". By default Gaussian, but the paper's if `whitening` is given or the base has no
            inputs for Gaussian ones (encoder-decoders, models of several towers, bases without attention, or an adapted
            linear before the first block). Experts are
            fused only if their gates are of one kind. Gaussian gates have no use for `steps`, `learning_rate`,
            `warmup`, `output_dir` and `more`.
        base: the adapter's base, if not the one that it records.
        steps: optimizer steps; default 100.
        learning_rate: after warm-up; default 5e-3, with `whitening` 1e-4.
        warmup: share of the steps in which the rate rises from 0.
        batch_size: examples per step and process.
        max_length: longest sequence, in tokens; long prompts are truncated on the left.
        seed: for the choice and order of the examples.
        whitening: mean and covariance of the base's activations on reference rows (`fit_whitening`). The gates then
            read whitened inputs, ``σ(uᵀ Σ^(-1/2) (LN(x) - μ))``, and are initialised to the mean whitened input,
            which separates experts of similar tasks better; the paper's gates read x and are initialised to 0.
        output_dir: folder for checkpoints (of the gates alone); an interrupted run resumes from them.
        more: passed to transformers' ``TrainingArguments``, such as ``bf16=True`` or ``use_cpu=True``.

    Returns:
        The gates, fp32 on the CPU, with the loss before and after training in ``facts`` if they were trained.

    Raises:
        FusionError: the expert is not an adapter, the data does not fit it, the loss is not finite, or the base has no
            inputs for Gaussian gates.
    """
    if gates not in (None, "gaussian", "paper"):
        raise FusionError(f"gates={gates!r}", hint="gates='gaussian' or 'paper'")
    if gates == "gaussian" and whitening is not None:
        raise FusionError("Gaussian gates are not whitened", hint="omit whitening, or gates='paper'")
    if gates != "paper" and whitening is None:
        loaded = _load_adapter(expert, base)
        assert loaded.adapter is not None  # checked by _load_adapter
        if gate_points(loaded.model) and not before_points(loaded.model, loaded.adapter.lora):
            for name, value in {"steps": steps, "learning_rate": learning_rate}.items():
                if value is not None:
                    logger.warning("%s=%s is ignored: Gaussian gates take one pass (gates='paper')", name, value)
            return _fit_gaussians(loaded, dataset, batch_size, max_length, seed, bool(more.get("use_cpu")))
        if gates == "gaussian":
            raise FusionError(
                f"Gaussian gates cannot route adapters of {type(loaded.model).__name__}", hint="gates='paper'"
            )
    steps = 100 if steps is None else steps
    if learning_rate is None:
        learning_rate = 5e-3 if whitening is None else 1e-4
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup, **more}
    with training_arguments(output_dir, steps, learning_rate, batch_size, seed, **schedule) as arguments:
        loaded = _load_adapter(expert, base)
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
            checkpoint = find_checkpoint(Path(output_dir), RUN_FILE, {**_identify_run(loaded), **settings}, steps)
        with on_device(loaded.model, arguments.device):
            return _train(loaded, examples, arguments, checkpoint, whitening)


def _fit_gaussians(
    expert: Expert, dataset: Dataset, batch_size: int, max_length: int, seed: int, use_cpu: bool
) -> Gates:
    """Gaussian gates, on the device that a Trainer would take."""
    if batch_size < 1:
        raise FusionError(f"batch_size={batch_size}: it must be greater than 0", hint="a positive batch_size")
    chosen = dataset.shuffle(seed).select(range(min(ROWS, len(dataset))))
    examples = read_examples(expert, chosen, max_length)

    def apply(
        path: str, x: torch.Tensor, output: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None
    ) -> torch.Tensor:
        return output if a is None or b is None else output + nn.functional.linear(nn.functional.linear(x, a), b)

    with training_arguments(None, 1, 1.0, batch_size, seed, use_cpu=use_cpu) as arguments:
        device = arguments.device
    with on_device(expert.model, device), _adapter_applied(expert, apply):
        return fit_gaussians(expert, examples, batch_size)


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
    """Gates without training: the mean input of every adapted linear layer, the paper's "Average Activation" baseline.

    The adapter is active. All tokens of prompt and target have equal weight; only examples of equal length share a
    batch, so that there is no padding.

    Args:
        expert: an adapter, as `load_experts` takes it.
        dataset: see `train_gates`.
        base: the adapter's base, if not the one that it records.
        examples: how many rows to read, from the first.
        batch_size: maximum examples per batch.
        max_length: longest sequence, in tokens.
        whitening: see `train_gates`; the gates are then those of linear discriminant analysis.

    Raises:
        FusionError: see `train_gates`.
    """
    loaded = _load_adapter(expert, base)
    _check_whitening(whitening, loaded)
    read = read_examples(loaded, dataset.select(range(min(examples, len(dataset)))), max_length)
    means = _mean_inputs(loaded, read, len(read.rows), batch_size, whitening)
    return Gates(means, kind="average") if whitening is None else _calibrated(means, means, whitening, "average")


@torch.no_grad()
def _mean_inputs(
    expert: Expert, read: Examples, count: int, batch_size: int, whitening: Whitening | None
) -> dict[str, torch.Tensor]:
    """Module path → mean gate input on the first `count` rows, (d_in,), fp32 on the CPU; the adapter is active."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add_up(
        path: str, x: torch.Tensor, output: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None
    ) -> torch.Tensor:
        tokens = (x if whitening is None else standardised(x)).reshape(-1, x.shape[-1])  # (N, d_in)
        sums[path] = sums.get(path, 0) + tokens.sum(0, dtype=torch.float64)
        counts[path] = counts.get(path, 0) + len(tokens)
        return output if a is None or b is None else output + nn.functional.linear(nn.functional.linear(x, a), b)

    with _adapter_applied(expert, add_up), phase("Averaging inputs", min(count, len(read.rows))) as progress:
        for batch in equal_length_batches(read.rows, batch_size, count):
            read.loss(expert.model, to_model(read.collate(batch), expert.model))
            progress.advance(len(batch))
    means = {path: (sums[path] / counts[path]).float().cpu() for path in sums}
    if whitening is None:
        return means
    return {path: whitening.factor[path] @ (mean - whitening.mean[path]) for path, mean in means.items()}


def arrow_prototypes(expert: ExpertLike, *, base: str | Path | PreTrainedModel | None = None) -> Gates:
    """Gates without data: Arrow's prototypes (arXiv 2405.11157), the input directions that the updates amplify most.

    The prototype is the top right-singular vector of ``ΔW = BA`` (of the weight, for a saved head), with unit norm and
    its largest entry positive; zero if ΔW is zero. ΔW is never materialised.

    Args:
        expert: an adapter, as `load_experts` takes it.
        base: the adapter's base, if not the one that it records.

    Raises:
        FusionError: the expert is not an adapter.
    """
    loaded = _load_adapter(expert, base)
    adapter = loaded.adapter
    assert adapter is not None  # checked by _load_adapter
    vectors = {}
    for path, size in gate_sizes(adapter, loaded.model).items():
        if path in adapter.lora:
            vector = _top_direction(*adapter.lora[path])
        else:
            weight = adapter.saved[f"{path}.weight"]
            vector = _top_direction(weight if weight.shape[1] == size else weight.T)  # transposed in GPT-2's Conv1D
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


def _load_adapter(expert: ExpertLike, base: ExpertLike | None) -> Expert:
    loaded = load_experts([expert], base=base, gates=False)[0]  # broken gates must not prevent their replacement
    if loaded.adapter is None:
        raise FusionError(
            f"{loaded.name} is a full model: only LoRA adapters have gates", hint="pass an adapter's id or folder"
        )
    return loaded


@contextmanager
def gated(
    expert: Expert, device: torch.device | None = None, whitening: Whitening | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """Applies an adapter to its base with a gate on every update, initialised to 0; restores the base afterwards.

    Args:
        expert: an adapter with its base.
        device: of the gates; default: the base's.
        whitening: of the gates' inputs; default: the gates read the layers' inputs.

    Yields:
        Module path → gate (d_in,), fp32; the only parameters that require gradients.
    """
    assert expert.adapter is not None, f"{expert.name} is not an adapter"
    sizes = gate_sizes(expert.adapter, expert.model)
    gates = {
        path: nn.Parameter(torch.zeros(size, device=device or expert.model.device)) for path, size in sizes.items()
    }

    white = {
        path: (whitening.factor[path].to(gate.device), whitening.mean[path].to(gate.device))
        for path, gate in gates.items()
        if whitening
    }

    def update(
        path: str, x: torch.Tensor, output: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None
    ) -> torch.Tensor:
        vector: torch.Tensor = gates[path]
        bias, gate_input = None, x
        if whitening:  # σ(uᵀ Σ^(-1/2) (LN(x) - μ)) as one vector and one bias, instead of a product with Σ per token
            factor, mean = white[path]
            with torch.autocast(vector.device.type, enabled=False):  # cancellation: needs full precision
                vector = factor @ vector
                bias = -(vector @ mean).to(x.device, x.dtype)[None]
            gate_input = standardised(x)
        gate = torch.sigmoid(nn.functional.linear(gate_input, vector.to(x.device, x.dtype)[None], bias))  # (…, 1)
        if a is None or b is None:
            return output * gate
        return output + nn.functional.linear(nn.functional.linear(x, a) * gate, b)

    with _adapter_applied(expert, update):
        yield gates


@contextmanager
def _adapter_applied(expert: Expert, update: Update) -> Iterator[None]:
    """Within this context `update` computes the output of each adapted linear layer; restores the base afterwards.

    The base's modules stay in place: forward hooks apply the updates, and saved tensors replace the base's.
    """
    model, adapter = expert.model, expert.adapter
    assert adapter is not None  # checked by _load_adapter
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


def _hook(
    update: Update,
    path: str,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    return update(path, inputs[0], output, a, b)


def _like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor on another's device and in its floating-point dtype."""
    return tensor.detach().to(other.device, other.dtype if other.is_floating_point() else tensor.dtype)


def _train(
    expert: Expert,
    examples: Examples,
    arguments: TrainingArguments,
    checkpoint: str | None,
    whitening: Whitening | None,
) -> Gates:
    """Trains gates for an expert whose base is on the Trainer's device."""
    rows = examples.rows
    probe = [rows[i] for i in range(min(len(rows), PROBE_BATCHES * arguments.per_device_train_batch_size))]
    means: dict[str, torch.Tensor] = {}
    if whitening:
        means = _mean_inputs(expert, examples, INIT_ROWS, arguments.per_device_train_batch_size, whitening)
    with gated(expert, arguments.device, whitening) as gates:
        with torch.no_grad():
            for path, mean in means.items():  # the mean logit on the adapter's tokens is INIT_LOGIT
                gates[path].copy_(INIT_LOGIT * mean / mean.square().sum().clamp(min=1e-12))
        task = TrainedParameters(gates, partial(examples.loss, expert.model))
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
    assert expert.adapter is not None  # checked by _load_adapter
    if whitening is None:
        return
    for path, size in gate_sizes(expert.adapter, expert.model).items():
        if path not in whitening.mean or len(whitening.mean[path]) != size:
            raise FusionError(
                f"the whitening does not cover {path}, which {expert.name} adapts",
                hint="fit_whitening(base, rows, modules=…) with all modules that the adapter adapts",
            )


def _calibrated(
    vectors: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor], whitening: Whitening, kind: str
) -> Gates:
    """Converts gates of whitened inputs z to gates of standardised inputs, with scores comparable between experts.

    The norm of a gate reflects the length of its training, not its fit; as LN(v) does, this keeps only its direction
    û. Along û, reference tokens have mean 0 and variance 1, and the expert's tokens have mean a: the score is
    ``a ûᵀz - a²/2``, the log-likelihood ratio of "the expert's token" to "any token" for normal distributions.

    Args:
        vectors: gates u of whitened inputs, (d_in,).
        means: mean whitened input on the expert's data, (d_in,).
        whitening: of the inputs.
        kind: of the gates returned.
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
    """Mean loss over batches of some rows, with the current gates."""
    size = trainer.args.per_device_train_batch_size
    losses = []
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        for start in range(0, len(rows), size):
            batch = trainer._prepare_inputs(examples.collate(rows[start : start + size]))
            losses.append(trainer.model(**batch)["loss"].float())
    return torch.stack(losses).mean()


def _identify_run(expert: Expert) -> dict[str, str]:
    """The settings by which a run that trains this adapter's gates is recognised."""
    assert expert.adapter is not None  # checked by _load_adapter
    halves = {f"{path}.{side}": half for path, pair in expert.adapter.lora.items() for side, half in zip("AB", pair)}
    return {"expert": expert.name, "adapter": digest({**halves, **expert.adapter.saved})}
