"""One backbone and its experts: a full model, or a base shared by K LoRA adapters.

The adapters of one base run in one pass: the batch holds one group of rows per expert, the base's products are
shared by all rows, and each group is multiplied by its expert's A and B in one batched product.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .fused_calls import Calls
from .fused_heads import AUTO_CLASSES


class Groups:
    """The expert of each equally long group of rows in a batch; shared by all modules of a backbone."""

    def __init__(self) -> None:
        self._calls = Calls()

    @property
    def experts(self) -> list[int]:
        """The experts of this thread's running forward; the first expert if the inner model is called directly."""
        return self._calls.current() or [0]

    def of(self, experts: list[int]) -> AbstractContextManager[Any]:
        """Context manager that sets the experts of the groups."""
        return self._calls.entered(experts)


class AdaptedLinear(nn.Module):
    """A frozen linear (or GPT-2's Conv1D) with one LoRA update per expert.

    The A's and B's are stored side by side without padding, so mixed ranks cost nothing on disk; `slots` finds an
    expert's columns, and `real` masks columns that an expert of lower rank reads from others.
    """

    def __init__(self, linear: Any, ranks: list[int], groups: Groups) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        if isinstance(linear, Conv1D):
            d_in, d_out = d_out, d_in
        self.linear = linear
        self.groups = groups
        self.ranks = ranks
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(sum(ranks), d_in, **like), requires_grad=False)
        self.lora_B = nn.Parameter(torch.empty(d_out, sum(ranks), **like), requires_grad=False)
        widest, starts = max(ranks), [sum(ranks[:k]) for k in range(len(ranks))]
        self.slots = [
            [start + slot if slot < rank else 0 for slot in range(widest)] for start, rank in zip(starts, ranks)
        ]
        self.even = len(set(ranks)) == 1

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models read its dtype."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ..., d_in) → (N, ..., d_out); the N rows are in equal groups, one expert each."""
        y = self.linear(x)
        experts = self.groups.experts
        grouped = x.reshape(len(experts), -1, x.shape[-1])  # (G, n, d_in)
        if self.even:
            index = torch.tensor(experts, device=x.device)
            a = self.lora_A.view(len(self.ranks), -1, x.shape[-1])[index]  # (G, r, d_in)
            b = self.lora_B.view(self.lora_B.shape[0], len(self.ranks), -1)[:, index].permute(1, 2, 0)  # (G, r, d_out)
            hidden = torch.bmm(grouped, a.transpose(1, 2))  # (G, n, r)
        else:
            slots = torch.tensor([self.slots[e] for e in experts], device=x.device)  # (G, r)
            real = torch.tensor(
                [[slot < self.ranks[e] for slot in range(len(self.slots[e]))] for e in experts],
                device=x.device,
            )
            hidden = torch.bmm(grouped, self.lora_A[slots].transpose(1, 2)) * real[:, None]  # (G, n, r)
            b = self.lora_B.T[slots]  # (G, r, d_out)
        update = torch.bmm(hidden, b)  # (G, n, d_out)
        return y + update.view_as(y)


class PerExpertModule(nn.Module):
    """A module with one copy per expert: PEFT's `modules_to_save`, mostly classification heads."""

    def __init__(self, variants: list[nn.Module], groups: Groups) -> None:
        super().__init__()
        self.variants = nn.ModuleList(variants)
        self.groups = groups

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply each expert's copy to its rows; outputs of narrower heads are padded with zeros."""
        experts = self.groups.experts
        rows_per_group = x.shape[0] // len(experts)
        runs = [(expert, len(list(run)) * rows_per_group) for expert, run in groupby(experts)]
        parts = x.split([rows for _, rows in runs])
        outputs = [self.variants[e](part, *args, **kwargs) for (e, _), part in zip(runs, parts, strict=True)]
        width = max(output.shape[-1] for output in outputs)
        return torch.cat([nn.functional.pad(output, (0, width - output.shape[-1])) for output in outputs])


class Backbone:
    """A transformer with its experts, and the assignment of a batch's rows to experts.

    Not a module itself: transformers gathers tied weights and the like from direct children only, so the FoE registers
    `model` as its own child.

    Args:
        head: key of `AUTO_CLASSES`.
        config: the inner model's config.
        ranks: module path -> LoRA rank of each expert; empty for a full model.
        saved: paths of the modules of which every expert has its own copy; empty for a full model.
        num_labels: number of classes of each expert, which shapes its head.
        model: the loaded inner model, which is used as it is; by default one is built from `config`.
    """

    def __init__(
        self,
        head: str,
        config: PreTrainedConfig,
        ranks: dict[str, list[int]],
        saved: list[str],
        num_labels: list[int],
        model: PreTrainedModel | None = None,
    ) -> None:
        self.groups = Groups()
        if model is None:
            model = AUTO_CLASSES[head].from_config(config, trust_remote_code=False)
        self.model: PreTrainedModel = model
        for path, expert_ranks in ranks.items():
            linear = self.model.get_submodule(path)
            self.model.set_submodule(path, AdaptedLinear(linear, expert_ranks, self.groups))
        templates = {number: _on_meta(head, config, number) for number in set(num_labels)} if saved else {}
        for path in saved:
            like = next(self.model.get_submodule(path).parameters())
            copies = [copy.deepcopy(templates[number].get_submodule(path)) for number in num_labels]
            copies = [module.to_empty(device=like.device).to(like.dtype) for module in copies]
            self.model.set_submodule(path, PerExpertModule(copies, self.groups))

    def __call__(self, inputs: dict[str, torch.Tensor], experts: list[int], **kwargs: Any) -> Any:
        """Run the model on rows in `len(experts)` equal groups; group i is for expert `experts[i]`."""
        with self.groups.of(experts):
            return self.model(**inputs, **kwargs)


def _on_meta(head: str, config: PreTrainedConfig, num_labels: int) -> PreTrainedModel:
    """The model with `num_labels` classes on the meta device, as a template of an expert's head."""
    resized = copy.deepcopy(config)
    resized.num_labels = num_labels
    with torch.device("meta"):
        return AUTO_CLASSES[head].from_config(resized, trust_remote_code=False)


@dataclass
class ExpertRun:
    """What experts give for N rows.

    Attributes:
        outputs: in the fused label space (N, C): probabilities, or scores for regression; zeros for a row whose logits
            are not finite, so that a broken expert counts as not queried.
        logits: the same, -inf for such a row, and for labels that the expert does not know; None if not wanted.
        embedding: (N, d); None if not wanted.
        shown: what the fuser reads of them, (N, R); None if not wanted.
        head: logits of their heads, before they are mapped to fused labels, (N, C_b); None if not wanted.
    """

    outputs: torch.Tensor
    logits: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    shown: torch.Tensor | None = None
    head: torch.Tensor | None = None

    def to(self, device: torch.device) -> ExpertRun:
        """The same on another device."""
        return ExpertRun(*(None if each is None else each.to(device) for each in self._tensors()))  # type: ignore[arg-type]

    def chunk(self, count: int) -> list[ExpertRun]:
        """Groups of rows of equal size."""
        groups = [[None] * count if each is None else each.chunk(count) for each in self._tensors()]
        return [ExpertRun(*group) for group in zip(*groups, strict=True)]

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.outputs, self.logits, self.embedding, self.shown, self.head


def embedding_of(
    states: Sequence[torch.Tensor], mask: torch.Tensor | None, depths: Sequence[float] | None, last: bool = False
) -> torch.Tensor:
    """Hidden states of all layers -> one vector per example, of the layers at some depths side by side.

    Args:
        states: of each layer, the embeddings' first.
        mask: (N, T), 1 for real tokens.
        depths: shares of the layers, 1.0 is the last one; None for that alone. A layer of another width than the last,
            as in pyramids, is replaced by the last.
        last: see `pool_states`.
    """
    chosen = [states[round(depth * (len(states) - 1))] for depth in depths or [1.0]]
    width = _width(states[-1])
    return torch.cat([pool_states(each if _width(each) == width else states[-1], mask, last) for each in chosen], 1)


def _width(states: torch.Tensor) -> int:
    return states.shape[1 if states.dim() == 4 else -1]


def repeat_rows(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """Repeat a batch for each expert, (B, ...) → (times · B, ...)."""
    if times == 1:
        return inputs
    return {k: v.repeat(times, *[1] * (v.dim() - 1)) if torch.is_tensor(v) else v for k, v in inputs.items()}


def take_rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Some rows of a batch."""
    return {k: v[rows] if torch.is_tensor(v) else v for k, v in inputs.items()}


def pool_states(states: torch.Tensor, mask: torch.Tensor | None, last: bool = False) -> torch.Tensor:
    """One vector per example: the last real token, or the mean over real tokens (N, T, d) or pixels (N, d, H, W)."""
    if states.dim() == 4:
        return states.flatten(2).mean(-1)
    if mask is None:
        return states[:, -1] if last else states.mean(1)
    if last:
        position = torch.arange(mask.shape[1], device=mask.device).mul(mask.bool()).argmax(1)
        return states[torch.arange(len(states), device=states.device), position]
    weight = mask.to(states.dtype)[..., None]  # (N, T, 1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
