"""How a fused model generates: as its base does, but for what all experts say alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig


def agreed_generation(experts: Sequence[Any]) -> dict[str, Any]:
    """What all experts say alike of how to generate: an adapter's own file goes before its base's generation config."""
    values = []
    for expert in experts:
        if not expert.model.can_generate():
            return {}
        text = expert.model.generation_config.to_json_string(ignore_metadata=True, keys_to_pop=["compile_config"])
        values.append({**json.loads(text), **(getattr(expert, "generation", None) or {})})
    agreed = {name: value for name, value in values[0].items() if all(own.get(name) == value for own in values[1:])}
    known = GenerationConfig().to_dict()
    return {name: value for name, value in agreed.items() if name in known and name != "transformers_version"}


def say_generation(model: Any, values: Mapping[str, Any]) -> None:
    """Sets values of a model's generation config, as they were published."""
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    if values:
        model.generation_config._original_object_hash = hash(model.generation_config)


__all__ = ["agreed_generation", "say_generation"]
