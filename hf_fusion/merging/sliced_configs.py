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
_INDEX_ATTRIBUTES = re.compile(r"_?(layer_(idx|id|index|number)|idx|index|training)")


@dataclass(frozen=True)
class Layer:
    """The source of a merged layer.

    Attributes:
        model: the model that determines its shapes.
        config: the model's configuration, with derived values.
        index: index of the layer in that model.
        count: number of layers of that model.
    """

    model: Model
    config: Config
    index: int
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


def _is_sparse(config: Config, index: int, count: int) -> bool:
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    return index not in dense and bool(config.get("num_experts")) and (index + 1) % step == 0


def _sparse_candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
    yield {"decoder_sparse_step": 1, "mlp_only_layers": [index for index, sparse in enumerate(kinds) if not sparse]}


def _behind(key: str, often: str = "") -> LayerRule:
    """Layers from an index on, or every n-th of them, are sparse."""

    def kind(config: Config, index: int, count: int) -> bool:
        every = config.get(often) if often else 1
        return index >= config[key] and index % (every if type(every) is int and every > 0 else 1) == 0

    def candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
        yield {key: next((index for index, sparse in enumerate(kinds) if sparse), len(kinds))}

    return LayerRule((key,), kind, candidates, unless="mlp_layer_types")


def _every(period: str, offset: str = "") -> LayerRule:
    """Every n-th layer has another type."""

    def kind(config: Config, index: int, count: int) -> bool:
        return bool(index % config[period] == (config.get(offset) or 0))

    def candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
        for every in range(1, len(kinds) + 2):
            yield from ({period: every, **({offset: at} if offset else {})} for at in range(every if offset else 1))

    return LayerRule((period, *([offset] if offset else [])), kind, candidates, unless="layers_block_type")


def _ernie(config: Config, index: int, count: int) -> bool:
    end: int = config["moe_layer_end_index"]
    is_within: bool = config["moe_layer_start_index"] <= index <= (count - 1 if end == -1 else end)
    return is_within and bool((index + 1) % config["moe_layer_interval"] == 0)


def _ernie_candidates(kinds: Sequence[Any], config: Config) -> Iterator[dict[str, Any]]:
    sparse = [index for index, kind in enumerate(kinds) if kind]
    start, end = (sparse[0], sparse[-1]) if sparse else (len(kinds), len(kinds))
    for every in range(1, len(kinds) + 2):
        yield {"moe_layer_interval": every, "moe_layer_start_index": start, "moe_layer_end_index": end}


def _expanded(config: Config, index: int, count: int) -> Any:
    """GPT-Neo's attention: [[types, repetitions], …]."""
    return [kind for kinds, times in config["attention_types"] for _ in range(times) for kind in kinds][index]


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
        lambda config, index, count: config["block_types"][index % len(config["block_types"])],
        lambda kinds, config: iter([{"block_types": list(kinds)}]),
    ),
    LayerRule(("attention_types",), _expanded, lambda kinds, config: iter([{"attention_types": [[list(kinds), 1]]}])),
    LayerRule(  # GPT-2 divides by the layer's index
        ("scale_attn_by_inverse_layer_idx",),
        lambda config, index, count: index if config["scale_attn_by_inverse_layer_idx"] else None,
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
    configs = {id(model): _derived_config(model) for model in [first, *(model for model, _ in taken)]}
    layers = [Layer(model, configs[id(model)], index, layer_count(model)[1]) for model, index in taken]
    for layer in layers:
        if layer.index >= layer.count:
            raise FusionError(f"{layer.model.name}: layer {layer.index} is not one of its {layer.count} layers")
    first_config = configs[id(first)]
    _refuse_unlike(first, first_config, layers)
    changes: dict[str, Any] = {known: len(layers) for known in LAYER_KEYS if first.config.get(known) == count}
    changes |= (
        ({key: len(layers)} if key else {})
        | _lists(first_config, count, layers)
        | _index_lists(first_config, layers)
        | _outputs(first_config, count, layers)
    )
    changes |= _shared_keys(first_config, layers) | {key: 0 for key in _FURTHER if first_config.get(key)}
    for rule in RULES:
        if first_config.get(rule.keys[0]) is not None and not isinstance(changes.get(rule.unless), list):
            changes |= _ruled(rule, {**first_config, **changes}, layers)
    config = {k: v for k, v in first.config.items() if not any(k in _DERIVED.get(new, ()) for new in changes)}
    config |= changes
    _check(first, config, changes, layers)
    return config


def layer_count(model: Model) -> tuple[str, int]:
    """The key of a model's number of layers ("" if it is the length of a list), and the number.

    Raises:
        FusionError: the configuration does not have it.
    """
    stack_keys = [key for key, part in _STACK_KEYS.items() if any(part in name for name in model.entries)]
    for key in (*LAYER_KEYS, *stack_keys):
        if type(model.config.get(key)) is int:
            return key, model.config[key]
    for key in _COUNTED:
        if isinstance(model.config.get(key), list):
            return "", len(model.config[key])
    raise FusionError(f"{model.name}: config.json has no number of layers")


def _derived_config(model: Model) -> Config:
    """A configuration with the values that its class derives; unchanged if transformers does not know it."""
    config = _native(model.config)
    return dict(model.config) if config is None else {**model.config, **config.to_dict()}


def _native(config: Config) -> PreTrainedConfig | None:
    try:
        return native_config(copy.deepcopy(dict(config)), "the model", 1_000_000)  # classes change lists in place
    except FusionError:
        return None


def _lists(first_config: Config, count: int, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites lists with a value per layer, and mappings by layer index."""
    changes: dict[str, Any] = {}
    for key, value in first_config.items():
        if key in _INDICES or not isinstance(value, (list, tuple)) or len(value) != count or not _LISTS.fullmatch(key):
            continue
        lists = [layer.value(key) for layer in layers]
        for layer, values in zip(layers, lists, strict=True):
            if not isinstance(values, (list, tuple)) or len(values) != layer.count:
                raise FusionError(
                    f"{layer.model.name}: its configuration has no {key} with a value per layer, as the first model's"
                )
        changes[key] = [values[layer.index] for layer, values in zip(layers, lists, strict=True)]
    if "kv_source_layers" in changes:  # layers whose keys and values a layer uses
        sources = enumerate(changes["kv_source_layers"])
        changes["kv_source_layers"] = [_source(layers, j, source) for j, source in sources]
    if isinstance(first_config.get("per_layer_config"), Mapping):
        rows = [{str(k): v for k, v in layer.value("per_layer_config").items()} for layer in layers]
        pairs = enumerate(zip(layers, rows, strict=True))
        changes["per_layer_config"] = {str(j): r[str(x.index)] for j, (x, r) in pairs if str(x.index) in r}
    return changes


def _source(layers: Sequence[Layer], user: int, source: int) -> int:
    """The new index of the layer whose keys and values another layer uses."""
    layer = layers[user]
    for index in range(user, -1, -1):
        if layers[index].model is layer.model and layers[index].index == source:
            return index
    raise FusionError(
        f"layer {layer.index} of {layer.model.name} uses keys and values of its layer {source}, which no slice has"
        " before it (kv_source_layers)",
        "add both layers to the slices",
    )


def _index_lists(first_config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites lists of layer indices."""
    return {
        key: [j for j, layer in enumerate(layers) if layer.index in _positive(layer.value(key), layer.count)]
        for key in _INDICES
        if isinstance(first_config.get(key), (list, tuple))
    }


def _positive(indices: Sequence[Any], count: int) -> set[int]:
    return {index % count if index < 0 else index for index in indices if type(index) is int}


def _outputs(first_config: Config, count: int, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites the output indices of a backbone; output names are derived from them."""
    changes: dict[str, Any] = {}
    for key in _OUTPUTS:
        if isinstance(first_config.get(key), (list, tuple)):
            changes[key] = [_output(key, output % (count + 1), count, layers) for output in first_config[key]]
    if changes:
        changes |= {key: None for key in _OUTPUT_NAMES[:2] if first_config.get(key) is not None}
    return changes


def _output(key: str, output: int, count: int, layers: Sequence[Layer]) -> int:
    """The new index of an output: 0 is the input of the first layer, i + 1 the output of layer i."""
    if output in (0, count):
        return 0 if not output else len(layers)
    for index in range(len(layers) - 1, -1, -1):
        if layers[index].index == output - 1:
            return index + 1
    raise FusionError(f"{key} needs the output of layer {output - 1}, which no slice has", "add the layer to a slice")


def _shared_keys(first_config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Rewrites Gemma's number of last layers that use keys and values of the last layers of their types before them."""
    key = "num_kv_shared_layers"
    if not first_config.get(key):
        return {}
    shared = [layer.index >= layer.count - layer.value(key) for layer in layers]
    tail = next((tail for tail, is_shared in enumerate(reversed(shared)) if not is_shared), len(layers))
    first = len(layers) - tail
    for index, layer in enumerate(layers):
        if shared[index] != (index >= first):
            raise FusionError(
                f"layer {layer.index} of {layer.model.name} uses keys and values of a layer before it, which {key}"
                " allows only for the last layers",
                "put all such layers together, at the end",
            )
        if shared[index]:
            types = layer.value("layer_types")
            unshared = layer.count - layer.value(key)
            source = max((n for n in range(unshared) if types[n] == types[layer.index]), default=None)
            same_type = [x for x in layers[:first] if x.value("layer_types")[x.index] == types[layer.index]]
            if source is None or not same_type or (same_type[-1].model, same_type[-1].index) != (layer.model, source):
                raise FusionError(
                    f"layer {layer.index} of {layer.model.name} uses keys and values of its layer {source}, which"
                    f" would not be the last {types[layer.index]} before the shared ones ({key})",
                    f"let the layers before them end with layer {source}",
                )
    return {key: tail}


def _ruled(rule: LayerRule, config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """Values of a rule's keys with which every layer keeps its type."""
    for layer in layers:
        layer.value(rule.keys[0])
    kinds = [rule.kind(layer.config, layer.index, layer.count) for layer in layers]
    for candidate in (dict[str, Any](), *rule.candidates(kinds, config)):
        settings = {**config, **candidate}
        try:
            if [rule.kind(settings, index, len(layers)) for index in range(len(layers))] == kinds:
                return {key: settings[key] for key in rule.keys if key in settings}
        except (IndexError, ZeroDivisionError, TypeError):  # such as a list that is too short
            continue
    raise FusionError(
        f"{' and '.join(rule.keys)} cannot describe layers of these types: {shown(kinds)}",
        "keep the layers of each type in the model's order and at its intervals",
    )


def _refuse_unlike(first: Model, first_config: Config, layers: Sequence[Layer]) -> None:
    """Raises if models differ in settings that are common to all layers."""
    for layer in {id(layer.model): layer for layer in layers}.values():
        for key in sorted(first_config.keys() | layer.config.keys()):
            value, other = first_config.get(key), layer.config.get(key)
            if _SHARED.fullmatch(key) and value != other and not isinstance(other, (list, tuple)):
                raise FusionError(
                    f"{key} is {shown(value)} in {first.name} and {shown(other)} in {layer.model.name}, but applies to"
                    " all layers",
                    f"use slices of models with the same {key}",
                )


# ---------------------------------------------------------------- comparison of built models


def _check(first: Model, config: Config, changes: Config, layers: Sequence[Layer]) -> None:
    """Builds the models without weights, and compares each merged layer with its source."""
    merged = _native(config)
    if merged is None:
        if _native(first.config) is not None:
            native_config(config, "the slices", 1_000_000)  # raises with the reason
        return
    derived = merged.to_dict()
    for key, value in changes.items():
        if (
            key in derived
            and isinstance(value, list)
            and isinstance(derived[key], (list, tuple))
            and [*derived[key]] != value
        ):
            raise FusionError(f"{key} would be {shown(value)}, but transformers makes it {shown(derived[key])}", _ORDER)
    built = _built(config, len(layers))
    if built is None:
        return
    sources = {id(layer.model): _built(layer.model.config, layer.count) for layer in layers}
    if id(first) in sources and (source := sources[id(first)]) is not None:
        for name, shape in source.others.items():
            if built.others.get(name, shape) != shape:
                raise FusionError(
                    f"{name} is {list(shape)} in {first.name}, and {list(built.others[name])} with {len(layers)}"
                    " layers: it has a part per layer, which slices do not include",
                    "merge whole models instead",
                )
    for index, layer in enumerate(layers):
        source = sources[id(layer.model)]
        if source is None:
            continue
        before, after = _traits(source.layers[layer.index], layer.config), _traits(built.layers[index], derived)
        is_same = layer.model.config.get("model_type") == config.get("model_type")
        if difference := _difference(before, after, is_same):
            path, old, new = difference
            raise FusionError(
                f"layer {index} of the merged model would not be layer {layer.index} of {layer.model.name}: {path} is"
                f" {shown(old)} there, and would be {shown(new)}",
                _ORDER,
            )


_ORDER = "choose slices in which the layers of each type keep their order and intervals"


@dataclass(frozen=True)
class _Built:
    """A model without weights: its layers, and the shapes of its other parameters."""

    layers: nn.ModuleList
    others: Mapping[str, tuple[int, ...]]


def _built(config: Config, count: int) -> _Built | None:
    """Builds the model of a configuration; None if transformers cannot."""
    import torch

    from hf_fusion.hub.task_heads import architectures, model_class_of

    model_class = model_class_of(next(iter(architectures(dict(config))), None))
    native = _native(config)
    if model_class is None or native is None:
        return None
    try:
        model = build_on_meta(lambda: model_class._from_config(native))
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
            is_trait = not name.startswith("_") and not _INDEX_ATTRIBUTES.fullmatch(name) and name not in _OF_ALL
            if is_trait and _is_plain(value) and not (isinstance(value, list) and value == config.get(name)):
                traits[f"{path}.{name}".lstrip(".")] = value
    return traits


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], is_same: bool) -> tuple[str, Any, Any] | None:
    """The first trait in which two layers differ; for different model types, only among common names."""
    names = {**before, **after} if is_same else [name for name in before if name in after and "." in name]
    for name in names:
        if before.get(name) != after.get(name) and (is_same or not isinstance(before[name], str)):
            return name, before.get(name), after.get(name)
    return None
