"""AdaMerging: how much of every task vector goes into a static merge, learned without labels (arXiv 2310.02575)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_fusion.errors import FusionError
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.engine.tensors import possible
from hf_fusion.models.build_wemoe import AlignedExperts, align_experts
from hf_fusion.models.heads_wemoe import activate_heads, fill_heads, install_heads, with_one_head
from hf_fusion.models.routing_wemoe import by_unit, index_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

GRANULARITIES = ("task", "layer")


class CoefficientMerge(nn.Module):
    """θ = θ0 + Σ_k λ_k τ_k with coefficients that are learned: `adapt_routers` and `fit_routers` do it.

    One merge serves all inputs; of classifiers every expert keeps its own head. All of it is held in memory, K + 1
    times the base.

    Args:
        experts: full fine-tunes and LoRA adapters, as `load_experts` takes them.
        base: the model that they were fine-tuned from; adapters record theirs.
        granularity: "task", one coefficient for each expert, or "layer", one for each expert and tensor.
        scaling: every coefficient at first.

    Attributes:
        experts: names, which are those of the tasks.
        tensors: names of the L tensors that any expert changed.
        coefficients: (K,) or (L, K), fp32; all that requires gradients.

    Raises:
        FusionError: where experts do not fit together, naming the expert, the tensor and the reason.
    """

    def __init__(
        self,
        experts: Sequence[ExpertLike],
        base: str | Path | PreTrainedModel | None = None,
        granularity: str = "layer",
        scaling: float = 0.3,
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise FusionError(f"granularity={granularity!r}", hint=f"one of {', '.join(GRANULARITIES)}")
        if not experts:
            raise FusionError("a fusion needs at least one expert; the list is empty")
        start: Any = load_experts([base], gates=False)[0] if base is not None else None
        loaded = load_experts(list(experts), base=start, gates=False)
        self.processor = loaded[0].processor or (start and start.processor)
        try:
            self._take(align_experts(loaded, start))
        except ValueError as error:  # a family, which knows nothing of this package, raises these
            raise FusionError(str(error)) from error
        size = (len(self.tensors), len(self.experts)) if granularity == "layer" else (len(self.experts),)
        self.coefficients = nn.Parameter(torch.full(size, scaling))
        self.config.scaling = scaling
        self._merge: dict[str, torch.Tensor] | None = None
        self.eval()

    @torch.no_grad()
    def _take(self, aligned: AlignedExperts) -> None:
        """The base in the structure of its experts, their heads, and the task vectors of everything else."""
        rows = [source.row for source in aligned.sources]
        self.experts: list[str] = [source.name for source in aligned.sources]
        speaks_twice = bool(getattr(aligned.template.config, "is_encoder_decoder", False))
        self.config = SimpleNamespace(head=aligned.head, experts=rows, adaptation=None, is_encoder_decoder=speaks_twice)
        self.backbone: Any = copy.deepcopy(aligned.template).requires_grad_(False)
        install_heads(self.backbone, aligned.paths, [len(row["labels"]) for row in rows])
        fill_heads(self.backbone, aligned.paths, [source.tensors for source in aligned.sources], self.experts)
        self.backbone.requires_grad_(False)
        self.heads = aligned.paths
        self.tensors: list[str] = []
        modules = dict(self.backbone.named_modules())
        for name, tensor in [*self.backbone.named_parameters(), *self.backbone.named_buffers()]:
            if name not in aligned.base:  # heads, and buffers that no checkpoint holds
                continue
            base = aligned.base[name]
            tensor.copy_(base)
            if not base.is_floating_point():
                continue
            conv = isinstance(modules.get(name.rpartition(".")[0]), Conv1D)
            vectors = [source.vector(name, base, conv) for source in aligned.sources]
            if any(vector is not None and vector.any() for vector in vectors):
                full = [torch.zeros_like(base) if vector is None else vector.to(base.dtype) for vector in vectors]
                self.register_buffer(f"vectors_{len(self.tensors)}", torch.stack(full), persistent=False)
                self.tensors.append(name)
        for source in aligned.sources:
            source.check_relation()

    def forward(self, task: str | None = None, **inputs: Any) -> Any:
        """As the dense model's, with the head of a task (default: the first)."""
        activate_heads(self.backbone, self.heads, index_of(task or self.experts[0], self.experts))
        return functional_call(self.backbone, self._tensors(), kwargs=inputs)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within this context the coefficients stay as they are: one merge serves all forwards, and their gradients."""
        before, self._merge = self._merge, self._merged(self.coefficients)
        try:
            yield
        finally:
            self._merge = before

    @contextmanager
    def using(self, coefficients: Sequence[float] | str) -> Iterator[None]:
        """Within this context the learned coefficients are not used.

        Args:
            coefficients: one for each expert; or an expert's name: it alone, whole.

        Raises:
            ValueError: for a name that no expert has, and another number of coefficients.
        """
        given = by_unit(coefficients, self.experts, [])[""][0]
        with torch.no_grad():
            before, self._merge = self._merge, self._merged(given.to(self.coefficients.device))
        try:
            yield
        finally:
            self._merge = before

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._merge if self._merge is not None else self._merged(self.coefficients)

    def _merged(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensor name -> θ0 + Σ_k λ_k τ_k, with coefficients (K,) or (L, K)."""
        known = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        rows = coefficients.expand(len(self.tensors), -1)
        vectors = (getattr(self, f"vectors_{number}") for number in range(len(self.tensors)))  # (K, ...) each
        return {
            name: possible(name, known[name] + torch.tensordot(own.to(taus.dtype), taus, dims=1))
            for name, own, taus in zip(self.tensors, rows, vectors, strict=True)
        }

    @torch.no_grad()
    def dense(self, task: str | None = None) -> PreTrainedModel:
        """The plain merged model, with the head of a task (default: the first)."""
        index = index_of(task or self.experts[0], self.experts)
        model: PreTrainedModel = with_one_head(
            self.backbone, self.heads, index, self.config.experts[index]["labels"], {}
        )
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in self._tensors().items():
            targets[name].copy_(tensor)
        model.requires_grad_(True).eval()
        return model

    def table(self) -> Mapping[str, Mapping[str, float]]:
        """Tensor -> expert -> coefficient; "" stands for all tensors where there is one for each expert."""
        rows = self.coefficients.detach().cpu().view(-1, len(self.experts)).tolist()
        names = self.tensors if self.coefficients.dim() == 2 else [""]
        return {name: dict(zip(self.experts, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def objective_of(model: Any, loss: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """What is minimised for a model to have a small loss of batches: the loss itself, but for `ConcreteMerge`."""
    return model.objective(loss) if hasattr(model, "objective") else loss


def merged_once(model: Any) -> AbstractContextManager[None]:
    """A context in which a model whose weights serve all inputs merges them once; others do as ever."""
    return model.merged() if isinstance(model, CoefficientMerge) else nullcontext()


__all__ = ["CoefficientMerge", "merged_once", "objective_of"]
