"""Each expert's generation config, what a call of `generate` changes in it, whose rows are whose.

A published FoE keeps the experts' generation configs in its config, ``experts[k]["generation"]``: there they can be
edited, for one expert alone. What is changed in ``model.generation_config`` holds for every expert.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from .configuration_foe import FoEConfig
from .experts_foe import take_rows

METADATA = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")
# Options that name tokens, by the ids of one tokenizer.
TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "force_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
)
PROMPT = ("input_ids", "attention_mask", "token_type_ids")  # what a processor gives to every expert
# Arguments of `generate` by position, after inputs and generation_config.
POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[3:-1]
OF_ONE_MODEL = ("past_key_values", "streamer", "mm_encoder_outputs")
NOT_BY_ROW = ("cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask")


class SharedGenerationConfig(GenerationConfig):
    """The values of the experts' generation configs, the first expert's where they differ.

    A value that was not changed overrides nothing: each expert keeps its own.
    """

    _shown: dict[str, Any] = {}  # the values at first

    def to_dict(self) -> dict[str, Any]:
        """The values; not which ones they were at first."""
        values = super().to_dict()
        values.pop("_shown", None)
        return values


def generation_values(model: Any, brought: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How an expert generates, as its generation config would be stored.

    Args:
        model: the expert's, or its base.
        brought: what an adapter brings along; it overrides the base's.
    """
    text = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    values = {**json.loads(text), **(brought or {})}
    unknown = {name for name in values if name in METADATA or hasattr(GenerationConfig, name)}  # a stranger's file
    return {name: value for name, value in values.items() if name not in unknown and value is not None}


def settings_of(config: FoEConfig, expert: int) -> GenerationConfig:
    """The generation config of an expert; of a FoE that was saved without them, what the inner model's config says."""
    values = config.experts[expert].get("generation")
    if values is None:
        return GenerationConfig.from_model_config(config.backbone_config(config.experts[expert]["backbone"]))
    settings = GenerationConfig()
    settings.update(defaults_only=True, allow_custom_entries=True, **values)
    return settings


def shared_config(config: FoEConfig, changed: GenerationConfig | None = None) -> SharedGenerationConfig:
    """The generation config that a FoE shows, with what another one changes in it."""
    shown, shared = _shown(config), SharedGenerationConfig()
    changes = {name: value for name, value in changes_of(config, changed).items() if _is_common(config, name)}
    for name, value in {**shown, **changes}.items():
        setattr(shared, name, value)
    shared._shown = shown
    shared._original_object_hash = hash(shared)  # published as the experts' are: what they say was valid for them
    return shared


def changes_of(config: FoEConfig, given: GenerationConfig | None) -> dict[str, Any]:
    """The values of a generation config that override the experts'."""
    if given is None:
        return {}
    if not isinstance(given, SharedGenerationConfig):
        return _explicit(given)
    values = {name: value for name, value in given.to_dict().items() if name not in METADATA}
    return {name: value for name, value in values.items() if value != given._shown.get(name)}


def _shown(config: FoEConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for expert in reversed(range(config.num_experts)):
        row = config.experts[expert].get("generation")
        values |= row if row is not None else _explicit(settings_of(config, expert))
    return {name: value for name, value in values.items() if _is_common(config, name)}


def _explicit(given: GenerationConfig) -> dict[str, Any]:
    """The values that a generation config sets."""
    default = GenerationConfig().to_dict()
    values = {name: value for name, value in given.to_dict().items() if name not in METADATA}
    return {name: value for name, value in values.items() if value is not None and value != default.get(name)}


def _is_common(config: FoEConfig, name: str) -> bool:
    """Whether an option means the same to every expert: with several tokenizers, those that name tokens do not."""
    return len(config.vocabularies or []) < 2 or name not in TOKENS


def check_tokens(config: FoEConfig, changes: Mapping[str, Any]) -> None:
    """Refuses options that name tokens where experts have different tokenizers.

    Raises:
        ValueError: naming the option.
    """
    for name in changes:
        if not _is_common(config, name):
            raise ValueError(
                f"{name} names tokens, but the experts have different tokenizers: set it for each expert, in "
                f"model.config.experts[k]['generation'][{name!r}]"
            )


class Arguments:
    """The arguments of one call that are no generation options: what is cut by rows, what every expert is given whole.

    Args:
        batch: B.
        given: by name.
    """

    def __init__(self, batch: int, given: Mapping[str, Any]) -> None:
        self.batch = batch
        self.rows: dict[str, Any] = {}
        self.whole: dict[str, Any] = {}
        self.alone: list[str] = []  # what cannot be cut
        for name, value in given.items():
            if value is None:
                continue
            if self._is_by_row(name, value):
                self.rows[name] = value
            else:
                self.whole[name] = value
                many = torch.is_tensor(value) and value.dim() and value.shape[0] != 1 and name not in NOT_BY_ROW
                if many or name in OF_ONE_MODEL:
                    self.alone.append(name)

    def _is_by_row(self, name: str, value: Any) -> bool:
        if name == "encoder_outputs":
            return True
        if not torch.is_tensor(value) or not value.dim() or name in NOT_BY_ROW:
            return False
        return value.shape[_row_axis(name, value)] == self.batch

    def take(self, rows: torch.Tensor) -> dict[str, Any]:
        """What is cut, of some rows; all of it as it is where these are all rows."""
        if len(rows) == self.batch:
            return dict(self.rows)
        return {name: _taken(name, value, rows) for name, value in self.rows.items()}


def _row_axis(name: str, value: torch.Tensor) -> int:
    return int(name == "position_ids" and value.dim() == 3)  # (3, B, T): time, height and width


def _taken(name: str, value: Any, rows: torch.Tensor) -> Any:
    if torch.is_tensor(value):
        return value.index_select(_row_axis(name, value), rows.to(value.device))
    parts = {key: _part(part, rows) for key, part in value.items()} if hasattr(value, "items") else None
    return type(value)(**parts) if parts is not None else type(value)(_part(part, rows) for part in value)


def _part(part: Any, rows: torch.Tensor) -> Any:
    """Rows of one output of an encoder: a tensor, or one for each layer."""
    return tuple(_part(each, rows) for each in part) if isinstance(part, tuple) else take_rows({"": part}, rows)[""]


__all__ = [
    "POSITIONAL",
    "PROMPT",
    "Arguments",
    "SharedGenerationConfig",
    "changes_of",
    "check_tokens",
    "generation_values",
    "settings_of",
    "shared_config",
]
