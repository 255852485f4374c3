"""Embeddings, their size and activation checkpoints, by the names of transformers: the base has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .routing_phatgoose import RoutedHead
from .state_phatgoose import Routing, RoutingCalls


class BackboneMixin:
    """Embeddings are those of `self.backbone`, `self.config.backbone` follows them."""

    supports_gradient_checkpointing = True

    def get_input_embeddings(self: Any) -> nn.Module:
        """The base's.

        Raises:
            NotImplementedError: where it has several, or none that transformers knows.
        """
        try:
            return self.backbone.get_input_embeddings()
        except NotImplementedError as error:
            parts = [name for name, part in self.backbone.named_children() if hasattr(part, "get_input_embeddings")]
            ways = [f"model.backbone.{name}.get_input_embeddings()" for name in parts]
            raise NotImplementedError(
                f"{type(self).__name__}.get_input_embeddings: {type(self.backbone).__name__} has several or none: "
                f"use {' or '.join(ways) or 'its modules'}"
            ) from error

    def set_input_embeddings(self: Any, value: nn.Module) -> None:
        """Replaces the base's."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self: Any) -> nn.Module | None:
        """The base's; None where it has none."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self: Any, value: nn.Module) -> None:
        """Replaces the base's."""
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As the base's: experts read and write hidden states, which keep their width.

        Raises:
            ValueError: for a base that is fetched, one without tokens, and experts that bring the output's weights.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        name, embeddings, head = type(self).__name__, self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise ValueError(f"{name} reads {self.main_input_name}: it has no token embeddings to resize")
        if isinstance(head, RoutedHead) or hasattr(head, "experts"):
            raise ValueError(f"{name}: its experts adapt the output of tokens; resize base and experts before fusing")
        if self.config.base_by_reference:
            raise ValueError(
                f"{name} fetches its base from {self.config.base['id']}, where it keeps its size: "
                "set model.config.base_by_reference = False, so that the base is saved too, and resize then"
            )
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.backbone = with_vocabulary(self.config.backbone, self.backbone.config)
        return embeddings

    def _set_gradient_checkpointing(
        self: Any, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        func = partial(_remembering, self.calls, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, func, **kwargs)
        if enable and self.main_input_name != "input_ids":  # transformers does it for tokens alone
            self.enable_input_require_grads()
            if (
                getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
                and not self._require_grads_hooks
            ):
                raise ValueError(
                    f"{type(self).__name__}: no input of its layers wants a gradient, so their parameters would get "
                    "none: pass gradient_checkpointing_kwargs={'use_reentrant': False}"
                )


def with_arguments_of(base: Any, model: Any) -> Any:
    """A model's forward that shows the base's arguments: the Trainer drops columns that no argument is called."""
    forward: Any = partial(type(model).forward, model)  # copied with the model, as a closure would not be
    empty = inspect.Parameter.empty
    shown = inspect.signature(base.forward).parameters.values()
    forward.__signature__ = inspect.Signature([parameter.replace(annotation=empty) for parameter in shown])
    return forward


def with_vocabulary(stored: dict[str, Any], config: Any) -> dict[str, Any]:
    """A config as it is stored, with the vocabulary's size of the config that a model has now."""
    text = config.get_text_config()
    size = {text.attribute_map.get("vocab_size", "vocab_size"): text.vocab_size}
    part = next((name for name, value in vars(config).items() if value is text), None)
    return {**stored, **(size if part is None else {part: {**stored[part], **size}})}


class _Layer:
    """A layer's function, which finds the routing of its first call whenever, and in whatever thread, it is called."""

    def __init__(self, calls: RoutingCalls, function: Callable[..., Any]) -> None:
        self.calls, self.function = calls, function
        self.then: Routing | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.then is None:
            self.then = self.calls.routing().again()
            return self.function(*args, **kwargs)
        with self.calls.entered(self.then):
            return self.function(*args, **kwargs)


def _remembering(
    calls: RoutingCalls, func: Callable[..., Any], function: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    return func(_Layer(calls, function), *args, **kw)


__all__ = ["BackboneMixin", "with_arguments_of"]
