"""Whitening: how a base's activations lie where nothing in particular is asked, so that gates see what is particular.

The activations of a language model share most of what they are: a common direction and a few wide ones, whatever is
said. Standardised inputs keep these, so a gate's score is mostly about them, and gates that were trained apart from
each other rank by chance what all their experts share. Relative to reference rows, with mean 0 and covariance 1, the
score is about what sets an input apart (the metric of linear discriminant analysis).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fusion.errors import FusionError
from hf_fusion.hub.gates import gate_sizes
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.progress import phase
from hf_fusion.training.batches import equal_lengths, read_examples, to_model, unlabelled
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

SHRINKAGE = 0.01  # share of the mean variance that is added to every direction: few rows leave some without any


@dataclass(frozen=True)
class Whitening:
    """A base's standardised inputs on reference rows, by module path; linears that read the same input share tensors.

    Attributes:
        mean: (d_in,), fp32.
        factor: Σ^(-1/2), (d_in, d_in), fp32: ``factor @ (LN(x) - mean)`` has mean 0 and covariance 1. Of inputs that
            were the same in all rows, which say nothing about a covariance, it is the identity.
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
    """Reads reference rows with an adapter's base alone.

    Args:
        expert: an adapter, or its base, as `load_experts` takes it.
        rows: what the model may be asked in general: column ``prompt``, ``text`` (and ``text_pair``) or ``image``;
            labels are not looked at. `base_samples` makes some where there are none. A few thousand tokens per
            thousand features are enough.
        base: the adapter's base, where it is not the one it records.
        modules: paths of the linears; default is those that the adapter adapts.
        batch_size: at most so many rows at once; only rows of equal lengths share a batch, so nothing is padded.
        max_length: the longest sequence, in tokens.

    Raises:
        FusionError: for modules that are no linears, and rows that the base cannot read.
    """
    (loaded,) = load_experts([expert], base=base, gates=False)
    if modules is None:
        if loaded.adapter is None:
            raise FusionError(f"{loaded.name} is a full model", hint="say which linears: modules=…")
        modules = gate_sizes(loaded.adapter, loaded.model)
    model: Any = loaded.model
    found = dict(model.named_modules())
    if unknown := sorted(path for path in modules if linear_sizes(found.get(path)) is None):
        raise FusionError(f"{loaded.name} has no linear {unknown[0]}")
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    same: dict[str, str] = {}  # path -> the first path that read the same input
    last: list[Any] = [None, ""]

    def read(path: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0] is last[0]:
            same[path] = last[1]
            return
        last[:] = inputs[0], path
        same[path] = path
        x = standardised(inputs[0].reshape(-1, inputs[0].shape[-1]).float())  # (N, d_in)
        x = x.double()  # moments cancel out where inputs vary little about a large mean
        sums[path] = sums.get(path, 0) + x.sum(0)
        squares[path] = squares.get(path, 0) + x.t() @ x
        counts[path] = counts.get(path, 0) + len(x)

    examples = read_examples(loaded, unlabelled(rows), max_length)
    handles = [found[path].register_forward_pre_hook(partial(read, path)) for path in modules]
    try:
        with phase("Reading reference rows", len(examples.rows)) as told:
            for batch in equal_lengths(examples.rows, batch_size):
                examples.loss(model, to_model(examples.collate(batch), model))
                last[:] = None, ""
                told.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    mean = {path: (total / counts[path]).cpu() for path, total in sums.items()}
    factor = {path: inverse_root(squares[path].cpu() / counts[path], mean[path]).float() for path in mean}
    return Whitening(
        {path: mean[same[path]].float() for path in modules}, {path: factor[same[path]] for path in modules}
    )


def standardised(x: torch.Tensor) -> torch.Tensor:
    """LN(x), without affine: what the router's scores read."""
    return nn.functional.layer_norm(x, x.shape[-1:])


def inverse_root(second_moment: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Σ^(-1/2), symmetric, of the covariance with a little of its mean variance added to every direction.

    Where the mean variance is only what float64 rounds off of the second moment, it is the identity.

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
    """Reference rows that a language model makes up: what follows `opening`, where a user would speak (Magpie's way).

    Nothing but the base is needed (Magpie, arXiv 2406.08464). A machine that rounds otherwise samples other rows, and
    few rows whiten otherwise: gates that are to be compared should be whitened by the same rows, so keep these.

    Args:
        base: a causal language model with its tokenizer; of an adapter, its base is read.
        opening: a chat's markup up to the user's first word.
        turn: the markup between the user's words and the answer; what comes before it is the prompt. A sample
            without it is a prompt that ends in the middle.
        count: number of rows.
        tokens: sampled of each, at temperature 1.
        seed: of the samples.

    Returns:
        Columns ``prompt`` and ``target``.
    """
    from datasets import Dataset

    model: Any = base.model
    tokenizer = base.processor
    start = tokenizer(opening, return_tensors="pt").input_ids.to(base.model.device)
    texts: list[str] = []
    with torch.random.fork_rng(), phase("Sampling reference rows", count) as told:
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
                min_new_tokens=tokens,  # goes on behind the end of a turn, so that answers are sampled as well
            )
            texts += [tokenizer.decode(row[start.shape[1] :]) for row in sampled]
            told.reach(len(texts))
    parts = [text.partition(turn) for text in texts]
    return Dataset.from_list([{"prompt": opening + ask + found, "target": answer} for ask, found, answer in parts])


__all__ = ["Whitening", "base_samples", "fit_whitening", "standardised"]
