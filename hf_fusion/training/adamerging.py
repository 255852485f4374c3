"""AdaMerging: a static merge whose merging coefficients are learned without labels (arXiv 2310.02575)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.engine.tensors import clamp_variance
from hf_fusion.models.build_wemoe import AlignedExperts, align_experts
from hf_fusion.models.heads_wemoe import activate_heads, fill_heads, install_heads, with_one_head
from hf_fusion.models.routing_wemoe import by_unit, index_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.models.modeling_wemoe import WEMoEModel

GRANULARITIES = ("task", "layer")


class CoefficientMerge(nn.Module):
    """θ = θ0 + Σ_k λ_k τ_k with learnable coefficients λ; `adapt_routers` and `fit_routers` train them.

    The merged weights are shared by all inputs; each expert of a classifier keeps its classification head. Needs the
    memory of the base and of K full task vectors.

    Args:
        experts: full fine-tunes and LoRA adapters, as `load_experts` takes them.
        base: the model that they were fine-tuned from; adapters record theirs.
        granularity: "task", one coefficient per expert, or "layer", one per expert and tensor.
        scaling: initial value of every coefficient.

    Attributes:
        experts: names of the experts, which are also those of the tasks.
        tensors: names of the L tensors that at least one expert changed.
        coefficients: (K,) or (L, K), fp32; the only parameter that requires gradients.

    Raises:
        FusionError: if experts do not fit together, naming the expert, the tensor and the reason.
    """

    def __init__(
        self,
        experts: Sequence[ExpertLike],
        base: ExpertLike | None = None,
        granularity: str = "layer",
        scaling: float = 0.3,
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise FusionError(f"there is no granularity {granularity!r}", suggestion(granularity, GRANULARITIES))
        if not experts:
            raise FusionError("a fusion needs at least one expert; the list is empty")
        base_expert = load_experts([base], gates=False)[0] if base is not None else None
        loaded = load_experts(list(experts), base=base_expert, gates=False)
        self.processor: Any = loaded[0].processor or (base_expert.processor if base_expert else None)
        try:
            self._register(align_experts(loaded, base_expert))
        except ValueError as error:  # models/ does not import hf_fusion, so it raises ValueError
            raise FusionError(str(error)) from error
        size = (len(self.tensors), len(self.experts)) if granularity == "layer" else (len(self.experts),)
        self.coefficients = nn.Parameter(torch.full(size, scaling))
        self.config.scaling = scaling
        self._cached: dict[str, torch.Tensor] | None = None
        self.eval()

    @torch.no_grad()
    def _register(self, aligned: AlignedExperts) -> None:
        """Builds the backbone from the base, with the experts' heads, and stores the task vectors of other tensors."""
        rows = [source.row for source in aligned.sources]
        self.experts: list[str] = [source.name for source in aligned.sources]
        seq2seq = bool(getattr(aligned.template.config, "is_encoder_decoder", False))
        self.config = SimpleNamespace(head=aligned.head, experts=rows, adaptation=None, is_encoder_decoder=seq2seq)
        self.backbone: PreTrainedModel = copy.deepcopy(aligned.template).requires_grad_(False)
        install_heads(self.backbone, aligned.paths, [len(row["labels"]) for row in rows])
        fill_heads(self.backbone, aligned.paths, [source.tensors for source in aligned.sources], self.experts)
        self.backbone.requires_grad_(False)
        self.heads = aligned.paths
        self.tensors: list[str] = []
        modules = dict(self.backbone.named_modules())
        for name, tensor in [*self.backbone.named_parameters(), *self.backbone.named_buffers()]:
            if name not in aligned.base:  # heads, and non-persistent buffers
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
        """Runs the merged model with the head of a task (default: the first)."""
        activate_heads(self.backbone, self.heads, index_of(task or self.experts[0], self.experts))
        return functional_call(self.backbone, self.tensors_now(), kwargs=inputs)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within this context the weights are merged once, for all forward passes and their gradients."""
        before, self._cached = self._cached, self._merge(self.coefficients)
        try:
            yield
        finally:
            self._cached = before

    @contextmanager
    def using(self, coefficients: Sequence[float] | str) -> Iterator[None]:
        """Within this context other coefficients replace the learned ones.

        Args:
            coefficients: one per expert; or an expert's name, which selects that expert with a coefficient of 1.

        Raises:
            ValueError: for an unknown name, or the wrong number of coefficients.
        """
        fixed = by_unit(coefficients, self.experts, [])[""][0]
        with torch.no_grad():
            tensors = self._merge(fixed.to(self.coefficients.device))
        with self.showing(tensors):
            yield

    @contextmanager
    def showing(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context the model has other weights.

        Args:
            tensors: a tensor for each name in `tensors`.
        """
        before, self._cached = self._cached, dict(tensors)
        try:
            yield
        finally:
            self._cached = before

    def objective(self, loss: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """What is minimised for a small loss of batches: the loss itself."""
        return loss

    def tensors_now(self) -> dict[str, torch.Tensor]:
        """Name -> merged tensor, with the coefficients of the context or the learned ones."""
        return self._cached if self._cached is not None else self._merge(self.coefficients)

    @torch.no_grad()
    def task_arithmetic(self, scaling: float) -> dict[str, torch.Tensor]:
        """Name -> θ0 + λ Σ τ, with one λ for all experts."""
        return CoefficientMerge._merge(self, torch.full((len(self.experts),), scaling).to(self.coefficients))

    def vectors(self) -> dict[str, torch.Tensor]:
        """Name -> task vectors (K, ...), one of each expert."""
        return {name: getattr(self, f"vectors_{index}") for index, name in enumerate(self.tensors)}

    def states(self) -> tuple[dict[str, torch.Tensor], list[Mapping[str, torch.Tensor]]]:
        """Name -> tensor, of the base and of each expert; only what at least one expert changed.

        The experts' tensors are computed when they are read.
        """
        base, vectors = self.task_arithmetic(0.0), self.vectors()
        return base, [_ExpertTensors(base, vectors, index) for index in range(len(self.experts))]

    @torch.no_grad()
    def rebase(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes other weights the base: task vectors are relative to them, and the experts stay what they are.

        Args:
            tensors: a tensor for each name in `tensors`.
        """
        known = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        for name, vectors in self.vectors().items():
            vectors += known[name] - tensors[name]
            known[name].copy_(tensors[name])

    def _merge(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensor name -> θ0 + Σ_k λ_k τ_k, with coefficients (K,) or (L, K)."""
        base = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        rows = coefficients.expand(len(self.tensors), -1)
        return {
            name: clamp_variance(name, base[name] + torch.tensordot(row.to(taus.dtype), taus, dims=1))
            for row, (name, taus) in zip(rows, self.vectors().items(), strict=True)
        }

    @torch.no_grad()
    def dense(self, task: str | None = None) -> PreTrainedModel:
        """The plain merged model, with the head of a task (default: the first)."""
        index = index_of(task or self.experts[0], self.experts)
        model: PreTrainedModel = with_one_head(
            self.backbone, self.heads, index, self.config.experts[index]["labels"], {}
        )
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in self.tensors_now().items():
            targets[name].copy_(tensor)
        model.requires_grad_(True).eval()
        return model

    def table(self) -> Mapping[str, Mapping[str, float]]:
        """Tensor -> expert -> coefficient; with granularity "task" the only key is "", for all tensors."""
        rows = self.coefficients.detach().cpu().view(-1, len(self.experts)).tolist()
        names = self.tensors if self.coefficients.dim() == 2 else [""]
        return {name: dict(zip(self.experts, row, strict=True)) for name, row in zip(names, rows, strict=True)}


class _ExpertTensors(Mapping[str, torch.Tensor]):
    """Name -> an expert's tensor, from the base's and the task vectors (K, ...)."""

    def __init__(self, base: Mapping[str, torch.Tensor], vectors: Mapping[str, torch.Tensor], index: int) -> None:
        self.base, self.vectors, self.index = base, vectors, index

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.base[name] + self.vectors[name][self.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


if TYPE_CHECKING:
    LearnedMerge: TypeAlias = WEMoEModel | CoefficientMerge
    """What `adapt_routers` and `fit_routers` change: routers, or coefficients."""


def training_objective(model: LearnedMerge, loss: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """The function of a batch to minimise: the loss, or the objective of a `CoefficientMerge`."""
    return model.objective(loss) if isinstance(model, CoefficientMerge) else loss


def merged_once(model: LearnedMerge) -> AbstractContextManager[None]:
    """A context in which a `CoefficientMerge` merges its weights once; does nothing for other models."""
    return model.merged() if isinstance(model, CoefficientMerge) else nullcontext()


__all__ = ["CoefficientMerge", "merged_once", "training_objective"]
