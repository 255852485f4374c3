"""Concrete subspace merging: a learned mask, shared by all task vectors, reduces interference (arXiv 2312.06173)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_fusion.training.adamerging import CoefficientMerge

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike


class ConcreteMerge(CoefficientMerge):
    """θ = θ0 + m ⊙ Σ_k λ_k τ_k with one relaxed Bernoulli mask m for all experts, divided by its mean per tensor.

    `adapt_routers` trains it: "entropy" with ``diversity=0`` and ``learning_rate=1e-3`` is the paper's loss (2,000
    steps of 16 rows per task). Training the mask alone, with fixed coefficients, is Concrete task arithmetic. Concrete
    AdaMerging trains the mask with an `inner_rate`, then the coefficients under that mask:

        model = ConcreteMerge(experts, base, granularity="layer", inner_rate=1.0)
        adapt_routers(model, rows, loss="entropy", diversity=0, learning_rate=1e-3, steps=1000)
        model.learn("coefficients")
        adapt_routers(model, rows, loss="entropy", diversity=0, learning_rate=1e-3, steps=1000)

    While the mask is trained, every step samples it; otherwise the median of its distribution is used, so that
    inference is deterministic. (The authors' code samples once more at the end.)

    Args:
        experts, base, scaling: as for `CoefficientMerge`.
        granularity: of the coefficients, "task" or "layer".
        temperature: of the relaxed Bernoulli distribution.
        inner_rate: learning rate of the inner step: the loss of a mask is taken after one gradient step of the
            coefficients on the same rows (first-order meta-learning). 0 takes it at the current coefficients.

    Attributes:
        mask_logits: for each of `tensors`, log-odds that an element is kept, in the tensor's shape; initially 0, which
            leaves the merge unchanged.
    """

    def __init__(
        self,
        experts: Sequence[ExpertLike],
        base: str | Path | PreTrainedModel | None = None,
        granularity: str = "task",
        scaling: float = 0.3,
        temperature: float = 0.5,
        inner_rate: float = 0.0,
    ) -> None:
        super().__init__(experts, base, granularity, scaling)
        self.temperature, self.inner_rate = temperature, inner_rate
        sizes = [getattr(self, f"vectors_{index}").shape[1:] for index in range(len(self.tensors))]
        self.mask_logits = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
        self._is_fixed = False  # whether `merged` keeps the weights of `_fixed_merge`
        self.learn("mask")

    def learn(self, what: Literal["mask", "coefficients"]) -> None:
        """Selects what is trained from now on; the other is frozen."""
        self.mask_logits.requires_grad_(what == "mask")
        self.coefficients.requires_grad_(what == "coefficients")

    def masks(self) -> list[torch.Tensor]:
        """The mask of each of `tensors`: a sample in training, else the median; of mean 1, or 0 if it is empty."""
        is_sampled = torch.is_grad_enabled() and any(logits.requires_grad for logits in self.mask_logits)
        found = []
        for logits in self.mask_logits:
            odds = logits
            if is_sampled:
                uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
                odds = logits + uniform.log() - (-uniform).log1p()
            mask = (odds / self.temperature).sigmoid()
            found.append(mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny))
        return found

    @contextmanager
    def merged(self) -> Iterator[None]:
        """See `CoefficientMerge.merged`; within `objective`, keeps the weights that were merged there."""
        if self._is_fixed:
            yield
            return
        with super().merged():
            yield

    def objective(self, loss: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """The training objective for a loss: with an `inner_rate`, the loss after the inner gradient step."""
        if not self.inner_rate or not self.mask_logits[0].requires_grad:
            return loss

        def loss_after_step(batches: Mapping[str, Any]) -> torch.Tensor:
            masks, start = self.masks(), self.coefficients.detach().requires_grad_()
            with self._fixed_merge(start, [mask.detach() for mask in masks]):
                [gradient] = torch.autograd.grad(loss(batches), start)
            with self._fixed_merge(start.detach() - self.inner_rate * gradient, masks):
                return loss(batches)

        return loss_after_step

    @contextmanager
    def _fixed_merge(self, coefficients: torch.Tensor, masks: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within this context forward passes use these coefficients and masks."""
        before, self._cached, self._is_fixed = self._cached, self._merge_masked(coefficients, masks), True
        try:
            yield
        finally:
            self._cached, self._is_fixed = before, False

    def _merge(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """Masks the learned coefficients, but not those of `using`: a single expert stays complete."""
        if coefficients is not self.coefficients:
            return super()._merge(coefficients)
        return self._merge_masked(coefficients, self.masks())

    def _merge_masked(self, coefficients: torch.Tensor, masks: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensor name -> θ0 + m ⊙ Σ_k λ_k τ_k."""
        base = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        merged = super()._merge(coefficients)
        return {
            name: base[name] + mask.to(merged[name].dtype) * (merged[name] - base[name])
            for name, mask in zip(self.tensors, masks, strict=True)
        }


__all__ = ["ConcreteMerge"]
