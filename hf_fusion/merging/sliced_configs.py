"""Configurations of models made of slices, in which every layer keeps its type.

Configurations describe layers in four ways, each of which is rewritten for the selected layers: lists with a value per
layer (``layer_types``), which transformers' config classes also derive from patterns; lists of layer indices
(``cross_attention_layers``); rules by index (``first_k_dense_replace``), which are kept, adapted, or raise an error;
and settings common to all layers (rotary embeddings), which must agree between the models. Finally the models are built
without weights, and each layer is compared with the one that it is made of.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.hub.headers import build_on_meta, native_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from hf_fusion.merging.engine.open_models import Model

Config = Mapping[str, Any]

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_STACK_KEYS = {"decoder_layers": "decoder.", "encoder_layers": "encoder."}  # for models with only one of these stacks
_COUNTED = ("layers_block_type", "layer_types")  # lists whose length is the number of layers
# lists with a value per layer; others may have that length by chance (eos_token_id)
_LISTS = re.compile(
    r".*layer.*|layers_block_type|indexer_types|activation_sparsity_pattern|attn_type_list|attention_window|ffn_multipliers"
    r"|(moe_)?intermediate_size|num_(local_|routed_)?experts|moe_topk|num_experts_per_tok|swiglu_limits(_shared)?"
    r"|num_(attention|query|key_value|kv)_heads|sliding_windows?|head_dim"
)
# lists of layer indices
_INDICES = (
    *("mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices", "rope_scaling_layers"),
    *("local_layer_ids", "ple_layer_ids", "full_attn_idxs", "global_attn_indexes", "fullatt_block_indexes"),
    *("window_block_indices", "residual_block_indices", "subsample_layers", "global_attention_blocks", "dense_layers"),
    "hybrid_layer_ids",
)
# indices of layers whose outputs are returned; 0 is the input of the first
_OUTPUTS = ("out_indices", "_out_indices")
_OUTPUT_NAMES = ("out_features", "_out_features", "stage_names")
# list with a value per layer -> rules that it replaces, and that would contradict it
_DERIVED = {
    "layer_types": (
        *("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval"),
        *("layer_group_size", "max_window_layers", "hybrid_override_pattern", "full_attn_idxs", "local_layer_ids"),
        "attn_type_list",
    ),
    "layers_block_type": ("attn_layer_period", "attn_layer_offset", "hybrid_override_pattern"),
    "mlp_layer_types": ("first_k_dense_replace", "dense_mlp_idx"),
    "no_rope_layers": ("no_rope_layer_interval",),
    "moe_layers": ("interleave_moe_layer_step",),
}
# layers after the last that predict further tokens; not part of slices
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")
# settings of all layers that affect their results
_SHARED = re.compile(
    r"rope_.*|partial_rotary_factor|sliding_window(_size)?|attention_chunk_size|position_embedding_type"
)
_OF_ALL = {name for names in _DERIVED.values() for name in names}
# attributes with the index of a layer, which may change
_NUMBERS = re.compile(r"_?(layer_(idx|id|index|number)|idx|index|training)")


@dataclass(frozen=True)
class Layer:
    """The source of a merged layer.

    Attributes:
        model: the model that determines its shapes.
        config: the model's configuration, with derived values.
        number: index of the layer in that model.
        count: number of layers of that model.
    """

    model: Model
    config: Config
    number: int
    count: int

    def value(self, key: str) -> Any:
        """A value of the model's configuration; raises if it is missing."""
        if self.config.get(key) is None:
            raise FusionError(f"{self.model.name}: its configuration has no {key}, which the first model's has")
        return self.config[key]


@dataclass(frozen=True)
class LayerRule:
    """A rule of configurations that determines the type of a layer by its index.

    Attributes:
        keys: of the configuration; the rule applies if the first one is set.
        kind: (configuration, index, number of layers) -> type of the layer.
        candidates: (types of all layers, configuration) -> candidate values of `keys`; the first that fits is used.
        unless: key of a list with a value per layer, which overrides the rule.
    """

    keys: tuple[str, ...]
    kind: Callable[[Config, int, int], Any]
    candidates: Callable[[Sequence[Any], Config], Iterator[dict[str, Any]]]
    unless: str = ""


def _is_sparse(config: Config, number: int, count: int) -> bool:
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    return number not in dense and bool(config.get("num_experts")) and (number + 1) % step == 0


def _sparse_candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
    yield {"decoder_sparse_step": 1, "mlp_only_layers": [number for number, sparse in enumerate(kinds) if not sparse]}


def _behind(key: str, often: str = "") -> LayerRule:
    """Layers from an index on, or every n-th of them, are sparse."""

    def kind(config: Config, number: int, count: int) -> bool:
        every = config.get(often) if often else 1
        return number >= config[key] and number % (every if type(every) is int and every > 0 else 1) == 0

    def candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
        yield {key: next((number for number, sparse in enumerate(kinds) if sparse), len(kinds))}

    return LayerRule((key,), kind, candidates, unless="mlp_layer_types")


def _every(period: str, offset: str = "") -> LayerRule:
    """Every n-th layer has another type."""

    def kind(config: Config, number: int, count: int) -> bool:
        return bool(number % config[period] == (config.get(offset) or 0))

    def candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
        for every in range(1, len(kinds) + 2):
            yield from ({period: every, **({offset: at} if offset else {})} for at in range(every if offset else 1))

    return LayerRule((period, *([offset] if offset else [])), kind, candidates, unless="layers_block_type")


def _ernie(config: Config, number: int, count: int) -> bool:
    end: int = config["moe_layer_end_index"]
    is_within: bool = config["moe_layer_start_index"] <= number <= (count - 1 if end == -1 else end)
    return is_within and bool((number + 1) % config["moe_layer_interval"] == 0)


def _ernie_candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
    sparse = [number for number, kind in enumerate(kinds) if kind]
    start, end = (sparse[0], sparse[-1]) if sparse else (len(kinds), len(kinds))
    for every in range(1, len(kinds) + 2):
        yield {"moe_layer_interval": every, "moe_layer_start_index": start, "moe_layer_end_index": end}


def _expanded(config: Config, number: int, count: int) -> Any:
    """GPT-Neo's attention: [[types, repetitions], …]."""
    return [kind for kinds, times in config["attention_types"] for _ in range(times) for kind in kinds][number]


RULES = (
    LayerRule(("mlp_only_layers", "decoder_sparse_step"), _is_sparse, _sparse_candidates),
    _behind("first_k_dense_replace", "moe_layer_freq"),
    _behind("num_dense_layers"),
    _every("attn_layer_period", "attn_layer_offset"),
    _every("expert_layer_period", "expert_layer_offset"),
    _every("cross_attention_frequency"),
    LayerRule(("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"), _ernie, _ernie_candidates),
    LayerRule(
        ("block_types",),
        lambda config, number, count: config["block_types"][number % len(config["block_types"])],
        lambda kinds, config: iter([{"block_types": list(kinds)}]),
    ),
    LayerRule(("attention_types",), _expanded, lambda kinds, config: iter([{"attention_types": [[list(kinds), 1]]}])),
    LayerRule(  # GPT-2 divides by the layer's index
        ("scale_attn_by_inverse_layer_idx",),
        lambda config, number, count: number if config["scale_attn_by_inverse_layer_idx"] else None,
        lambda kinds, config: iter(()),
    ),
)


def slice_config(first: Model, taken: Sequence[tuple[Model, int]]) -> dict[str, Any]:
    """The configuration for layers of several models, in which each layer keeps its type.

    Args:
        first: provides the other values.
        taken: of each merged layer, the source model and index.

    Raises:
        FusionError: a key cannot describe the layers.
    """
    key, count = layer_count(first)
    meant = {id(model): _meaning(model) for model in [first, *(model for model, _ in taken)]}
    layers = [Layer(model, meant[id(model)], number, layer_count(model)[1]) for model, number in taken]
    for layer in layers:
        if layer.number >= layer.count:
            raise FusionError(f"{layer.model.name}: layer {layer.number} is not one of its {layer.count} layers")
    own = meant[id(first)]
    _refuse_unlike(first, own, layers)
    said: dict[str, Any] = {known: len(layers) for known in LAYER_KEYS if first.config.get(known) == count}
    said |= (
        ({key: len(layers)} if key else {})
        | _lists(own, count, layers)
        | _numbers(own, layers)
        | _outputs(own, count, layers)
    )
    said |= _shared_keys(own, layers) | {key: 0 for key in _FURTHER if own.get(key)}
    for rule in RULES:
        if own.get(rule.keys[0]) is not None and not isinstance(said.get(rule.unless), list):
            said |= _ruled(rule, {**own, **said}, layers)
    config = {k: v for k, v in first.config.items() if not any(k in _DERIVED.get(new, ()) for new in said)}
    config |= said
    _check(first, config, said, layers)
    return config


def layer_count(model: Model) -> tuple[str, int]:
    """The key of a model's number of layers ("" if it is the length of a list), and the number.

    Raises:
        FusionError: the configuration does not have it.
    """
    own = [key for key, part in _STACK_KEYS.items() if any(part in name for name in model.entries)]
    for key in (*LAYER_KEYS, *own):
        if type(model.config.get(key)) is int:
            return key, model.config[key]
    for key in _COUNTED:
        if isinstance(model.config.get(key), list):
            return "", len(model.config[key])
    raise FusionError(f"{model.name}: config.json does not tell its number of layers")


def _meaning(model: Model) -> Config:
    """A configuration with the values that its class derives; unchanged if transformers does not know it."""
    config = _native(model.config)
    return dict(model.config) if config is None else {**model.config, **config.to_dict()}


def _native(config: Config) -> PreTrainedConfig | None:
    try:
        return native_config(copy.deepcopy(dict(config)), "the model", 1_000_000)  # classes change lists in place
    except FusionError:
        return None


def _lists(own: Config, count: int, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites lists with a value per layer, and mappings by layer index."""
    found: dict[str, Any] = {}
    for key, value in own.items():
        if key in _INDICES or not isinstance(value, (list, tuple)) or len(value) != count or not _LISTS.fullmatch(key):
            continue
        theirs = [layer.value(key) for layer in layers]
        for layer, values in zip(layers, theirs, strict=True):
            if not isinstance(values, (list, tuple)) or len(values) != layer.count:
                raise FusionError(
                    f"{layer.model.name}: its configuration has no {key} of each of its layers, the first model's has"
                )
        found[key] = [values[layer.number] for layer, values in zip(layers, theirs, strict=True)]
    if "kv_source_layers" in found:  # whose keys and values a layer takes
        found["kv_source_layers"] = [_source(layers, j, source) for j, source in enumerate(found["kv_source_layers"])]
    if isinstance(own.get("per_layer_config"), Mapping):
        rows = [{str(k): v for k, v in layer.value("per_layer_config").items()} for layer in layers]
        numbered = enumerate(zip(layers, rows, strict=True))
        found["per_layer_config"] = {str(j): r[str(x.number)] for j, (x, r) in numbered if str(x.number) in r}
    return found


def _source(layers: Sequence[Layer], own: int, source: int) -> int:
    """The new index of the layer whose keys and values another layer uses."""
    layer = layers[own]
    for number in range(own, -1, -1):
        if layers[number].model is layer.model and layers[number].number == source:
            return number
    raise FusionError(
        f"layer {layer.number} of {layer.model.name} takes keys and values of its layer {source}, which no slice has"
        " before it (kv_source_layers)",
        "take both",
    )


def _numbers(own: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites lists of layer indices."""
    return {
        key: [j for j, layer in enumerate(layers) if layer.number in _positive(layer.value(key), layer.count)]
        for key in _INDICES
        if isinstance(own.get(key), (list, tuple))
    }


def _positive(numbers: Sequence[Any], count: int) -> set[int]:
    return {number % count if number < 0 else number for number in numbers if type(number) is int}


def _outputs(own: Config, count: int, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites the output indices of a backbone; output names are derived from them."""
    found: dict[str, Any] = {}
    for key in _OUTPUTS:
        if isinstance(own.get(key), (list, tuple)):
            found[key] = [_output(key, place % (count + 1), count, layers) for place in own[key]]
    if found:
        found |= {key: None for key in _OUTPUT_NAMES[:2] if own.get(key) is not None}
    return found


def _output(key: str, place: int, count: int, layers: Sequence[Layer]) -> int:
    if place in (0, count):
        return 0 if not place else len(layers)
    for number in range(len(layers) - 1, -1, -1):
        if layers[number].number == place - 1:
            return number + 1
    raise FusionError(f"{key} takes what comes behind layer {place - 1}, which no slice has", "take it too")


def _shared_keys(own: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites Gemma's number of last layers that use keys and values of the last layers of their types before them."""
    key = "num_kv_shared_layers"
    if not own.get(key):
        return {}
    shared = [layer.number >= layer.count - layer.value(key) for layer in layers]
    tail = next((tail for tail, is_own in enumerate(reversed(shared)) if not is_own), len(layers))
    first = len(layers) - tail
    for number, layer in enumerate(layers):
        if shared[number] != (number >= first):
            raise FusionError(
                f"layer {layer.number} of {layer.model.name} takes keys and values of one before it, which {key} can"
                " only say of the last layers",
                "take all such layers together, at the end",
            )
        if shared[number]:
            types = layer.value("layer_types")
            theirs = layer.count - layer.value(key)
            source = max((n for n in range(theirs) if types[n] == types[layer.number]), default=None)
            mine = [x for x in layers[:first] if x.value("layer_types")[x.number] == types[layer.number]]
            if source is None or not mine or (mine[-1].model, mine[-1].number) != (layer.model, source):
                raise FusionError(
                    f"layer {layer.number} of {layer.model.name} takes keys and values of its layer {source}, which"
                    f" would not be the last {types[layer.number]} before the shared ones ({key})",
                    f"let the layers before them end with layer {source}",
                )
    return {key: tail}


def _ruled(rule: LayerRule, config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Values of a rule's keys with which every layer keeps its type."""
    for layer in layers:
        layer.value(rule.keys[0])
    kinds = [rule.kind(layer.config, layer.number, layer.count) for layer in layers]
    for candidate in (dict[str, Any](), *rule.candidates(kinds, config)):
        settings = {**config, **candidate}
        try:
            if [rule.kind(settings, number, len(layers)) for number in range(len(layers))] == kinds:
                return {key: settings[key] for key in rule.keys if key in settings}
        except (IndexError, ZeroDivisionError, TypeError):  # a list too short, say
            continue
    raise FusionError(
        f"the layers' kinds by number, {shown(kinds)}, cannot be said by {' and '.join(rule.keys)}",
        "take the layers of each kind in the order and the steps that they have in the model",
    )


def _refuse_unlike(first: Model, own: Config, layers: Sequence[Layer]) -> None:
    """Raises if models differ in settings that are common to all layers."""
    for layer in {id(layer.model): layer for layer in layers}.values():
        for key in sorted(own.keys() | layer.config.keys()):
            mine, theirs = own.get(key), layer.config.get(key)
            if _SHARED.fullmatch(key) and mine != theirs and not isinstance(theirs, (list, tuple)):
                raise FusionError(
                    f"{key} is {shown(mine)} in {first.name} and {shown(theirs)} in {layer.model.name}: one"
                    " configuration cannot say both",
                    "take slices of models that have it in common",
                )


# ---------------------------------------------------------------- comparison of built models


def _check(first: Model, config: Config, said: Config, layers: Sequence[Layer]) -> None:
    """Builds the models without weights, and compares each merged layer with its source."""
    merged = _native(config)
    if merged is None:
        if _native(first.config) is not None:
            native_config(config, "the slices", 1_000_000)  # says why not
        return
    derived = merged.to_dict()
    for key, value in said.items():
        if (
            key in derived
            and isinstance(value, list)
            and isinstance(derived[key], (list, tuple))
            and [*derived[key]] != value
        ):
            raise FusionError(f"{key} would be {shown(value)}, and transformers makes it {shown(derived[key])}", _ORDER)
    built = _built(config, len(layers))
    if built is None:
        return
    givers = {id(layer.model): _built(layer.model.config, layer.count) for layer in layers}
    if id(first) in givers and (own := givers[id(first)]) is not None:
        for name, shape in own.others.items():
            if built.others.get(name, shape) != shape:
                raise FusionError(
                    f"{name} is {list(shape)} in {first.name}, and {list(built.others[name])} with {len(layers)}"
                    " layers: it has a part for each layer, which no slice takes",
                    "merge whole models instead",
                )
    for number, layer in enumerate(layers):
        giver = givers[id(layer.model)]
        if giver is None:
            continue
        was, becomes = _traits(giver.layers[layer.number], layer.config), _traits(built.layers[number], derived)
        is_same = layer.model.config.get("model_type") == config.get("model_type")
        if found := _difference(was, becomes, is_same):
            path, old, new = found
            raise FusionError(
                f"layer {number} of the merged model would not be layer {layer.number} of {layer.model.name}: {path} is"
                f" {shown(old)} there, and would be {shown(new)}",
                _ORDER,
            )


_ORDER = "take slices by which each layer keeps its place among those of its kind"


@dataclass(frozen=True)
class _Built:
    """A model without weights: its layers, and the shapes of its other parameters."""

    layers: nn.ModuleList
    others: Mapping[str, tuple[int, ...]]


def _built(config: Config, count: int) -> _Built | None:
    """Builds the model of a configuration; None if transformers cannot."""
    import torch

    from hf_fusion.hub.task_heads import architectures, model_class_of

    own = model_class_of(next(iter(architectures(dict(config))), None))
    native = _native(config)
    if own is None or native is None:
        return None
    try:
        model = build_on_meta(lambda: own._from_config(native))
    except Exception:  # reported when the merged model is checked
        return None
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            named = model.named_parameters()
            return _Built(module, {name: tuple(p.shape) for name, p in named if not name.startswith(f"{path}.")})
    return None


def _traits(layer: nn.Module, config: Config) -> dict[str, Any]:
    """Classes, shapes and plain attributes of a layer's modules.

    Without its index, and without values for all layers that some modules keep.
    """
    traits: dict[str, Any] = {}
    for path, module in layer.named_modules():
        traits[path or "its class"] = type(module).__name__
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            traits[f"the shape of {name}"] = list(parameter.shape)
        for name, value in vars(module).items():
            is_own = not name.startswith("_") and not _NUMBERS.fullmatch(name) and name not in _OF_ALL
            if is_own and _is_plain(value) and not (isinstance(value, list) and value == config.get(name)):
                traits[f"{path}.{name}".lstrip(".")] = value
    return traits


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _difference(was: Mapping[str, Any], becomes: Mapping[str, Any], is_same: bool) -> tuple[str, Any, Any] | None:
    """The first trait in which two layers differ; for different model types, only among common names."""
    names = {**was, **becomes} if is_same else [name for name in was if name in becomes and "." in name]
    for name in names:
        if was.get(name) != becomes.get(name) and (is_same or not isinstance(was[name], str)):
            return name, was.get(name), becomes.get(name)
    return None
