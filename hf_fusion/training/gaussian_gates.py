"""Gaussian gates of one adapter: densities of a few inputs of the base on the adapter's rows, without training."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from hf_fusion.errors import FusionError
from hf_fusion.models.configuration_phatgoose import HEADS
from hf_fusion.models.fused_heads import head_of
from hf_fusion.models.points_phatgoose import POOLED_HEADS, gate_points
from hf_fusion.progress import phase
from hf_fusion.training.batches import Examples, equal_length_batches, to_model
from hf_fusion.training.whitening import standardised
from hf_fusion.types import Expert, Gates, Gaussian

RANK = 32  # directions; with 16 the routing of similar tasks gets worse, with 64 it stays the same
ROWS = 256  # with 40 rows of 40 tokens the directions are already known


@torch.no_grad()
def fit_gaussians(expert: Expert, examples: Examples, batch_size: int) -> Gates:
    """The Gaussian gates of an adapter that is applied to its base.

    Args:
        expert: an adapter with its base.
        examples: its rows.
        batch_size: maximum rows per batch; only rows of equal length share a batch, so that nothing is padded.
    """
    model = expert.model
    pools = head_of(model, HEADS, "routed") in POOLED_HEADS
    moments = {path: _Moments() for path in gate_points(model)}

    def read(path: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = standardised(inputs[0].float())
        moments[path].add(x.reshape(rows_in_batch, -1, x.shape[-1]).mean(1) if pools else x.flatten(0, -2))

    modules = dict(model.named_modules())
    handles = [modules[path].register_forward_pre_hook(partial(read, path)) for path in moments]
    try:
        with phase("Reading inputs", len(examples.rows)) as progress:
            for batch in equal_length_batches(examples.rows, batch_size):
                rows_in_batch = len(batch)
                examples.loss(model, to_model(examples.collate(batch), model))
                progress.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    if broken := next((path for path, found in moments.items() if not found.are_finite), ""):
        raise FusionError(f"{expert.name}: the input of {broken} has NaN or Inf", hint="look for NaN in the weights")
    gaussians = {path: found.gaussian(RANK) for path, found in moments.items()}
    return Gates({}, "gaussian", facts={"examples": len(examples.rows)}, gaussians=gaussians)


class _Moments:
    """First and second moments of vectors, in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: torch.Tensor | float = 0.0
        self.squares: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Adds vectors (N, d)."""
        x = x.double()
        self.count += len(x)
        self.sum = self.sum + x.sum(0)
        self.squares = self.squares + x.t() @ x

    @property
    def are_finite(self) -> bool:
        """Whether no vector had NaN or Inf."""
        return bool(torch.as_tensor(self.sum).isfinite().all())

    def gaussian(self, rank: int) -> Gaussian:
        """Mean and principal directions; each has its largest entry positive."""
        assert isinstance(self.sum, torch.Tensor) and isinstance(self.squares, torch.Tensor)
        mean = self.sum / self.count
        covariance = self.squares / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance.cpu())
        rank = min(rank, self.count - 1, len(mean))
        values, directions = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank].t()
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return Gaussian(mean.float().cpu(), (directions * largest.sign()).float(), values.float())


__all__ = ["fit_gaussians"]
