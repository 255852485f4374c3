"""How a fused model generates: as its base does, except for values that all experts share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig


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


__all__ = ["common_generation", "set_generation"]
