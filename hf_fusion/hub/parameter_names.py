"""Maps tensor names in checkpoints to the parameter names that transformers' loader gives them.

Checkpoints of one class exist in several layouts: with and without the body's prefix, from before and after changes of
the class. The names are mapped by transformers' own tables, on a model on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, first_line
from hf_fusion.extras import MissingLibraryError, refuse_missing
from hf_fusion.hub.task_heads import architectures, model_class_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class MetaModel:
    """The model of a ``config.json`` on the meta device.

    Attributes:
        model: shared between calls, must not be changed; None if transformers cannot build it.
        config: its configuration; None without a model.
        why: the reason why no model was built, or "".
    """

    model: PreTrainedModel | None = None
    config: PreTrainedConfig | None = None
    why: str = ""

    @property
    def tied(self) -> dict[str, str]:
        """Tied parameters: name -> name of the parameter that it is tied to."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})


def build_meta_model(config: Mapping[str, Any], name: str, tensors: int) -> MetaModel:
    """Builds the model of a ``config.json`` on the meta device; cached by configuration.

    Args:
        config: content of the file.
        name: the model's name, for errors.
        tensors: number of tensors in the checkpoint, see `hf_fusion.hub.headers.native_config`.

    Raises:
        MissingLibraryError: a library that its class needs is not installed.
    """
    content = {key: value for key, value in config.items() if key != "_name_or_path"}
    try:
        return _build(json.dumps(content, sort_keys=True, default=str), tensors)
    except _NotBuiltError as error:
        if isinstance(error.cause, MissingLibraryError):
            raise MissingLibraryError(str(error).replace(_NAME, name), error.cause.hint) from error
        refuse_missing(error.cause, name)
        return MetaModel(why=str(error).replace(_NAME, name))


_NAME = "‹name›"  # placeholder for the name in cached errors


class _NotBuiltError(Exception):
    """No model can be built; the message says why."""

    def __init__(self, why: str, cause: Exception) -> None:
        super().__init__(why)
        self.cause = cause


@lru_cache(maxsize=16)
def _build(text: str, tensors: int) -> MetaModel:
    from hf_fusion.hub.headers import build_on_meta, native_config

    content = json.loads(text)
    try:
        config = native_config(content, _NAME, tensors)
        own = model_class(content, config)
        config = _config_for(own, config)
        return MetaModel(build_on_meta(lambda: own._from_config(config)), config)
    except FusionError as error:
        raise _NotBuiltError(error.message, error) from error
    except Exception as error:  # an untrusted config may fail in any way
        why = f"{_NAME}: the model cannot be built from config.json ({first_line(error)})"
        raise _NotBuiltError(why, error) from error


def model_class(content: Mapping[str, Any], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that loads a checkpoint: its architecture, or the class of the body if it names none.

    Raises:
        FusionError: transformers has no such class.
    """
    from transformers import AutoModel
    from transformers.models.auto.auto_factory import _get_model_class

    named = next(iter(architectures(dict(content))), None)
    if named is None:
        body: type[PreTrainedModel] = _get_model_class(config, AutoModel._model_mapping)
        return body
    own = model_class_of(named)
    if own is None:
        raise FusionError(f"transformers has no class {named}")
    return own


def _config_for(own: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration for a class: the whole, or a nested one (of CLIP, for its vision tower).

    Raises:
        FusionError: none matches the class.
    """
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    wanted = own.config_class or ()
    found = next((part for part in (config, *parts) if isinstance(part, wanted)), None)
    if found is None:
        raise FusionError(f"{own.__name__} is not a class of model_type {config.model_type}")
    return found


def loaded_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names in files -> names in the loaded model, as in `from_pretrained`.

    A tensor that the loader stacks into another (such as one expert's matrix of a mixture) keeps its name in the file,
    with the renamings of its layout.

    Args:
        model: of the checkpoint's class, on any device.
        names: of a checkpoint's tensors; names that the model does not have are mapped as well.
    """
    return {name: loaded for name, loaded, _ in _map_names(model, names)}


def filled_parameters(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Names in files -> the parameters and buffers that the loader fills from each; unused names are left out.

    Args:
        model: of the class that loads the checkpoint, on any device.
        names: of a checkpoint's tensors.
    """
    known = model.state_dict()
    return {
        name: filled
        for name, loaded, made in _map_names(model, names)
        if known.keys() >= set(filled := made or (loaded,))
    }


def _map_names(model: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields (name in the files, name in the loaded model, names of the stacked parameters it becomes part of)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    targets = {source: entry.target_patterns for entry in converters for source in entry.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    for name in sorted(names, key=dot_natural_key):  # in the loader's order, on which some renamings depend
        loaded, converted = rename_source_key(name, renamings, converters, prefix, known)
        if loaded not in known and name in known:
            loaded, converted = rename_source_key(name, [], [], prefix, known)
        if converted is None:
            yield name, loaded, ()
            continue
        made = tuple(loaded.replace(targets[converted][0], target) for target in targets[converted])
        bare, _ = rename_source_key(name, renamings, converters)
        part, _ = rename_source_key(name, renamings, [])
        loaded = part.removeprefix(f"{prefix}.") if len(loaded) < len(bare) else loaded.removesuffix(bare) + part
        yield name, loaded, made
