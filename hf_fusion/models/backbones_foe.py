"""For FoEs with several backbones: embeddings under transformers' names, and no gradient checkpointing."""

from __future__ import annotations

from typing import Any

from torch import nn

from .assembly_foe import pack_config
from .experts_foe import AdaptedLinear, PerExpertModule


class BackbonesMixin:
    """Delegates embeddings to the inner model if there is only one."""

    def _only_model(self: Any, what: str) -> Any:
        if len(self.backbones) > 1:
            raise NotImplementedError(
                f"{type(self).__name__}.{what} needs a single model, but there are {len(self.backbones)}, "
                f"each with its embeddings: use model.backbones[k].model.{what}"
            )
        return self.backbones[0].model

    def get_input_embeddings(self) -> nn.Module:
        """The inner model's.

        Raises:
            NotImplementedError: where there are several.
        """
        return self._only_model("get_input_embeddings").get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the inner model's; raises NotImplementedError where there are several."""
        self._only_model("set_input_embeddings").set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The inner model's, None where it has none; raises NotImplementedError where there are several."""
        return self._only_model("get_output_embeddings").get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the inner model's; raises NotImplementedError where there are several."""
        self._only_model("set_output_embeddings").set_output_embeddings(value)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resizes the embeddings of every inner model: they read one tokenizer.

        Returns:
            Those of the first.

        Raises:
            ValueError: where experts have different tokenizers, read no tokens, or bring embeddings of their own.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        name = type(self).__name__
        if len({plan["inputs"] for plan in self.config.backbones}) > 1:
            raise ValueError(f"{name}: its experts have different tokenizers; resize each of them before fusing")
        for backbone in self.backbones:
            ends = [backbone.model.get_input_embeddings(), backbone.model.get_output_embeddings()]
            if any(isinstance(end, AdaptedLinear | PerExpertModule) for end in ends):
                raise ValueError(f"{name}: its experts adapt embeddings; resize base and experts before fusing")
            if not isinstance(ends[0], nn.Embedding):
                raise ValueError(f"{name}: its experts read {backbone.model.main_input_name}, not tokens")
        for backbone, plan in zip(self.backbones, self.config.backbones, strict=True):
            backbone.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            plan["config"] = pack_config(backbone.model.config)
        embeddings = [backbone.model.get_input_embeddings() for backbone in self.backbones]
        if self.config.vocabularies:
            self.config.vocabularies = [max(each.num_embeddings for each in embeddings)]
            if self._processor is not None or self._source is not None:
                self.processor.vocabularies = list(self.config.vocabularies)
        return embeddings[0]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Not supported: the experts are frozen and keep no activations.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} trains its fuser alone; its experts are frozen and keep no activations that could "
            "be computed again: leave gradient checkpointing out"
        )


__all__ = ["BackbonesMixin"]
