"""Generation of fused models: delegated to the backbone, with the options that all experts share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig


class GeneratingMixin:
    """Delegates the generation methods of transformers to `self.backbone`."""

    @property
    def generation_config(self: Any) -> Any:
        """The backbone's generation config, which `generate()` reads."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self: Any, value: Any) -> None:
        if "backbone" in self._modules:  # PreTrainedModel sets one before the backbone exists
            self.backbone.generation_config = value

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the backbone's."""
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self: Any, labels: torch.Tensor) -> torch.Tensor:
        """As the backbone's, for sequence-to-sequence models."""
        return self.backbone.prepare_decoder_input_ids_from_labels(labels=labels)

    def get_encoder(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """The backbone's encoder."""
        return self.backbone.get_encoder(*args, **kwargs)

    def get_decoder(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """The backbone's decoder."""
        return self.backbone.get_decoder(*args, **kwargs)


def common_generation(experts: Sequence[Any]) -> dict[str, Any]:
    """The generation options that all experts share; an adapter's generation config overrides that of its base."""
    values = []
    for expert in experts:
        if not expert.model.can_generate():
            return {}
        text = expert.model.generation_config.to_json_string(ignore_metadata=True, keys_to_pop=["compile_config"])
        values.append({**json.loads(text), **(getattr(expert, "generation", None) or {})})
    common = {name: value for name, value in values[0].items() if all(v.get(name) == value for v in values[1:])}
    known = GenerationConfig().to_dict()
    return {name: value for name, value in common.items() if name in known and name != "transformers_version"}


def set_generation(model: Any, values: Mapping[str, Any]) -> None:
    """Set values of a model's generation config without validation: they were valid when published."""
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    if values:
        model.generation_config._original_object_hash = hash(model.generation_config)


__all__ = ["GeneratingMixin", "common_generation", "set_generation"]
