"""Heads of several tasks in one model: one head with its classes per expert."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from .fused_calls import Calls


class TaskHeads(nn.Module):
    """One head per expert in place of a classifier's head; the active one is applied.

    Args:
        head: the dense model's head.
        classes: number of classes of each expert, or None for each where the module does not give the logits.
        calls: of the model, whose state may name another `task` than the active one for a call.
    """

    def __init__(self, head: nn.Module, classes: Sequence[int | None], calls: Calls | None = None) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) if count is None else _resized(head, count) for count in classes)
        self.active = 0
        self.calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the head of the call's task, or the active one."""
        call = None if self.calls is None else self.calls.current()
        return self.heads[self.active if call is None or call.task is None else call.task](*args, **kwargs)

    @torch.no_grad()
    def fill(self, index: int, tensors: dict[str, torch.Tensor], name: str) -> None:
        """Copy an expert's head, from tensors by their names within the head.

        Raises:
            ValueError: tensors do not fit.
        """
        state = self.heads[index].state_dict()
        for key, target in state.items():
            if key not in tensors or tensors[key].shape != target.shape:
                found = list(tensors[key].shape) if key in tensors else "missing"
                raise ValueError(f"{name}: {key} of its head is {found}, not {list(target.shape)}")
            if not tensors[key].isfinite().all():
                raise ValueError(f"{name} has NaN or Inf in {key} of its head")
            target.copy_(tensors[key])


def install_heads(model: Any, paths: Sequence[str], classes: Sequence[int], calls: Calls | None = None) -> None:
    """Replace a model's head by `TaskHeads`.

    Args:
        model: the dense model.
        paths: modules with one copy per expert; the last one returns the logits.
        classes: number of classes of each expert.
        calls: see `TaskHeads`.
    """
    for path in paths:
        counts = list(classes) if path == paths[-1] else [None] * len(classes)
        model.set_submodule(path, TaskHeads(model.get_submodule(path), counts, calls))


def fill_heads(
    model: Any, paths: Sequence[str], tensors: Sequence[dict[str, torch.Tensor]], names: Sequence[str]
) -> None:
    """Copy every expert's heads, from tensors by their names in the dense model."""
    for path in paths:
        for index, (state, name) in enumerate(zip(tensors, names, strict=True)):
            inside = {k.removeprefix(f"{path}."): t for k, t in state.items() if k.startswith(f"{path}.")}
            model.get_submodule(path).fill(index, inside, name)


def activate_heads(model: Any, paths: Sequence[str], index: int) -> None:
    """Set the expert whose heads are applied in calls without a task."""
    for path in paths:
        model.get_submodule(path).active = index


def with_classes(model: Any, labels: Sequence[str]) -> Any:
    """A view of a classifier with other classes, for the loss of one call; all modules are shared.

    A loss also writes into the config which one it is (`problem_type`), and tasks differ in it.
    """
    alike = object.__new__(type(model))  # copy.copy cannot be compiled
    alike.__dict__.update(model.__dict__)
    alike.__dict__.pop("_compiled_call_impl", None)
    config = object.__new__(type(model.config))
    config.__dict__.update(model.config.__dict__)
    name_classes(config, labels)
    alike.config, alike.num_labels = config, len(labels)
    if "_old_forward" in alike.__dict__:  # accelerate put a function in its place, which calls the model's
        alike._old_forward = MethodType(model._old_forward.__func__, alike)
        alike.forward = partial(model.forward.func, alike)
    return alike


def name_classes(config: Any, labels: Sequence[str]) -> None:
    """Set the classes of a config, and their number."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}


def with_one_head(model: Any, paths: Sequence[str], index: int, labels: Sequence[str], memo: dict[int, Any]) -> Any:
    """A copy of a model with the heads and classes of one expert only.

    Args:
        model: with `TaskHeads`.
        paths: of them.
        index: of the expert.
        labels: of the expert.
        memo: replacements of further objects in the copy, by their id (`copy.deepcopy`).
    """
    for path in paths:
        heads = model.get_submodule(path)
        memo[id(heads)] = copy.deepcopy(heads.heads[index])
    alone = copy.deepcopy(model, memo)
    if paths:
        name_classes(alone.config, labels)
        alone.num_labels = len(labels)
    return alone


def _resized(head: nn.Module, classes: int) -> nn.Module:
    """A copy of a head with another number of outputs, of its last linear or classifying convolution."""
    copied = copy.deepcopy(head)
    if isinstance(conv := getattr(copied, "classifier", None), nn.Conv2d):  # of pixels
        like: dict[str, Any] = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        like |= {"kernel_size": conv.kernel_size, "bias": conv.bias is not None}
        copied.classifier = nn.Conv2d(conv.in_channels, classes, **like)
        return copied
    paths = [path for path, module in copied.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise ValueError(f"a head of {type(head).__name__} has no linear layer: pass heads='shared'")
    last: Any = copied.get_submodule(paths[-1]) if paths[-1] else copied
    like = {"dtype": last.weight.dtype, "device": last.weight.device}
    linear = nn.Linear(last.in_features, classes, bias=last.bias is not None, **like)
    if not paths[-1]:
        return linear
    copied.set_submodule(paths[-1], linear)
    return copied


__all__ = [
    "TaskHeads",
    "activate_heads",
    "fill_heads",
    "install_heads",
    "name_classes",
    "with_classes",
    "with_one_head",
]
