"""The merged model's ``config.json``: the first model's, with the merged dtype, layers and vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.sliced_configs import slice_config

if TYPE_CHECKING:
    from hf_fusion.merging.tokenizers.vocabulary import Vocabulary


def merge_config(
    model: Model,
    dtype: str | None,
    layers: Sequence[tuple[Model, int]] | None = None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """The configuration of a model, with the merged dtype, layers and vocabulary.

    Args:
        model: provides the other values.
        dtype: of the merged weights; None: unchanged.
        layers: of each merged layer, the source model and index; None: the model's layers.
        vocabulary: the merged one; None: the model's.

    Raises:
        FusionError: the configuration cannot describe the layers.
    """
    config = dict(model.config) if layers is None else slice_config(model, layers)
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if vocabulary is not None:
        found = find_vocabulary_config(config)
        config = vocabulary.update_ids(config, "config.json")
        if found is not None:
            config = _with_rows(config, found["vocab_size"], vocabulary.rows)
    return config


# keys of nested configurations of text models
_TEXT_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder", "generator")


def find_vocabulary_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration with ``vocab_size``: the whole, or that of a nested text model; None if there is none."""
    if type(config.get("vocab_size")) is int:
        return config
    parts = (config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict))
    return next((found for part in parts if (found := find_vocabulary_config(part)) is not None), None)


def _with_rows(config: dict[str, Any], before: int, rows: int) -> dict[str, Any]:
    """Replaces the vocabulary size wherever the configuration has the previous one."""
    return {
        key: _with_rows(value, before, rows)
        if isinstance(value, dict) and key in _TEXT_PARTS
        else rows
        if key in ("vocab_size", "vocab_size_per_layer_input") and value == before
        else value
        for key, value in config.items()
    }
