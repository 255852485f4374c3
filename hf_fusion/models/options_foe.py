"""The experts' generation configs, the changes that a call of `generate` makes to them, and each expert's arguments.

A published FoE stores the experts' generation configs in its config, ``experts[k]["generation"]``, where they can be
edited for one expert. Changes to ``model.generation_config`` apply to every expert.
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
# Options that are token ids of one tokenizer.
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
PROMPT = ("input_ids", "attention_mask", "token_type_ids")  # what a processor returns for every expert
# Arguments of `generate` by position, after inputs and generation_config.
POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[3:-1]
OF_ONE_MODEL = ("past_key_values", "cache", "streamer", "mm_encoder_outputs")
NOT_BY_ROW = ("cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask")


class SharedGenerationConfig(GenerationConfig):
    """The values of the experts' generation configs, the first expert's where they differ.

    Only values that are changed later override the experts'.
    """

    _initial: dict[str, Any] = {}  # the values before any change

    def to_dict(self) -> dict[str, Any]:
        """The values, without the initial ones."""
        values = super().to_dict()
        values.pop("_initial", None)
        return values


def generation_values(model: Any, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of an expert's generation config, for storing.

    Args:
        model: the expert's model, or its base.
        overrides: an adapter's values, which override the base's.
    """
    text = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    values = {**json.loads(text), **(overrides or {})}
    # metadata, and names of methods, which an adapter's file may have
    no_options = {name for name in values if name in METADATA or hasattr(GenerationConfig, name)}
    return {name: value for name, value in values.items() if name not in no_options and value is not None}


def settings_of(config: FoEConfig, expert: int) -> GenerationConfig:
    """The generation config of an expert; if the FoE stores none, the one in its inner model's config."""
    values = config.experts[expert].get("generation")
    if values is None:
        return GenerationConfig.from_model_config(config.backbone_config(config.experts[expert]["backbone"]))
    settings = GenerationConfig()
    settings.update(defaults_only=True, allow_custom_entries=True, **values)
    return settings


def shared_config(config: FoEConfig, changed: GenerationConfig | None = None) -> SharedGenerationConfig:
    """The generation config of a FoE, with the changes that another one makes."""
    initial, shared = _initial(config), SharedGenerationConfig()
    changes = {name: value for name, value in changes_of(config, changed).items() if _is_common(config, name)}
    for name, value in {**initial, **changes}.items():
        setattr(shared, name, value)
    shared._initial = initial
    shared._original_object_hash = hash(shared)  # saved without validation: these values were valid for the experts
    return shared


def changes_of(config: FoEConfig, changed: GenerationConfig | None) -> dict[str, Any]:
    """The values of a generation config that override the experts'."""
    if changed is None:
        return {}
    if not isinstance(changed, SharedGenerationConfig):
        return _explicit(changed)
    values = {name: value for name, value in changed.to_dict().items() if name not in METADATA}
    return {name: value for name, value in values.items() if value != changed._initial.get(name)}


def _initial(config: FoEConfig) -> dict[str, Any]:
    """The values of the experts' generation configs that mean the same to all of them."""
    values: dict[str, Any] = {}
    for expert in reversed(range(config.num_experts)):
        row = config.experts[expert].get("generation")
        values |= row if row is not None else _explicit(settings_of(config, expert))
    return {name: value for name, value in values.items() if _is_common(config, name)}


def _explicit(settings: GenerationConfig) -> dict[str, Any]:
    """The values of a generation config that differ from the defaults."""
    default = GenerationConfig().to_dict()
    values = {name: value for name, value in settings.to_dict().items() if name not in METADATA}
    return {name: value for name, value in values.items() if value is not None and value != default.get(name)}


def _is_common(config: FoEConfig, name: str) -> bool:
    """Whether an option means the same to every expert; with several tokenizers, token ids do not."""
    return len(config.vocabularies or []) < 2 or name not in TOKENS


def check_tokens(config: FoEConfig, changes: Mapping[str, Any]) -> None:
    """Checks that no option consists of token ids if experts have different tokenizers.

    Raises:
        ValueError: naming the option.
    """
    for name in changes:
        if not _is_common(config, name):
            raise ValueError(
                f"{name} consists of token ids, but the experts have different tokenizers: set it for each expert, in "
                f"model.config.experts[k]['generation'][{name!r}]"
            )


class Arguments:
    """The arguments of one call other than generation options.

    Args:
        batch: B.
        values: the arguments by name.

    Attributes:
        by_row: arguments with one entry per row, of which each expert gets its rows.
        shared: arguments that every expert gets unchanged.
        indivisible: names of shared arguments that only one expert can take.
    """

    def __init__(self, batch: int, values: Mapping[str, Any]) -> None:
        self.batch = batch
        self.by_row: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        self.indivisible: list[str] = []
        for name, value in values.items():
            if value is None:
                continue
            if self._is_by_row(name, value):
                self.by_row[name] = value
            else:
                self.shared[name] = value
                many = torch.is_tensor(value) and value.dim() and value.shape[0] != 1 and name not in NOT_BY_ROW
                if many or name in OF_ONE_MODEL:
                    self.indivisible.append(name)

    def _is_by_row(self, name: str, value: Any) -> bool:
        if name == "encoder_outputs":
            return True
        if not torch.is_tensor(value) or not value.dim() or name in NOT_BY_ROW:
            return False
        return value.shape[_row_axis(name, value)] == self.batch

    def take(self, rows: torch.Tensor) -> dict[str, Any]:
        """The arguments with one entry per row, for some rows."""
        if len(rows) == self.batch:
            return dict(self.by_row)
        return {name: _take(name, value, rows) for name, value in self.by_row.items()}


def _row_axis(name: str, value: torch.Tensor) -> int:
    return int(name == "position_ids" and value.dim() == 3)  # (3, B, T): time, height and width


def _take(name: str, value: Any, rows: torch.Tensor) -> Any:
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
