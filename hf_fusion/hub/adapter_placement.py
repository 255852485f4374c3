"""Matches an adapter's module paths with a base: with a loaded model, and with a checkpoint's files.

An adapter names modules by their paths at training time: in an older transformers, under a head, or in a tower of a
larger model. They are matched as transformers' loader matches the tensors of a checkpoint, see `loaded_names`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.hub.lora import linear_sizes, trained_class
from hf_fusion.hub.parameter_names import build_meta_model, filled_parameters, loaded_names
from hf_fusion.hub.task_heads import HEADS, architectures, head_of_adapter, head_of_architecture
from hf_fusion.types import Adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Sizes = Mapping[str, tuple[int, int]]


def match_parameters(
    lora: Sizes, saved: Collection[str], base: torch.nn.Module, model_class: str = "", stored: Collection[str] = ()
) -> dict[str, str]:
    """Maps an adapter's parameter names to those of a base, which may be on the meta device.

    The adapter may use the base's names, those of another layout of the base, or those of a submodel (CLIP's vision
    tower). If several submodels have such modules, the one of the class that the adapter was trained on is used.

    Args:
        lora: module path in the adapter -> (d_in, d_out).
        saved: names of the parameters that it saves in full.
        base: the model.
        model_class: the class that the adapter was trained on, if known.
        stored: further names that count as the base's: those of stored tensors that it stacks when loading.

    Returns:
        The base's name for each ``PATH.weight`` and each saved parameter; the adapter's names if it matches no
        submodel or several: `shape_problems` then reports what is wrong.
    """
    wanted = [*(f"{path}.weight" for path in lora), *saved]
    if found := _find_names(wanted, base, stored):
        return found
    modules = dict(base.named_modules())
    fitting: list[tuple[str, dict[str, str]]] = []
    for start, names in _find_submodels(wanted, modules):
        if all(linear_sizes(modules.get(names[f"{path}.weight"][:-7])) == sizes for path, sizes in lora.items()):
            fitting.append((type(modules[start]).__name__, names))
    if len(fitting) > 1:
        fitting = [pair for pair in fitting if pair[0] == model_class]
    return fitting[0][1] if len(fitting) == 1 else {name: name for name in wanted}


def _find_names(wanted: Collection[str], model: torch.nn.Module, stored: Collection[str] = ()) -> dict[str, str]:
    """The model's parameter names that the loader assigns to these names; empty if one is not found."""
    from transformers import PreTrainedModel

    known = {*parameter_names(model), *stored}
    others = [name for name in wanted if name not in known]
    renamed = loaded_names(model, others) if others and isinstance(model, PreTrainedModel) else {}
    found = {name: renamed.get(name, name) for name in wanted}
    return found if known.issuperset(found.values()) else {}


def _find_submodels(wanted: Collection[str], modules: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Submodels with all of these parameters: path of the submodel, and the names in the whole model."""
    from transformers import PreTrainedModel

    first = next(iter(wanted)).rpartition(".")[0]
    ends = {path.removesuffix(f".{first}") for path in modules if path.endswith(f".{first}")}
    models = {path for path, module in modules.items() if path and isinstance(module, PreTrainedModel)}
    yielded: list[dict[str, str]] = []
    for start in sorted(ends | models):
        names = {name: f"{start}.{found}" for name, found in _find_names(wanted, modules[start]).items()}
        if names and names not in yielded:
            yielded.append(names)
            yield start, names


def rename_to_base(adapter: Adapter, base: torch.nn.Module) -> Adapter:
    """Renames an adapter's modules to those of a base; unchanged if it does not fit."""
    sizes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
    return rename_adapter(adapter, match_parameters(sizes, adapter.saved, base, adapter.model_class))


def rename_adapter(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Renames an adapter's modules, by the new names of each ``PATH.weight`` and of each saved parameter."""
    paths = {path: names[f"{path}.weight"].removesuffix(".weight") for path in (*adapter.lora, *adapter.rows)}
    return replace(
        adapter,
        lora={paths[path]: pair for path, pair in adapter.lora.items()},
        saved={names[key]: tensor for key, tensor in adapter.saved.items()},
        embeddings=frozenset(paths[path] for path in adapter.embeddings),
        rows={paths[path]: rows for path, rows in adapter.rows.items()},
        biases={paths[path]: bias for path, bias in adapter.biases.items()},
    )


def rename_to_current(adapter: Adapter, settings: Mapping[str, Any], config: Mapping[str, Any], called: str) -> Adapter:
    """Renames an adapter's modules to those of its class in the installed transformers; unchanged if it does not fit.

    Args:
        adapter: as stored.
        settings: content of its ``adapter_config.json``.
        config: content of its base's ``config.json``.
        called: name of the adapter in messages.
    """
    sizes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
    return rename_adapter(adapter, match_current_names(sizes, adapter.saved, settings, config, called))


def match_current_names(
    lora: Sizes, saved: Collection[str], settings: Mapping[str, Any], config: Mapping[str, Any], called: str
) -> dict[str, str]:
    """`match_parameters` for the class that an adapter was trained on, in the installed transformers.

    Args:
        lora: module path in the adapter -> (d_in, d_out).
        saved: names of the parameters that it saves in full.
        settings: content of its ``adapter_config.json``.
        config: content of its base's ``config.json``.
        called: name of the adapter in messages.

    Returns:
        See `match_parameters`; the adapter's names if the class is unknown or lacks such parameters.
    """
    trained = class_trained_on(settings, config)
    content = {**config, **({"architectures": [trained]} if trained else {})}
    model = build_meta_model(content, called, len(lora)).model
    if model is not None:
        names = match_parameters(lora, saved, model, trained_class(settings))
        if set(parameter_names(model)).issuperset(names.values()):
            return names
    return {name: name for name in (*(f"{path}.weight" for path in lora), *saved)}


# ---------------------------------------------------------------- checkpoint files


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter, renamed to match a checkpoint.

    Attributes:
        adapter: with the checkpoint's names, and names for tensors that it adds.
        names: name in the merged model -> name in the checkpoint, in the checkpoint's order.
        config: of the merged model; with another ``architectures`` if the adapter has a head that the checkpoint's
            class lacks.
    """

    adapter: Adapter
    names: dict[str, str]
    config: dict[str, Any]


def place_in_files(
    adapter: Adapter,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    names: Collection[str],
    *,
    called: str,
    base: str,
    labels: Sequence[str] = (),
) -> PlacedAdapter:
    """Matches an adapter with the tensor names of its base's checkpoint.

    Args:
        adapter: as stored.
        settings: content of its ``adapter_config.json``.
        config: content of the base's ``config.json``.
        names: of the base's tensors.
        called: name of the adapter in errors.
        base: name of the base in errors.
        labels: class names of the adapter's head, if it has one.

    Raises:
        FusionError: the base lacks a module or tensor that the adapter adapts, saves or needs.
    """
    kept = [*adapter.saved, *(f"{path}.weight" for path in adapter.rows)]
    wanted = [*(f"{path}.weight" for path in adapter.lora), *kept]
    same = {name: name for name in names}
    if same.keys() >= set(wanted):
        return PlacedAdapter(adapter, same, dict(config))
    class_name = next(iter(architectures(dict(config))), "")
    trained = class_trained_on(settings, config)
    absent = next(name for name in wanted if name not in same)
    for architecture in dict.fromkeys((class_name, trained or class_name)):
        content = {**config, "architectures": [architecture] if architecture else None}
        model = build_meta_model(content, base, len(names)).model
        if model is None:
            continue
        loaded = loaded_names(model, names)
        files = {parameter: name for name, parameter in reversed(loaded.items())}  # the first of several is loaded
        sizes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
        found = match_parameters(sizes, kept, model, adapter.model_class, files)
        known = {*parameter_names(model), *files}
        if not known >= set(found.values()):
            absent = next(name for name, loaded_as in loaded_names(model, wanted).items() if loaded_as not in known)
            continue
        new = [found[name] for name in adapter.saved if found[name] not in files]
        if lacking := [name for name in found.values() if name not in files and name not in new]:
            tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
            if lacking[0] in tied:
                raise FusionError(
                    f"{called} adapts {lacking[0].removesuffix('.weight')}, which {base} ties to {tied[lacking[0]]}:"
                    " the update would change both",
                    "save the base untied, with tie_word_embeddings: false",
                )
            continue
        if architecture == class_name:
            moved = {name: files.get(parameter, parameter) for name, parameter in found.items()}
            return PlacedAdapter(rename_adapter(adapter, moved), same, dict(config))
        return _under_its_head(adapter, found, model, loaded, config, called, base, labels)
    verb, path = ("saves", absent) if absent in adapter.saved else ("adapts", absent.removesuffix(".weight"))
    reason = f"; the adapter was trained on a {trained}" if trained and trained != class_name else ""
    raise FusionError(
        f"{called} {verb} {path}, which {base}{f' ({class_name})' if class_name else ''} does not have{reason}",
        "name the base that the adapter was trained on: base: owner/name, or owner/base+owner/adapter",
    )


def refuse_sizes(placed: PlacedAdapter, shapes: Mapping[str, tuple[int, ...]], called: str, base: str) -> None:
    """Raises if an update and the tensor that it is added to have different shapes.

    Args:
        placed: the adapter.
        shapes: of the base's tensors, by name in its files.
        called: name of the adapter in errors.
        base: name of the base in errors.
    """
    for path, (a, b) in placed.adapter.lora.items():
        name = placed.names.get(f"{path}.weight", "")  # "": on a head that the adapter itself saves
        update = (b.shape[0], a.shape[1])
        if name and tuple(shapes[name]) not in (update, update[::-1]):
            raise FusionError(
                f"{called}: {path} has shape {list(shapes[name])} in {base}, but the update has {list(update)}",
                "name the base that the adapter was trained on: base: owner/name, or owner/base+owner/adapter",
            )
    for path, bias in placed.adapter.biases.items():
        if tuple(shapes.get(placed.names.get(f"{path}.bias", ""), ())) != tuple(bias.shape):
            raise FusionError(
                f"{called} changes the bias of {path}, and {base} has no such bias of shape {[*bias.shape]}",
                "name the base that the adapter was trained on: base: owner/name, or owner/base+owner/adapter",
            )


def _under_its_head(
    adapter: Adapter,
    found: Mapping[str, str],
    model: PreTrainedModel,
    loaded: Mapping[str, str],
    config: Mapping[str, Any],
    called: str,
    base: str,
    labels: Sequence[str],
) -> PlacedAdapter:
    """Places an adapter with a head on a checkpoint of another class with the same body; drops that class's head."""
    used = filled_parameters(model, loaded)
    filled = {parameter for made in used.values() for parameter in made}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    unfilled = [name for name in parameter_names(model) if name not in filled and name not in tied]
    if absent := [name for name in unfilled if name not in found.values()]:
        raise FusionError(
            f"{called} was trained on a {type(model).__name__}, whose {absent[0]} is in neither the adapter nor {base}",
            "name a base that has this tensor: base: owner/name",
        )
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in loaded:  # names in another layout are kept, and loaded as before
        if name in used:
            is_prefixed = loaded[name] in (prefix + name, name.removeprefix(prefix))
            names[loaded[name] if is_prefixed else name] = name
    called_now = {loaded[old]: new for new, old in names.items()}
    moved = rename_adapter(adapter, {name: called_now.get(parameter, parameter) for name, parameter in found.items()})
    content: dict[str, Any] = {**config, "architectures": [type(model).__name__]}
    matrices = [name for name in unfilled if name in moved.saved and moved.saved[name].dim() == 2]
    if matrices and (head_of_architecture(type(model).__name__) or HEADS[-1]).has_labels:
        classes = len(moved.saved[matrices[-1]])
        label_list = list(labels) if len(labels) == classes else [f"LABEL_{number}" for number in range(classes)]
        content |= {
            "id2label": dict(enumerate(label_list)),
            "label2id": {label: i for i, label in enumerate(label_list)},
        }
        content.pop("num_labels", None)
    return PlacedAdapter(moved, names, content)


def class_trained_on(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Name of the model class that an adapter was trained on, from its settings and its base; "" if unknown."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if named := trained_class(settings):
        return named
    head, model_type = head_of_adapter(dict(settings)), config.get("model_type")
    if head is None or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return ""
    found = head.auto_class()._model_mapping.get(CONFIG_MAPPING[model_type], "")
    found = found[0] if isinstance(found, (tuple, list)) else found
    return getattr(found, "__name__", "")


def parameter_names(model: torch.nn.Module) -> list[str]:
    """Names of a model's parameters, in order; tied parameters under all their names."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]
