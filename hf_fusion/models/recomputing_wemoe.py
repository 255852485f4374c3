"""Gradient checkpointing: recomputed layers restore the state of the call that first computed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .fused_calls import Calls


class Remembering:
    """A checkpointing function that restores the state of the call when it recomputes a layer.

    Args:
        function: the original one: takes a layer's function and its arguments.
        calls: of the model; the state of a call has a method `for_recomputing`.
    """

    def __init__(self, function: Callable[..., Any], calls: Calls) -> None:
        self.function, self.calls = function, calls

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a layer."""
        return self.function(_Layer(layer, self.calls), *args, **kwargs)


class _Layer:
    """A layer's function with the state of its call, for recomputing it in the thread of the backward pass."""

    def __init__(self, function: Callable[..., Any], calls: Calls) -> None:
        self.function, self.calls = function, calls
        call = calls.current()
        self.remembered = None if call is None else call.for_recomputing()
        self.was_computed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.was_computed:
            self.was_computed = True
            return self.function(*args, **kwargs)
        before = self.calls.enter(self.remembered)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.calls.enter(before)


def remember(layers: Iterable[nn.Module], calls: Calls) -> None:
    """Make checkpointed layers remember their calls, if they do not yet."""
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            function: Any = layer._gradient_checkpointing_func
            if not isinstance(function, Remembering):
                layer._gradient_checkpointing_func = Remembering(function, calls)  # type: ignore[assignment]


def forget(model: nn.Module) -> None:
    """Undo `remember` for all layers of a model."""
    for layer in model.modules():
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(function, Remembering):
            layer._gradient_checkpointing_func = function.function  # type: ignore[assignment]


__all__ = ["Remembering", "forget", "remember"]
