"""Where an adapter's tensors belong: in a loaded base, and in the files of one.

An adapter knows modules by the paths that they had where it was trained: in an older transformers, under a head, in a
tower by itself. They are matched as transformers' own loader matches the tensors of a checkpoint, see `loaded_names`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.hub.heads import HEADS, architectures, head_of_adapter, head_of_architecture
from hf_fusion.hub.lora import linear_sizes, trained_class
from hf_fusion.hub.parameter_names import build_meta_model, filled_parameters, loaded_names
from hf_fusion.types import Adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Sizes = Mapping[str, tuple[int, int]]


def match_parameters(
    lora: Sizes, saved: Collection[str], base: torch.nn.Module, model_class: str = "", stored: Collection[str] = ()
) -> dict[str, str]:
    """Name of a parameter in an adapter -> its name in a base, which may be on the meta device.

    The adapter's names are the base's own, or those of another layout of the base, or those of one part of it (CLIP's
    vision tower): of several parts that have such modules, the one of the class that the adapter was trained on.

    Args:
        lora: module path in the adapter -> (d_in, d_out).
        saved: names of the parameters that it saves whole.
        base: the model.
        model_class: that the adapter was trained on, if known.
        stored: names that count as the base's too: of tensors that it is loaded from and stacks.

    Returns:
        The name of each ``PATH.weight`` and of each saved parameter; the adapter's own where it fits no part of the
        base, or several: `shape_problems` says then what is wrong.
    """
    wanted = [*(f"{path}.weight" for path in lora), *saved]
    if found := _named(wanted, base, stored):
        return found
    modules = dict(base.named_modules())
    fitting: list[tuple[str, dict[str, str]]] = []
    for start, names in _in_parts(wanted, modules):
        if all(linear_sizes(modules.get(names[f"{path}.weight"][:-7])) == sizes for path, sizes in lora.items()):
            fitting.append((type(modules[start]).__name__, names))
    if len(fitting) > 1:
        fitting = [pair for pair in fitting if pair[0] == model_class]
    return fitting[0][1] if len(fitting) == 1 else {name: name for name in wanted}


def _named(wanted: Collection[str], model: torch.nn.Module, stored: Collection[str] = ()) -> dict[str, str]:
    """The names of a model's parameters that a loader would find for these; empty where it does not find them all."""
    from transformers import PreTrainedModel

    known = {*parameters_of(model), *stored}
    others = [name for name in wanted if name not in known]
    renamed = loaded_names(model, others) if others and isinstance(model, PreTrainedModel) else {}
    found = {name: renamed.get(name, name) for name in wanted}
    return found if known.issuperset(found.values()) else {}


def _in_parts(wanted: Collection[str], modules: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """The parts of a model that have all of these parameters: where each begins, and the names in the whole."""
    from transformers import PreTrainedModel

    first = next(iter(wanted)).rpartition(".")[0]
    ends = {path.removesuffix(f".{first}") for path in modules if path.endswith(f".{first}")}
    models = {path for path, module in modules.items() if path and isinstance(module, PreTrainedModel)}
    told: list[dict[str, str]] = []
    for start in sorted(ends | models):
        names = {name: f"{start}.{own}" for name, own in _named(wanted, modules[start]).items()}
        if names and names not in told:
            told.append(names)
            yield start, names


def rename_to_base(adapter: Adapter, base: torch.nn.Module) -> Adapter:
    """An adapter by the names that a base has for its modules; as it is where it does not fit."""
    sizes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
    return rename_adapter(adapter, match_parameters(sizes, adapter.saved, base, adapter.model_class))


def rename_adapter(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """An adapter by other names: those of each ``PATH.weight`` and of each saved parameter."""
    paths = {path: names[f"{path}.weight"].removesuffix(".weight") for path in (*adapter.lora, *adapter.rows)}
    return replace(
        adapter,
        lora={paths[path]: pair for path, pair in adapter.lora.items()},
        saved={names[key]: tensor for key, tensor in adapter.saved.items()},
        embeddings=frozenset(paths[path] for path in adapter.embeddings),
        rows={paths[path]: rows for path, rows in adapter.rows.items()},
    )


def rename_to_current(adapter: Adapter, settings: Mapping[str, Any], config: Mapping[str, Any], called: str) -> Adapter:
    """An adapter by the paths that its class has in this transformers; as it is where that is unknown, or it misfits.

    Args:
        adapter: as it was read.
        settings: content of its ``adapter_config.json``.
        config: content of its base's ``config.json``.
        called: what messages call it.
    """
    sizes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
    return rename_adapter(adapter, match_current_names(sizes, adapter.saved, settings, config, called))


def match_current_names(
    lora: Sizes, saved: Collection[str], settings: Mapping[str, Any], config: Mapping[str, Any], called: str
) -> dict[str, str]:
    """`placement` in the class that an adapter was trained on, as this transformers has it.

    Args:
        lora: module path in the adapter -> (d_in, d_out).
        saved: names of the parameters that it saves whole.
        settings: content of its ``adapter_config.json``.
        config: content of its base's ``config.json``.
        called: what messages call it.

    Returns:
        As `placement`; the adapter's own names where the class is not known, or lacks them.
    """
    trained = class_trained_on(settings, config)
    content = {**config, **({"architectures": [trained]} if trained else {})}
    model = build_meta_model(content, called, len(lora)).model
    if model is not None:
        names = match_parameters(lora, saved, model, trained_class(settings))
        if set(parameters_of(model)).issuperset(names.values()):
            return names
    return {name: name for name in (*(f"{path}.weight" for path in lora), *saved)}


# ---------------------------------------------------------------- in files


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter by the names of a checkpoint.

    Attributes:
        adapter: by names that the checkpoint has, or gets.
        names: those of the model with the adapter in it -> the checkpoint's, in the checkpoint's order.
        config: of the model with the adapter: with another ``architectures`` where the adapter brings a head that the
            checkpoint's class does not have.
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
    """Matches an adapter with the files of its base, of which only the names are known.

    Args:
        adapter: as it was read.
        settings: content of its ``adapter_config.json``.
        config: content of the base's ``config.json``.
        names: of the base's tensors.
        called: what errors call the adapter.
        base: and its base.
        labels: names of the classes of the adapter's head, if it has one.

    Raises:
        FusionError: naming what the adapter adapts, saves or lacks that the base does not have.
    """
    kept = [*adapter.saved, *(f"{path}.weight" for path in adapter.rows)]
    wanted = [*(f"{path}.weight" for path in adapter.lora), *kept]
    same = {name: name for name in names}
    if same.keys() >= set(wanted):
        return PlacedAdapter(adapter, same, dict(config))
    own = next(iter(architectures(dict(config))), "")
    trained = class_trained_on(settings, config)
    absent = next(name for name in wanted if name not in same)
    for architecture in dict.fromkeys((own, trained or own)):
        content = {**config, "architectures": [architecture] if architecture else None}
        model = build_meta_model(content, base, len(names)).model
        if model is None:
            continue
        loaded = loaded_names(model, names)
        files = {parameter: name for name, parameter in reversed(loaded.items())}  # of two, the first is loaded
        sizes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
        found = match_parameters(sizes, kept, model, adapter.model_class, files)
        known = {*parameters_of(model), *files}
        if not known >= set(found.values()):
            absent = next(name for name, told in loaded_names(model, wanted).items() if told not in known)
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
        if architecture == own:
            moved = {name: files.get(parameter, parameter) for name, parameter in found.items()}
            return PlacedAdapter(rename_adapter(adapter, moved), same, dict(config))
        return _under_its_head(adapter, found, model, loaded, config, called, base, labels)
    does, path = ("saves", absent) if absent in adapter.saved else ("adapts", absent.removesuffix(".weight"))
    told = f": it was trained on a {trained}" if trained and trained != own else ""
    raise FusionError(
        f"{called} {does} {path}, which {base}{f' ({own})' if own else ''} does not have{told}",
        "name the base that it was made from: base: owner/name, or owner/base+owner/adapter",
    )


def refuse_sizes(placed: PlacedAdapter, shapes: Mapping[str, tuple[int, ...]], called: str, base: str) -> None:
    """Raises where an adapter's update is not of the size of the tensor that it is for.

    Args:
        placed: the adapter.
        shapes: of the base's tensors, by their names in its files.
        called: what the error calls the adapter.
        base: and its base.
    """
    for path, (a, b) in placed.adapter.lora.items():
        name = placed.names.get(f"{path}.weight", "")  # "": on a head that the adapter brings, and that fits it
        update = (b.shape[0], a.shape[1])
        if name and tuple(shapes[name]) not in (update, update[::-1]):
            raise FusionError(
                f"{called}: {path} is {list(shapes[name])} in {base}, the update is {list(update)}",
                "name the base that it was made from: base: owner/name, or owner/base+owner/adapter",
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
    """An adapter that brings a head, on a checkpoint of another class with the same body: what remains of its files."""
    used = filled_parameters(model, loaded)
    filled = {parameter for made in used.values() for parameter in made}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    unfilled = [name for name in parameters_of(model) if name not in filled and name not in tied]
    if absent := [name for name in unfilled if name not in found.values()]:
        raise FusionError(
            f"{called} was trained on a {type(model).__name__}, whose {absent[0]} is neither in it nor in {base}",
            "name a base that has it: base: owner/name",
        )
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in loaded:  # names in another layout stay, and are loaded as before
        if name in used:
            is_prefixed = loaded[name] in (prefix + name, name.removeprefix(prefix))
            names[loaded[name] if is_prefixed else name] = name
    called_now = {loaded[old]: new for new, old in names.items()}
    moved = rename_adapter(adapter, {name: called_now.get(parameter, parameter) for name, parameter in found.items()})
    content: dict[str, Any] = {**config, "architectures": [type(model).__name__]}
    matrices = [name for name in unfilled if name in moved.saved and moved.saved[name].dim() == 2]
    if matrices and (head_of_architecture(type(model).__name__) or HEADS[-1]).has_labels:
        classes = len(moved.saved[matrices[-1]])
        told = list(labels) if len(labels) == classes else [f"LABEL_{number}" for number in range(classes)]
        content |= {"id2label": dict(enumerate(told)), "label2id": {label: i for i, label in enumerate(told)}}
        content.pop("num_labels", None)
    return PlacedAdapter(moved, names, content)


def class_trained_on(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Name of the class that an adapter was trained on, as its settings tell it of a base; "" where they do not."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if named := trained_class(settings):
        return named
    head, model_type = head_of_adapter(dict(settings)), config.get("model_type")
    if head is None or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return ""
    found = head.auto_class()._model_mapping.get(CONFIG_MAPPING[model_type], "")
    found = found[0] if isinstance(found, (tuple, list)) else found
    return getattr(found, "__name__", "")


def parameters_of(model: torch.nn.Module) -> list[str]:
    """Names of a model's parameters, in order; tied ones by each of their names."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]
