"""Checks from safetensors headers whether a checkpoint loads into the model of its config, without reading weights.

The names and shapes are passed to transformers' loader as tensors on the meta device, so that its renamings (old
layouts, prefixes, tied weights) apply as in loading.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_fusion.errors import FusionError, first_line, shown
from hf_fusion.extras import refuse_missing
from hf_fusion.hub.build_limits import TooMuchError, build_within_limits
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.linearized import plain_names
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.remote_code import refuse_kernels
from hf_fusion.hub.remote_files import refuse_long
from hf_fusion.hub.silence import quiet_transformers
from hf_fusion.hub.task_heads import Head
from hf_fusion.io.files import open_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]

# Keys that are numbers of modules: large values take memory before any weight is read. Similar keys build nothing
# (max_window_layers, num_kv_shared_layers, num_beams), or are sizes of tensors, which are compared with the
# checkpoint's (n_positions, n_words).
_LAYERS = re.compile(
    r"n_layers?|depths?|layers|[lrx]_layers|block_sizes|num_blocks"
    r"|(\w+_)?num_(hidden_|encoder_|decoder_)?layers|(\w+_)?(en|de)coder_layers"
)
_PARTS = re.compile(r"(\w+_)?(num|n)_(\w+_)?(experts|groups|heads|labels)")
_FEW_LAYERS = 500  # always allowed, since layers may share tensors (ALBERT); built in seconds
_MOST_PARTS = 100_000  # no real model has more classes, heads or experts
_MOST = 1 << 24  # nor a larger size, vocabulary or context; a list of that length takes about 500 MB
_UNBOUNDED = re.compile(r"(\w+_)?(theta|seed|ids?)")  # numbers that do not affect sizes
_MOST_BUFFERS = 200_000_000  # bytes of computed tables, unless the checkpoint is larger
# keys of a configuration that do not affect shapes
_NAMES = ("_name_or_path", "transformers_version", "id2label", "label2id")


@dataclass(frozen=True)
class KeyReport:
    """How a checkpoint's tensors match the model's parameters.

    Attributes:
        missing: parameters without a tensor.
        unexpected: tensors that the model does not use.
        mismatched: one line per parameter whose tensor has another shape.
        sizes: name of such a parameter -> (shape of the tensor, shape in the model).
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: tuple[str, ...]
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadReport(KeyReport):
    """A `KeyReport` with the model.

    Attributes:
        model: on the meta device.
    """

    model: PreTrainedModel


class LoadReportCache:
    """Caches results for checkpoints with the same configuration and shapes, within one call.

    A thousand adapters of one base need one load report of that base, and a thousand fine-tunes with the same
    configuration and shapes share one. Errors are not cached, since they name their expert.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def get(self, what: Hashable, config: Mapping[str, Any], shapes: Shapes, find: Callable[[], T]) -> T:
        """The result of ``find()``, cached by the other arguments.

        Args:
            what: further key of the cache.
            config: content of ``config.json``; label names and the checkpoint's name are not part of the key.
            shapes: tensor name -> shape.
            find: computes the result.
        """
        labels = config.get("id2label")
        classes = len(labels) if isinstance(labels, dict) else None
        sizes = {key: value for key, value in config.items() if key not in _NAMES}
        key = (what, json.dumps(sizes, sort_keys=True, default=str), classes, frozenset(shapes.items()))
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found


def local_shapes(folder: Path, files: Iterable[str]) -> Shapes:
    """Tensor name → shape of safetensors files in a folder; links out of the folder are refused."""
    from safetensors import safe_open

    shapes: Shapes = {}
    for file in files:
        with open_file(folder / file, folder) as start:
            length, size = int.from_bytes(start.read(8), "little"), os.fstat(start.fileno()).st_size
        refuse_long(length, size, str(folder / file))
        with safe_open(folder / file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def hub_shapes(source: Source, files: Iterable[str]) -> Shapes:
    """Tensor name → shape of a repo's safetensors files, from their headers; an L-LoRA's by PEFT's names."""
    shapes: Shapes = {}
    for header in in_parallel(source.header, files):
        shapes |= header.shapes
    return plain_names(shapes)[0]


def native_config(config: Mapping[str, Any], name: str, tensors: int) -> PreTrainedConfig:
    """The config object of a model class of transformers, with its numbers checked.

    Args:
        config: content of ``config.json``.
        name: the expert's name, for errors.
        tensors: number of tensors in the checkpoint; a deep model cannot have more layers.

    Raises:
        FusionError: the model is unknown, quantized or implausibly large, or selects kernels of another repo.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise FusionError(
            f"{name}: transformers does not know model_type {shown(model_type)}",
            hint="if the model is newer than your transformers: pip install -U transformers",
        )
    if config.get("quantization_config"):
        raise FusionError(f"{name}: its weights are quantized", hint="use the unquantized checkpoint")
    known = checked_config(config, name, tensors)
    assert known is not None  # the model type was checked above
    return known


def checked_config(config: Mapping[str, Any], name: str, tensors: int = _MOST_PARTS) -> PreTrainedConfig | None:
    """The config object, built within limits; None for a model type that transformers does not know.

    Args:
        config: content of ``config.json``, which tokenizers read as well.
        name: the model's name, for errors.
        tensors: number of tensors in the checkpoint, if known.

    Raises:
        FusionError: it is not valid, selects kernels of another repo, or has implausible numbers.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from hf_fusion.models.fused_custom_code import without_code

    refuse_kernels(config, name)
    try:
        config_class: type[PreTrainedConfig] | None = CONFIG_MAPPING[str(config.get("model_type"))]
    except KeyError:
        config_class = None
    known = {*signature(config_class).parameters, *config_class.attribute_map} if config_class else set()
    for top, content in config.items():
        for key, value in _numbers(top, content):
            if abs(value) > _most(key, tensors, is_known=top in known):
                what = f"config.json has {key}={shown(value)}, implausible for {tensors:,} tensors"
                raise FusionError(f"{name}: {what}")
    if config_class is None:
        return None
    try:
        return build_within_limits(lambda: config_class.from_dict(without_code(dict(config))))
    except Exception as error:  # an untrusted config may fail in any way
        refuse_missing(error, name)
        raise FusionError(f"{name}: config.json is not valid ({first_line(error)})") from error


def _numbers(key: str, value: object) -> Iterator[tuple[str, int]]:
    """The integers in a value of a config with their keys, including those of nested configs and lists."""
    if isinstance(value, Mapping):
        for inner, own in value.items():
            yield from _numbers(str(inner), own)
    elif isinstance(value, list):
        for own in value:
            yield from _numbers(key, own)
    elif isinstance(value, int) and not _UNBOUNDED.fullmatch(key):
        yield key, value


def _most(key: str, tensors: int, *, is_known: bool) -> float:
    """The largest plausible number for a key; unlimited for keys that the config class does not know."""
    if _LAYERS.fullmatch(key):
        return max(min(tensors, _MOST_PARTS), _FEW_LAYERS)
    if _PARTS.fullmatch(key):
        return _MOST_PARTS
    return _MOST if is_known else math.inf


def build_on_meta(build: Callable[[], T]) -> T:
    """Returns ``build()``, called on the meta device and within limits.

    Raises:
        TooMuchError: it takes more time or memory than any real model.
    """
    import torch

    def built() -> T:
        with torch.device("meta"):
            return build()

    with quiet_transformers():
        return build_within_limits(built)


def check_load(config: PreTrainedConfig, head: Head, shapes: Shapes, name: str) -> LoadReport:
    """Checks how tensors of these names and shapes load into the model of a config with a head.

    Raises:
        FusionError: no such model can be built; names the expert.
    """
    try:
        return check_load_as(*_class_of(config, head), shapes)
    except Exception as error:
        refuse_missing(error, name)
        raise FusionError(f"{name}: no {head.auto} can be built from config.json ({first_line(error)})") from error


def _class_of(config: PreTrainedConfig, head: Head) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that a head's Auto class builds, and its config: the whole config, or that of the text model.

    Raises:
        ValueError: transformers has no such class.
    """
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = head.auto_class()._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"{config.model_type} has no such class")
    own = _get_model_class(config, mapping)
    text = config.sub_configs.get("text_config")
    return own, config.get_text_config() if text is not None and own.config_class == text else config


def check_load_as(model_class: type[PreTrainedModel], config: PreTrainedConfig, shapes: Shapes) -> LoadReport:
    """Checks how tensors of these names and shapes load into a model of a class.

    Raises:
        TooMuchError: it takes more time or memory than any real model.
    """
    import torch

    def load() -> Any:
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        return _weightless(model_class).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    with quiet_transformers():
        model, info = build_within_limits(load)
    model.__class__ = model_class
    _refuse_buffers(model, sum(math.prod(shape) for shape in shapes.values()))
    sizes = {key: (tuple(found), tuple(expected)) for key, found, expected in sorted(info["mismatched_keys"])}
    mismatched = tuple(f"{key} is {[*found]}, not {[*expected]}" for key, (found, expected) in sizes.items())
    missing, unexpected = frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"])
    return LoadReport(missing, unexpected, mismatched, sizes, model=model)


def _refuse_buffers(model: PreTrainedModel, found: int) -> None:
    """Raises if non-persistent buffers, such as masks, are larger than the checkpoint."""
    taken = sum(buffer.numel() * buffer.element_size() for _, buffer in model.named_non_persistent_buffers())
    if taken > max(_MOST_BUFFERS, found):
        raise TooMuchError(f"tables of {taken / 1e6:,.0f} MB beside {found:,} stored parameters")


def _weightless(model_class: type[PreTrainedModel]) -> Any:
    """The class, with parameters without a tensor left on the meta device instead of initialised."""

    def skip(*_: object, **__: object) -> None:
        pass

    made = {"_move_missing_keys_from_meta_to_device": skip, "_initialize_missing_keys": skip}
    return type(model_class.__name__, (model_class,), {**made, "__module__": model_class.__module__})
