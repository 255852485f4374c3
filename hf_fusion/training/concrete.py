"""Concrete: a mask that all task vectors share is learned, so that they disturb each other less (arXiv 2312.06173)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """θ = θ0 + m ⊙ Σ_k λ_k τ_k with one mask m for all experts, relaxed Bernoulli, over its mean in every tensor.

    `adapt_routers` learns it as it does coefficients: "entropy" with ``diversity=0`` and ``learning_rate=1e-3`` is the
    paper's loss (2,000 steps of 16 rows a task). First the mask is learned, which with the coefficients as they are is
    Concrete task arithmetic; Concrete AdaMerging learns the mask with an `inner_rate`, then the coefficients under it:

        model = ConcreteMerge(experts, base, granularity="layer", inner_rate=1.0)
        adapt_routers(model, rows, loss="entropy", diversity=0, learning_rate=1e-3, steps=1000)
        model.learn("coefficients")
        adapt_routers(model, rows, loss="entropy", diversity=0, learning_rate=1e-3, steps=1000)

    While the mask learns, every step draws one; at all other times it is the median, so that the same model gives the
    same answers. (The authors' code draws a last one.)

    Args:
        experts, base, scaling: as for `CoefficientMerge`.
        granularity: of the coefficients, "task" or "layer".
        temperature: of the relaxed Bernoulli distribution.
        inner_rate: the mask is judged by what the coefficients become with it: after a gradient step of this rate, from
            where they are, on the same rows (first-order meta-learning). 0: by the coefficients as they are.

    Attributes:
        mask_logits: for each of `tensors`, log-odds that an element is kept; at first 0, a mask that changes nothing.
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
        sizes = [getattr(self, f"vectors_{number}").shape[1:] for number in range(len(self.tensors))]
        self.mask_logits = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
        self._is_held = False
        self.learn("mask")

    def learn(self, what: Literal["mask", "coefficients"]) -> None:
        """Which of the two requires gradients from now on; the other stays as it is."""
        self.mask_logits.requires_grad_(what == "mask")
        self.coefficients.requires_grad_(what == "coefficients")

    def masks(self) -> list[torch.Tensor]:
        """For each of `tensors` its mask: drawn where it learns, else the median; its mean is 1, or 0 if it is 0."""
        is_drawn = torch.is_grad_enabled() and any(logits.requires_grad for logits in self.mask_logits)
        found = []
        for logits in self.mask_logits:
            odds = logits
            if is_drawn:
                uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
                odds = logits + uniform.log() - (-uniform).log1p()
            mask = (odds / self.temperature).sigmoid()
            found.append(mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny))
        return found

    @contextmanager
    def merged(self) -> Iterator[None]:
        """As ever; within `objective` what it merged itself stays."""
        if self._is_held:
            yield
            return
        with super().merged():
            yield

    def objective(self, loss: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """What is minimised instead of a loss of batches: with an `inner_rate`, the loss after the inner step."""
        if not self.inner_rate or not self.mask_logits[0].requires_grad:
            return loss

        def after_a_step(batches: Any) -> torch.Tensor:
            masks, start = self.masks(), self.coefficients.detach().requires_grad_()
            with self._held(start, [mask.detach() for mask in masks]):
                [slope] = torch.autograd.grad(loss(batches), start)
            with self._held(start.detach() - self.inner_rate * slope, masks):
                return loss(batches)

        return after_a_step

    @contextmanager
    def _held(self, coefficients: torch.Tensor, masks: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within this context forwards use these."""
        before, self._merge, self._is_held = self._merge, self._masked(coefficients, masks), True
        try:
            yield
        finally:
            self._merge, self._is_held = before, False

    def _merged(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """With coefficients of its own under the mask; `using` others, without one: an expert alone is whole."""
        if coefficients is not self.coefficients:
            return super()._merged(coefficients)
        return self._masked(coefficients, self.masks())

    def _masked(self, coefficients: torch.Tensor, masks: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensor name -> θ0 + m ⊙ Σ_k λ_k τ_k."""
        known = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        merged = super()._merged(coefficients)
        return {
            name: known[name] + mask.to(merged[name].dtype) * (merged[name] - known[name])
            for name, mask in zip(self.tensors, masks, strict=True)
        }


__all__ = ["ConcreteMerge"]
