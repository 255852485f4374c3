"""The backbones of a FoE: their experts and inputs, embeddings under transformers' names, no gradient checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .assembly_foe import pack_config
from .experts_foe import AdaptedLinear, PerExpertModule


class BackbonesMixin:
    """Finds a backbone's experts and inputs, and delegates embeddings to the inner model if there is only one."""

    def _members(self: Any, backbone: int) -> list[int]:
        """Indices of the experts on a backbone, in its order."""
        return [index for index, expert in enumerate(self.config.experts) if expert["backbone"] == backbone]

    def _inputs_of(self: Any, backbone: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One backbone's inputs, without the suffix of its processor."""
        group = self.config.backbones[backbone]["inputs"]
        last = max(plan["inputs"] for plan in self.config.backbones)
        suffixes = {f"_{index}" for index in range(1, last + 1)}
        if group == 0:
            selected = {k: v for k, v in inputs.items() if not any(k.endswith(suffix) for suffix in suffixes)}
        else:
            selected = {k.removesuffix(f"_{group}"): v for k, v in inputs.items() if k.endswith(f"_{group}")}
        selected = {name: value for name, value in selected.items() if value is not None}
        if not selected:
            raise ValueError(
                f"{self.config.experts[self._members(backbone)[0]]['name']} got no inputs: prepare them with "
                "AutoProcessor.from_pretrained(id, trust_remote_code=True), which serves every expert"
            )
        return selected

    def _only_model(self: Any, what: str) -> Any:
        if len(self.backbones) > 1:
            raise NotImplementedError(
                f"{type(self).__name__}.{what} needs a single model, but there are {len(self.backbones)}, "
                f"each with its embeddings: use model.backbones[k].model.{what}"
            )
        return self.backbones[0].model

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings of the inner model; raises NotImplementedError if there are several."""
        return self._only_model("get_input_embeddings").get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces those of the inner model; raises NotImplementedError if there are several."""
        self._only_model("set_input_embeddings").set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output embeddings of the inner model, if it has any; raises NotImplementedError if there are several."""
        return self._only_model("get_output_embeddings").get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces those of the inner model; raises NotImplementedError if there are several."""
        self._only_model("set_output_embeddings").set_output_embeddings(value)

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resizes the embeddings of every inner model, if all use one tokenizer.

        Returns:
            The input embeddings of the first.

        Raises:
            ValueError: experts have different tokenizers, do not read tokens, or adapt the embeddings.
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
