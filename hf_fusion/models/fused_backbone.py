"""For families with one backbone: its embeddings, resizing and gradient checkpointing, under transformers' names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .fused_config import BackboneConfig
from .fused_heads import AUTO_CLASSES


class BackboneMixin:
    """Delegates embeddings to `self.backbone`, and keeps `self.config.backbone` up to date with their size.

    A family overrides `_check_resizable` if some embeddings cannot be resized, and `_checkpoint_function` so that a
    recomputed layer finds the state of the call that first computed it.
    """

    supports_gradient_checkpointing = True

    @property
    def experts(self: Any) -> list[str]:
        """Names of the experts, in order; they also name the experts' tasks."""
        return [expert["name"] for expert in self.config.experts]

    def get_input_embeddings(self: Any) -> nn.Module:
        """The backbone's input embeddings.

        Raises:
            NotImplementedError: it has several, or none that transformers knows.
        """
        try:
            return self.backbone.get_input_embeddings()
        except NotImplementedError as error:
            children = [
                name for name, child in self.backbone.named_children() if hasattr(child, "get_input_embeddings")
            ]
            calls = [f"model.backbone.{name}.get_input_embeddings()" for name in children]
            raise NotImplementedError(
                f"{type(self).__name__}.get_input_embeddings: {type(self.backbone).__name__} has several or none: "
                f"use {' or '.join(calls) or 'its modules'}"
            ) from error

    def set_input_embeddings(self: Any, value: nn.Module) -> None:
        """Replace the backbone's embeddings."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self: Any) -> nn.Module | None:
        """The backbone's output embeddings; None if it has none."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self: Any, value: nn.Module) -> None:
        """Replace the backbone's embeddings."""
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers; experts and routers do not change, since hidden states keep their width.

        Raises:
            ValueError: the model has no token embeddings, or the family cannot resize them.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        name, embeddings, head = type(self).__name__, self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise ValueError(f"{name} reads {self.main_input_name}: it has no token embeddings to resize")
        self._check_resizable(head)
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.backbone = with_vocabulary(self.config.backbone, self.backbone.config)
        return embeddings

    def _check_resizable(self, head: nn.Module | None) -> None:
        """Raises ValueError if the output embeddings `head`, or those in a referenced base, cannot be resized."""

    def _checkpoint_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that checkpoints layers, from the one that the caller passed."""
        return function

    def _set_gradient_checkpointing(
        self: Any, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, self._checkpoint_function(gradient_checkpointing_func), **kwargs)
        if enable and self.main_input_name != "input_ids":  # transformers does this for token inputs only
            self.enable_input_require_grads()
            if (
                getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
                and not self._require_grads_hooks
            ):
                raise ValueError(
                    f"{type(self).__name__}: no input of its layers requires a gradient, so their parameters would get "
                    "none: pass gradient_checkpointing_kwargs={'use_reentrant': False}"
                )


def new_backbone(config: BackboneConfig) -> PreTrainedModel:
    """The backbone of a config, without loaded weights; custom code that the config names does not run."""
    model: PreTrainedModel = AUTO_CLASSES[config.head].from_config(config.backbone_config(), trust_remote_code=False)
    return model


def with_arguments_of(backbone: Any, model: Any) -> Any:
    """A model's forward whose signature has the backbone's arguments before its own keyword arguments.

    The Trainer drops columns of a data set that are not in `inspect.signature`.
    """
    parameter_kinds = inspect.Parameter
    signature = inspect.signature(backbone.forward).parameters
    shown = {name: parameter.replace(annotation=parameter_kinds.empty) for name, parameter in signature.items()}
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter_kinds.KEYWORD_ONLY and parameter.name not in ("labels", *shown):
            shown[parameter.name] = parameter.replace(annotation=parameter_kinds.empty)
    forward: Any = partial(type(model).forward, model)  # unlike a closure, it is copied with the model
    forward.__signature__ = inspect.Signature(sorted(shown.values(), key=lambda parameter: parameter.kind))
    return forward


def with_vocabulary(stored: dict[str, Any], config: Any) -> dict[str, Any]:
    """A stored config with the vocabulary size of the model's current config."""
    text = config.get_text_config()
    size = {text.attribute_map.get("vocab_size", "vocab_size"): text.vocab_size}
    attribute = next((name for name, value in vars(config).items() if value is text), None)
    return {**stored, **(size if attribute is None else {attribute: {**stored[attribute], **size}})}


__all__ = ["BackboneMixin", "new_backbone", "with_arguments_of"]
