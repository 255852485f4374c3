"""The merged model's ``config.json``: the first model's, where the merge changes nothing of what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_fusion.merging.layers import sliced_config
from hf_fusion.merging.sources import Model

if TYPE_CHECKING:
    from hf_fusion.merging.vocabulary import Vocabulary


def merged_config(
    model: Model,
    dtype: str | None,
    layers: Sequence[tuple[Model, int]] | None = None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """A configuration with the merged model's type, layers and vocabulary.

    Args:
        model: whose configuration it is otherwise.
        dtype: of the merged weights; None: as they are stored.
        layers: of each merged layer, the model and number that it comes from; None: the model's own.
        vocabulary: the merged one; None: the model's own.

    Raises:
        FusionError: the configuration cannot say what each of the layers is.
    """
    config = dict(model.config) if layers is None else sliced_config(model, layers)
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if vocabulary is not None:
        config = with_tokens(_with_rows(config, vocabulary.rows), vocabulary.number_of)
    return config


def vocabulary_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a configuration that tells ``vocab_size``: all of it, or that of its text model."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and type(part.get("vocab_size")) is int:
            return part
    return None


def with_tokens(config: dict[str, Any], token: Callable[[int], int | None]) -> dict[str, Any]:
    """A configuration whose special tokens (``eos_token_id`` and the like) have other numbers."""

    def renumbered(value: Any) -> Any:
        if isinstance(value, list):
            return [found for found in map(renumbered, value) if found is not None] or None
        return token(value) if type(value) is int and value >= 0 else value

    return {
        key: renumbered(value)
        if key.endswith(("_token_id", "_token_ids"))
        else with_tokens(value, token)
        if key == "text_config"
        else value
        for key, value in config.items()
    }


def _with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    if type(config.get("vocab_size")) is int:
        config = config | {"vocab_size": rows}
    if isinstance(config.get("text_config"), dict):
        config = config | {"text_config": _with_rows(config["text_config"], rows)}
    return config
