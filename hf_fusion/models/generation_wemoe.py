"""How a fused model generates: as its base does, except for values that all experts share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

NO_PAGES = (
    "merges weights for every sequence, but pages hold the tokens of several: call generate(), "
    "without cache_implementation='paged'"
)


class GeneratingMixin:
    """Generation by the names of transformers: `self.backbone` does it."""

    @property
    def generation_config(self: Any) -> Any:
        """The dense model's, which `generate()` reads."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self: Any, value: Any) -> None:
        if "backbone" in self._modules:  # PreTrainedModel sets one before there is a backbone
            self.backbone.generation_config = value

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the dense model's."""
        return self.backbone.prepare_inputs_for_generation(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self: Any, labels: torch.Tensor) -> torch.Tensor:
        """As the dense model's, for sequence-to-sequence models."""
        return self.backbone.prepare_decoder_input_ids_from_labels(labels=labels)

    def get_encoder(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """The dense model's encoder."""
        return self.backbone.get_encoder(*args, **kwargs)

    def get_decoder(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """The dense model's decoder."""
        return self.backbone.get_decoder(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused; raises ValueError."""
        raise ValueError(f"{type(self).__name__} {NO_PAGES}")


def common_generation(experts: Sequence[Any]) -> dict[str, Any]:
    """The generation options that all experts share; a file that an adapter brings overrides its base's config."""
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
    """Sets values of a model's generation config, as they were published."""
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    if values:
        model.generation_config._original_object_hash = hash(model.generation_config)


def check_generation(prompts: torch.Tensor | None, options: Sequence[Mapping[str, Any]]) -> None:
    """Refuses options of `generate()` with which prompts could not be read as wholes.

    Args:
        prompts: (B, T, ...).
        options: arguments of the call, and what generation configs add.

    Raises:
        ValueError: naming the option.
    """
    if any(each.get("prefill_chunk_size") for each in options):
        raise ValueError("a prompt read in chunks cannot be routed as a whole: leave prefill_chunk_size out")
    if any(each.get("cache_implementation") == "paged" for each in options):
        raise ValueError(f"this model {NO_PAGES}")
    scale = next((each["guidance_scale"] for each in options if each.get("guidance_scale") is not None), 1)
    if scale == 1:
        return
    if any(each.get("use_cache") is False for each in options):
        raise ValueError(
            "guidance_scale: without a cache nothing says where a negative prompt ends; set use_cache=True"
        )
    negative = options[0].get("negative_prompt_ids")
    if prompts is not None and negative is not None and negative.shape[1] > prompts.shape[1]:
        raise ValueError("negative_prompt_ids are longer than the prompts: pad these on the left to the same length")


__all__ = ["GeneratingMixin", "check_generation", "common_generation", "set_generation"]
