"""Models with one backbone: its embeddings, their size and its activation checkpoints, by the names of transformers."""

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
    """Embeddings are those of `self.backbone`, `self.config.backbone` follows them.

    A family says in `_check_resizable` which embeddings cannot be resized, and in `_checkpoint_function` how a layer
    that is computed again finds the call that it was first computed in.
    """

    supports_gradient_checkpointing = True

    @property
    def experts(self: Any) -> list[str]:
        """Names of the experts, in order; where each has a task, that is the task's name too."""
        return [expert["name"] for expert in self.config.experts]

    def get_input_embeddings(self: Any) -> nn.Module:
        """The backbone's.

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
        """Replaces the backbone's."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self: Any) -> nn.Module | None:
        """The backbone's; None where it has none."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self: Any, value: nn.Module) -> None:
        """Replaces the backbone's."""
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As the backbone's: what the family adds reads and writes hidden states, which keep their width.

        Raises:
            ValueError: for a model without tokens, and where the family cannot follow.
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
        """Raises ValueError where the output embeddings `head`, or what the model is saved with, keep their size."""

    def _checkpoint_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function by which layers are checkpointed, given the one that was asked for."""
        return function

    def _set_gradient_checkpointing(
        self: Any, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, self._checkpoint_function(gradient_checkpointing_func), **kwargs)
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


def new_backbone(config: BackboneConfig) -> PreTrainedModel:
    """The backbone that a config describes, without its weights; code that it names does not run."""
    model: PreTrainedModel = AUTO_CLASSES[config.head].from_config(config.backbone_config(), trust_remote_code=False)
    return model


def with_arguments_of(backbone: Any, model: Any) -> Any:
    """A model's forward that shows the backbone's arguments before its own keywords.

    The Trainer drops columns of a data set that `inspect.signature` does not name.
    """
    kinds = inspect.Parameter
    signature = inspect.signature(backbone.forward).parameters
    shown = {name: parameter.replace(annotation=kinds.empty) for name, parameter in signature.items()}
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is kinds.KEYWORD_ONLY and parameter.name not in ("labels", *shown):
            shown[parameter.name] = parameter.replace(annotation=kinds.empty)
    forward: Any = partial(type(model).forward, model)  # copied with the model, as a closure would not be
    forward.__signature__ = inspect.Signature(sorted(shown.values(), key=lambda parameter: parameter.kind))
    return forward


def with_vocabulary(stored: dict[str, Any], config: Any) -> dict[str, Any]:
    """A config as it is stored, with the vocabulary's size of the config that a model has now."""
    text = config.get_text_config()
    size = {text.attribute_map.get("vocab_size", "vocab_size"): text.vocab_size}
    part = next((name for name, value in vars(config).items() if value is text), None)
    return {**stored, **(size if part is None else {part: {**stored[part], **size}})}


__all__ = ["BackboneMixin", "new_backbone", "with_arguments_of"]
