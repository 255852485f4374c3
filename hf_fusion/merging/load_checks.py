"""Does the merged model load? Its ``config.json`` gets its tensors' sizes, and transformers' loader is asked.

No values are read: names and shapes are loaded into the promised model on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from hf_fusion.errors import FusionError, first_line
from hf_fusion.hub.headers import KeyReport, Shapes, check_load_as
from hf_fusion.hub.heads import architectures, head_of_architecture, label_names
from hf_fusion.hub.parameter_names import build_meta_model
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import TensorEntry
from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.engine.output import TensorSpec

Config = dict[str, Any]
MERGED = "the merged model"
_TOLD = 5  # tensors that an error names


def shapes_of(tensors: Iterable[TensorEntry | TensorSpec]) -> Shapes:
    """Sizes by name; modules of sentence-transformers, in folders beside the model, are not among them."""
    return {tensor.name: tensor.shape for tensor in tensors if "/" not in tensor.name}


def fit_config(config: Config, shapes: Shapes, models: Sequence[Model]) -> Config:
    """A merged model's configuration with the sizes and labels of its tensors.

    Adapters that save embeddings of more tokens, or a head of other classes, change tensors and say so nowhere: a size
    that the configuration promises and the tensors do not have is looked for in it, also in its nested parts, and is
    replaced where transformers' loader then finds what it expects.

    Args:
        config: content of ``config.json``, true but for sizes.
        shapes: of the merged tensors, by name.
        models: the first model, then the experts: the first that names as many classes as there are gives the names.
    """
    found = _loaded(config, shapes)
    if isinstance(found, str):
        return config if not models else _of_changed_rows(config, shapes, models)
    pairs = {
        (expected[i], given[i])
        for given, expected in found.sizes.values()
        if len(given) == len(expected)
        for i in range(len(given))
        if given[i] != expected[i]
    }
    for old, new in sorted(pairs):
        for candidate in _candidates(config, old, new, len(shapes), models):
            tried = _loaded(candidate, shapes)
            if not isinstance(tried, str) and len(tried.sizes) < len(found.sizes):
                config, found = candidate, tried
                break
    return _named(config, models)


def check_loads(config: Mapping[str, Any], shapes: Shapes, first: Model) -> str:
    """Asks transformers' loader for a model with these tensors.

    What is amiss with the first model's own files as well is not the merge's fault, and let pass.

    Args:
        config: content of the merged ``config.json``.
        shapes: of the merged tensors, by name.
        first: the model whose names and configuration the merged one has.

    Returns:
        Why it could not be asked; "" where it was.

    Raises:
        FusionError: tensors are missing, not used, or of other sizes than the configuration promises.
    """
    before = shapes_of(first.entries.values())
    try:
        found = _loaded(config, shapes)
    except Exception as error:  # the loader itself fails: on the first model too, or on what was merged
        try:
            _loaded(first.config, before)
        except Exception:
            return f"transformers cannot load {first.name} ({first_line(error)})"
        raise FusionError(f"{MERGED} would not load: {first_line(error)}", _hint(first)) from error
    if isinstance(found, str):
        return found
    if not (problems := _problems(found)):
        return ""
    own = _loaded(first.config, before)
    known = set() if isinstance(own, str) else set(_problems(own))
    if not (left := {key: told for key, told in problems.items() if key not in known}):
        return ""
    lines = list(dict.fromkeys(left.values()))
    more = f"; and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
    raise FusionError(f"{MERGED} would not load: {'; '.join(lines[:_TOLD])}{more}", _hint(first))


def _hint(first: Model) -> str:
    if first.adapter is None:
        return "leave out the models that differ, or set the parameter mismatch to base"
    return "save the base as the adapters were trained on it (resize_token_embeddings), and merge base+adapter"


def _loaded(config: Mapping[str, Any], shapes: Shapes) -> KeyReport | str:
    """What the loader says of these tensors, or why it cannot be asked."""
    return _account(json.dumps(config, sort_keys=True, default=str), tuple(shapes.items()))


@lru_cache(maxsize=16)
def _account(text: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> KeyReport | str:
    """The loader is asked once about one configuration and one set of shapes: a merge has three reasons to ask."""
    promise = build_meta_model(json.loads(text), MERGED, len(shapes))
    if promise.model is None or promise.config is None:
        return promise.why.removeprefix(f"{MERGED}: ")
    found = check_load_as(type(promise.model), promise.config, dict(shapes))
    return KeyReport(found.missing, found.unexpected, found.mismatched, found.sizes)  # the model is not kept


def _problems(found: KeyReport) -> dict[tuple[str, str], str]:
    """What is wrong, by kind and name, alike layers as one."""
    star = partial(re.sub, r"\.\d+(?=\.)", ".*")
    lines = {("missing", star(name)): f"{name} is missing" for name in sorted(found.missing)}
    lines |= {("unexpected", star(name)): f"{name} has no place in it" for name in sorted(found.unexpected)}
    return lines | {
        ("size", star(name)): f"{name} is {[*given]}, config.json promises {[*expected]}"
        for name, (given, expected) in found.sizes.items()
    }


# ---------------------------------------------------------------- sizes


def _candidates(config: Config, old: int, new: int, tensors: int, models: Sequence[Model]) -> Iterator[Config]:
    """Configurations that say `new` where this one says `old`: the vocabulary first, the classes, then any size."""
    known = dict.fromkeys(["vocab_size", "labels", *_keys(config, old)])
    for key in known:
        if key != "labels":
            if (changed := _replaced(config, key, old, new)) != config:
                yield changed
        elif getattr(build_meta_model(config, MERGED, tensors).config, "num_labels", None) == old:
            yield _labelled(config, _names(models, new))


def _keys(config: Mapping[str, Any], value: int) -> Iterator[str]:
    """Keys of a size, in a configuration and in its nested parts, without those of tokens."""
    for key, own in config.items():
        if isinstance(own, dict):
            yield from _keys(own, value)
        elif type(own) is int and own == value and not key.endswith(("_id", "_index")):
            yield key


def _replaced(config: Mapping[str, Any], key: str, old: int, new: int) -> Config:
    return {
        name: _replaced(own, key, old, new)
        if isinstance(own, dict)
        else new
        if name == key and type(own) is int and own == old
        else own
        for name, own in config.items()
    }


def _of_changed_rows(config: Config, shapes: Shapes, models: Sequence[Model]) -> Config:
    """Without a model to ask: what the first model's files have as many rows of as it has tokens, or classes."""
    first = models[0]
    rows = {
        (first.entries[name].shape[0], shape[0])
        for name, shape in shapes.items()
        if shape and name in first.entries and shape[1:] == first.entries[name].shape[1:]
    }
    for old, new in sorted(rows):
        if old != new:
            labels = config.get("id2label") or range(config.get("num_labels", 2))
            changed = _replaced(config, "vocab_size", old, new)
            is_head = changed == config and len(labels) == old
            config = _labelled(config, _names(models, new)) if is_head else changed
    return config


# ---------------------------------------------------------------- classes


def _named(config: Config, models: Sequence[Model]) -> Config:
    """Names for the classes of a head that has none, where those experts that name theirs agree."""
    head = head_of_architecture(next(iter(architectures(config)), None))
    if head is None or not head.has_labels or label_names(config):
        return config
    count = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else config.get("num_labels", 2)
    known = {names for names in map(_names_of, models) if len(names) == count}
    return _labelled(config, known.pop()) if len(known) == 1 else config


def _names(models: Iterable[Model], count: int) -> tuple[str, ...]:
    found = (names for names in map(_names_of, models) if len(names) == count)
    return next(found, tuple(f"LABEL_{i}" for i in range(count)))


def _names_of(model: Model) -> tuple[str, ...]:
    """A model's names of its classes; an adapter may have them in a ``config.json`` of its own."""
    if model.adapter is not None and (model.folder / "config.json").is_file():
        return label_names(read_json(model.folder / "config.json", model.name))
    return label_names(model.config)


def _labelled(config: Config, names: Sequence[str]) -> Config:
    config = {key: value for key, value in config.items() if key != "num_labels"}
    by_name = {name: i for i, name in enumerate(names)}
    return config | {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": by_name}
