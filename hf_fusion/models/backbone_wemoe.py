"""Embeddings, their size and activation checkpoints, by the names of transformers: the dense model has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .linears_wemoe import UpscaledLinear
from .recomputing_wemoe import remember


class BackboneMixin:
    """Embeddings are those of `self.backbone`, `self.config.backbone` follows them."""

    supports_gradient_checkpointing = True

    def get_input_embeddings(self: Any) -> nn.Module:
        """The dense model's.

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
        """Replaces the dense model's."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self: Any) -> nn.Module | None:
        """The dense model's; None where it has none."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self: Any, value: nn.Module) -> None:
        """Replaces the dense model's."""
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As the dense model's: what is up-scaled reads and writes hidden states, which keep their width.

        Raises:
            ValueError: for a model without tokens, and where the output of tokens is up-scaled.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        name, embeddings, head = type(self).__name__, self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise ValueError(f"{name} reads {self.main_input_name}: it has no token embeddings to resize")
        if isinstance(head, UpscaledLinear):
            raise ValueError(f"{name}: the output of tokens is up-scaled; resize base and experts before fusing")
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.backbone = with_vocabulary(self.config.backbone, self.backbone.config)
        return embeddings

    def _set_gradient_checkpointing(
        self: Any, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        remember(self.backbone.modules(), self.shared.calls)
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


def with_vocabulary(stored: dict[str, Any], config: Any) -> dict[str, Any]:
    """A config as it is stored, with the vocabulary's size of the config that a model has now."""
    text = config.get_text_config()
    size = {text.attribute_map.get("vocab_size", "vocab_size"): text.vocab_size}
    part = next((name for name, value in vars(config).items() if value is text), None)
    return {**stored, **(size if part is None else {part: {**stored[part], **size}})}


__all__ = ["BackboneMixin"]
