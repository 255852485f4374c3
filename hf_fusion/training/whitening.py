"""Whitening of a base's activations by their mean and covariance on reference rows, for PHATGOOSE gates.

The activations of a language model have a large common mean and a few directions of high variance, for any input.
Standardisation (LayerNorm) keeps both, so they dominate a gate's score, and independently trained gates rank experts
by noise in what all inputs share. After whitening, reference rows have mean 0 and unit covariance, and the score
depends on what distinguishes an input (the metric of linear discriminant analysis).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fusion.errors import FusionError
from hf_fusion.hub.gates_file import gate_sizes
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.progress import phase
from hf_fusion.training.batches import equal_length_batches, read_examples, to_model, unlabelled
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

SHRINKAGE = 0.01  # share of the mean variance that is added to every direction: few rows leave a singular covariance


@dataclass(frozen=True)
class Whitening:
    """Mean and covariance of standardised inputs by module path; layers that read the same input share tensors.

    Attributes:
        mean: (d_in,), fp32.
        factor: Σ^(-1/2), (d_in, d_in), fp32: ``factor @ (LN(x) - mean)`` has mean 0 and unit covariance. It is the
            identity for inputs that were the same in all rows, whose covariance is unknown.
    """

    mean: dict[str, torch.Tensor]
    factor: dict[str, torch.Tensor]


@torch.no_grad()
def fit_whitening(
    expert: ExpertLike,
    rows: Dataset,
    *,
    base: str | Path | PreTrainedModel | None = None,
    modules: Collection[str] | None = None,
    batch_size: int = 16,
    max_length: int = 512,
) -> Whitening:
    """Computes the whitening of a base on reference rows; an adapter is not applied.

    Args:
        expert: an adapter, or its base, as `load_experts` takes it.
        rows: a broad sample of inputs: column ``prompt``, ``text`` (and ``text_pair``) or ``image``; labels are
            ignored. `base_samples` generates rows if there are none. A few thousand tokens per thousand features are
            enough.
        base: the adapter's base, if not the one that it records.
        modules: paths of the linear layers; default: those that the adapter adapts.
        batch_size: maximum rows per batch; only rows of equal length share a batch, so that nothing is padded.
        max_length: longest sequence, in tokens.

    Raises:
        FusionError: a module is not a linear layer, or the base cannot read the rows.
    """
    (loaded,) = load_experts([expert], base=base, gates=False)
    if modules is None:
        if loaded.adapter is None:
            raise FusionError(f"{loaded.name} is a full model", hint="name the linear layers: modules=…")
        modules = gate_sizes(loaded.adapter, loaded.model)
    model = loaded.model
    found = dict(model.named_modules())
    if unknown := sorted(path for path in modules if linear_sizes(found.get(path)) is None):
        raise FusionError(f"{loaded.name} has no linear layer {unknown[0]}")
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    same: dict[str, str] = {}  # path -> the first path that read the same input
    previous: list[Any] = [None, ""]

    def read(path: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0] is previous[0]:
            same[path] = previous[1]
            return
        previous[:] = inputs[0], path
        same[path] = path
        x = standardised(inputs[0].reshape(-1, inputs[0].shape[-1]).float())  # (N, d_in)
        x = x.double()  # avoids cancellation for a small variance about a large mean
        sums[path] = sums.get(path, 0) + x.sum(0)
        squares[path] = squares.get(path, 0) + x.t() @ x
        counts[path] = counts.get(path, 0) + len(x)

    examples = read_examples(loaded, unlabelled(rows), max_length)
    handles = [found[path].register_forward_pre_hook(partial(read, path)) for path in modules]
    try:
        with phase("Reading reference rows", len(examples.rows)) as progress:
            for batch in equal_length_batches(examples.rows, batch_size):
                examples.loss(model, to_model(examples.collate(batch), model))
                previous[:] = None, ""
                progress.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    mean = {path: (total / counts[path]).cpu() for path, total in sums.items()}
    factor = {path: inverse_root(squares[path].cpu() / counts[path], mean[path]).float() for path in mean}
    return Whitening(
        {path: mean[same[path]].float() for path in modules}, {path: factor[same[path]] for path in modules}
    )


def standardised(x: torch.Tensor) -> torch.Tensor:
    """LN(x) without affine parameters: the input of the router's scores."""
    return nn.functional.layer_norm(x, x.shape[-1:])


def inverse_root(second_moment: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Σ^(-1/2), symmetric, of the covariance plus `SHRINKAGE` times its mean variance on the diagonal.

    The identity, if the mean variance is within the float64 rounding error of the second moment.

    Args:
        second_moment: E[x xᵀ], (d, d) float64.
        mean: E[x], (d,) float64.
    """
    covariance = second_moment - torch.outer(mean, mean)
    variance = covariance.diagonal().mean()
    if not variance > len(mean) * torch.finfo(mean.dtype).eps * second_moment.diagonal().mean():
        return torch.eye(len(mean), dtype=mean.dtype)
    covariance.diagonal().add_(SHRINKAGE * variance)
    values, vectors = torch.linalg.eigh(covariance)
    whitening: torch.Tensor = (vectors * values.clamp(min=SHRINKAGE / 2 * variance).rsqrt()) @ vectors.t()
    return whitening


@torch.no_grad()
def base_samples(
    base: Expert, opening: str, turn: str, *, count: int = 128, tokens: int = 100, seed: int = 0
) -> Dataset:
    """Samples reference rows from a language model, as continuations of `opening` (Magpie, arXiv 2406.08464).

    Machines with different floating-point rounding sample different rows, and a whitening by few rows depends on them:
    whiten gates that are to be compared by the same rows, and save these.

    Args:
        base: a causal language model with its tokenizer; an adapter is not applied.
        opening: chat markup up to the user's first word.
        turn: chat markup between the user's message and the reply; the text before it is the prompt. A sample
            without it is an incomplete prompt.
        count: number of rows.
        tokens: new tokens per row, at temperature 1.
        seed: for sampling.

    Returns:
        Columns ``prompt`` and ``target``.
    """
    from datasets import Dataset

    model: Any = base.model
    tokenizer = base.processor
    start = tokenizer(opening, return_tensors="pt").input_ids.to(base.model.device)
    texts: list[str] = []
    with torch.random.fork_rng(), phase("Sampling reference rows", count) as progress:
        torch.manual_seed(seed)
        while len(texts) < count:
            batch = start.expand(min(32, count - len(texts)), -1)
            sampled = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,  # continues after the end of a turn, to sample replies too
            )
            texts += [tokenizer.decode(row[start.shape[1] :]) for row in sampled]
            progress.reach(len(texts))
    turns = [text.partition(turn) for text in texts]
    return Dataset.from_list([{"prompt": opening + ask + markup, "target": reply} for ask, markup, reply in turns])


__all__ = ["Whitening", "base_samples", "fit_whitening", "standardised"]
