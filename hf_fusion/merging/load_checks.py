"""Adapts the merged ``config.json`` to the shapes of the merged tensors, and checks that transformers can load them.

No values are read: names and shapes are loaded into the configured model on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from hf_fusion.errors import FusionError, first_line
from hf_fusion.hub.headers import KeyReport, Shapes, check_load_as
from hf_fusion.hub.parameter_names import build_meta_model
from hf_fusion.hub.task_heads import architectures, head_of_architecture, label_names
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import TensorEntry
from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.engine.output import TensorSpec

Config = dict[str, Any]
MERGED = "the merged model"
_MAX_LISTED = 5  # tensors that an error lists


def shapes_of(tensors: Iterable[TensorEntry | TensorSpec]) -> Shapes:
    """Tensor name -> shape, without sentence-transformers' modules in subfolders."""
    return {tensor.name: tensor.shape for tensor in tensors if "/" not in tensor.name}


def fit_config(config: Config, shapes: Shapes, models: Sequence[Model]) -> Config:
    """Adapts the sizes and labels of a configuration to the merged tensors.

    Adapters that save resized embeddings, or a head with other classes, change shapes without recording it. A size in
    the configuration, also in nested ones, that differs from the tensors is replaced if transformers' loader then
    reports fewer mismatches.

    Args:
        config: content of ``config.json``, correct except for sizes.
        shapes: of the merged tensors, by name.
        models: the first model, then the experts; label names are those of the first with a matching number.
    """
    report = _loaded(config, shapes)
    if isinstance(report, str):
        return config if not models else _of_changed_rows(config, shapes, models)
    pairs = {
        (expected[i], given[i])
        for given, expected in report.sizes.values()
        if len(given) == len(expected)
        for i in range(len(given))
        if given[i] != expected[i]
    }
    for old, new in sorted(pairs):
        for candidate in _candidates(config, old, new, len(shapes), models):
            new_report = _loaded(candidate, shapes)
            if not isinstance(new_report, str) and len(new_report.sizes) < len(report.sizes):
                config, report = candidate, new_report
                break
    return _named(config, models)


def check_loads(config: Mapping[str, Any], shapes: Shapes, first: Model) -> str:
    """Checks with transformers' loader that the merged tensors load.

    Problems that the first model's files have as well are ignored.

    Args:
        config: content of the merged ``config.json``.
        shapes: of the merged tensors, by name.
        first: the model whose names and configuration the merged one has.

    Returns:
        Why it could not be checked, or "".

    Raises:
        FusionError: tensors are missing, unexpected, or of other shapes than configured.
    """
    before = shapes_of(first.entries.values())
    try:
        report = _loaded(config, shapes)
    except Exception as error:  # the loader fails: check whether it does for the first model as well
        try:
            _loaded(first.config, before)
        except Exception:
            return f"transformers cannot load {first.name} ({first_line(error)})"
        raise FusionError(f"{MERGED} would not load: {first_line(error)}", _hint(first)) from error
    if isinstance(report, str):
        return report
    if not (problems := _problems(report)):
        return ""
    first_report = _loaded(first.config, before)
    known = set() if isinstance(first_report, str) else set(_problems(first_report))
    if not (left := {key: line for key, line in problems.items() if key not in known}):
        return ""
    lines = list(dict.fromkeys(left.values()))
    more = f"; and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    raise FusionError(f"{MERGED} would not load: {'; '.join(lines[:_MAX_LISTED])}{more}", _hint(first))


def _hint(first: Model) -> str:
    if first.adapter is None:
        return "leave out the models that differ, or set the parameter mismatch to base"
    return "save the base as the adapters were trained on it (resize_token_embeddings), and merge base+adapter"


def _loaded(config: Mapping[str, Any], shapes: Shapes) -> KeyReport | str:
    """The loader's report on these tensors, or why there is none."""
    return _load_cached(json.dumps(config, sort_keys=True, default=str), tuple(shapes.items()))


@lru_cache(maxsize=16)
def _load_cached(text: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> KeyReport | str:
    """The loader's report, cached by configuration and shapes, which a merge needs several times."""
    promise = build_meta_model(json.loads(text), MERGED, len(shapes))
    if promise.model is None or promise.config is None:
        return promise.why.removeprefix(f"{MERGED}: ")
    report = check_load_as(type(promise.model), promise.config, dict(shapes))
    return KeyReport(report.missing, report.unexpected, report.mismatched, report.sizes)  # the model is not kept


def _problems(report: KeyReport) -> dict[tuple[str, str], str]:
    """Problems by kind and name, with layer indices replaced by ``*``."""
    star = partial(re.sub, r"\.\d+(?=\.)", ".*")
    lines = {("missing", star(name)): f"{name} is missing" for name in sorted(report.missing)}
    lines |= {("unexpected", star(name)): f"{name} is unexpected" for name in sorted(report.unexpected)}
    return lines | {
        ("size", star(name)): f"{name} is {[*given]}, config.json promises {[*expected]}"
        for name, (given, expected) in report.sizes.items()
    }


# ---------------------------------------------------------------- sizes


def _candidates(config: Config, old: int, new: int, tensors: int, models: Sequence[Model]) -> Iterator[Config]:
    """Configurations with `old` replaced by `new`: as vocabulary size, as number of classes, then under any key."""
    known = dict.fromkeys(["vocab_size", "labels", *_keys(config, old)])
    for key in known:
        if key != "labels":
            if (changed := _replaced(config, key, old, new)) != config:
                yield changed
        elif getattr(build_meta_model(config, MERGED, tensors).config, "num_labels", None) == old:
            yield _labelled(config, _names(models, new))


def _keys(config: Mapping[str, Any], value: int) -> Iterator[str]:
    """Keys with a value, in a configuration and nested ones, without token ids."""
    for key, current in config.items():
        if isinstance(current, dict):
            yield from _keys(current, value)
        elif type(current) is int and current == value and not key.endswith(("_id", "_index")):
            yield key


def _replaced(config: Mapping[str, Any], key: str, old: int, new: int) -> Config:
    return {
        name: _replaced(value, key, old, new)
        if isinstance(value, dict)
        else new
        if name == key and type(value) is int and value == old
        else value
        for name, value in config.items()
    }


def _of_changed_rows(config: Config, shapes: Shapes, models: Sequence[Model]) -> Config:
    """Fallback without a model: adapts sizes whose tensors have more or fewer rows than in the first model."""
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
    """Adds label names to a head without any, if the experts with label names agree."""
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
    """A model's label names; an adapter may have them in its ``config.json``."""
    if model.adapter is not None and (model.folder / "config.json").is_file():
        return label_names(read_json(model.folder / "config.json", model.name))
    return label_names(model.config)


def _labelled(config: Config, names: Sequence[str]) -> Config:
    config = {key: value for key, value in config.items() if key != "num_labels"}
    by_name = {name: i for i, name in enumerate(names)}
    return config | {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": by_name}
