"""Do a checkpoint's tensors fill the model its config promises? Answered from headers alone, without any weights.

The tensors' names and shapes are given to transformers' own loader as tensors on the meta device, so every
renaming it does (old layouts, prefixes, tied weights) counts as it would when loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_fusion.errors import FusionError
from hf_fusion.extras import refuse_missing
from hf_fusion.files import own_file
from hf_fusion.hub.code import refuse_kernels
from hf_fusion.hub.files import Source, first_line, in_parallel
from hf_fusion.hub.heads import Head
from hf_fusion.hub.linearized import plain_names
from hf_fusion.hub.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]

# What configs have built by number, each a module or more: a promise of many takes memory before any weight is read.
# Other keys look alike and build nothing (max_window_layers, num_kv_shared_layers, num_beams), or are widths of
# tensors, which are compared with the checkpoint's (n_positions, n_words).
_LAYERS = re.compile(
    r"n_layers?|depths?|layers|[lrx]_layers|block_sizes|num_blocks"
    r"|(\w+_)?num_(hidden_|encoder_|decoder_)?layers|(\w+_)?(en|de)coder_layers"
)
_PARTS = re.compile(r"(\w+_)?(num|n)_(\w+_)?(experts|groups|heads|labels)")
_FEW_LAYERS = 1_000  # built in seconds, whatever a checkpoint holds: layers may share tensors (ALBERT)
_MOST_PARTS = 100_000  # no real model has more classes, heads or experts
# what of a configuration says nothing about shapes
_NAMES = ("_name_or_path", "transformers_version", "id2label", "label2id")


@dataclass(frozen=True)
class Account:
    """What became of a checkpoint's tensors.

    Attributes:
        model: the promised model on the meta device.
        missing: parameters that no tensor fills.
        unexpected: tensors that the model does not use.
        mismatched: one line per parameter whose tensor has another shape.
        sizes: of those parameters, by name: the tensor's shape, and the one that was promised.
    """

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: tuple[str, ...]
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


class Accounts:
    """What was found out about checkpoints during one call, each kind of checkpoint once.

    A thousand adapters of one base need one account of that base, and a thousand fine-tunes with the same configuration
    and the same shapes one between them. Failures are not kept: they name their expert.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, what: Hashable, config: Mapping[str, Any], shapes: Shapes, find: Callable[[], T]) -> T:
        """What `find` gives, from the first call with the same arguments.

        Args:
            what: what is found, beside the configuration and the shapes.
            config: content of ``config.json``; names of classes and of the checkpoint do not count.
            shapes: tensor name -> shape.
            find: finds it.
        """
        labels = config.get("id2label")
        classes = len(labels) if isinstance(labels, dict) else None
        sizes = {key: value for key, value in config.items() if key not in _NAMES}
        key = (what, json.dumps(sizes, sort_keys=True, default=str), classes, frozenset(shapes.items()))
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


def local_shapes(folder: Path, files: Iterable[str]) -> Shapes:
    """Tensor name → shape of safetensors files in a folder, which must be the folder's own."""
    from safetensors import safe_open

    shapes: Shapes = {}
    for file in files:
        own_file(folder / file, folder)
        with safe_open(folder / file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def hub_shapes(source: Source, files: Iterable[str]) -> Shapes:
    """Tensor name → shape of a repo's safetensors files, by reading their first bytes; L-LoRA's under PEFT's names."""
    shapes: Shapes = {}
    for header in in_parallel(source.header, files):
        shapes |= header.shapes
    return plain_names(shapes)[0]


def native_config(config: Mapping[str, Any], name: str, tensors: int) -> PretrainedConfig:
    """The config object of a model that transformers knows, after a look at its numbers.

    Args:
        config: content of ``config.json``.
        name: what errors call the expert.
        tensors: how many tensors the checkpoint holds; a deep model cannot have more layers.

    Raises:
        FusionError: for an unknown, quantized or absurdly large model, and for one that names kernels of another repo.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from hf_fusion.models.foe.own_code_foe import without_code

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise FusionError(f"{name}: transformers does not know model_type {model_type!r}.")
    if config.get("quantization_config"):
        raise FusionError(f"{name}: its weights are quantized.", hint="use the unquantized checkpoint")
    refuse_kernels(config, name)
    for key, value in _numbers(config):
        most = max(tensors, _FEW_LAYERS) if _LAYERS.fullmatch(key) else _MOST_PARTS
        if value > most:
            raise FusionError(f"{name}: config.json promises {key}={value}, the weights are {tensors} tensors.")
    try:
        return CONFIG_MAPPING[model_type].from_dict(without_code(dict(config)))
    except Exception as error:  # a stranger's config may fail in any way
        refuse_missing(error, name)
        raise FusionError(f"{name}: config.json is not valid ({first_line(error)}).") from error


def _numbers(config: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """How many modules of each kind a config and its nested configs have built; lists count stage by stage."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif _LAYERS.fullmatch(str(key)) or _PARTS.fullmatch(str(key)):
            yield from ((str(key), n) for n in (value if isinstance(value, list) else [value]) if isinstance(n, int))


def meta_model(config: PretrainedConfig, head: Head, name: str) -> Any:
    """The model of a config on the meta device: names and shapes, no memory.

    Raises:
        FusionError: naming the expert, if no such model can be built.
    """
    import torch

    try:
        with torch.device("meta"), quiet_transformers():
            return head.auto_class().from_config(config, trust_remote_code=False)
    except Exception as error:
        refuse_missing(error, name)
        raise FusionError(f"{name}: no {head.auto} can be built from config.json ({first_line(error)}).") from error


def account(config: PretrainedConfig, head: Head, shapes: Shapes, name: str) -> Account:
    """Load tensors of these names and shapes into the model of a config, without their values.

    Raises:
        FusionError: naming the expert, if no such model can be built.
    """
    return account_as(type(meta_model(config, head, name)), config, shapes)


def account_as(model_class: Any, config: PretrainedConfig, shapes: Shapes) -> Account:
    """Load tensors of these names and shapes into a model of a class, without their values."""
    import torch

    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with quiet_transformers():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    sizes = {key: (tuple(found), tuple(expected)) for key, found, expected in sorted(info["mismatched_keys"])}
    mismatched = tuple(f"{key} is {[*found]}, not {[*expected]}" for key, (found, expected) in sizes.items())
    return Account(model, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched, sizes)
