"""The ``parameters`` of mergekit's recipes: values, gradients and ``filter``s, as settings of our methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.merging.mergekit.parameters import MergekitParameter
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.settings import Setting, map_setting
from hf_fusion.schema import Expected, KeyPath, expected, read


def read_parameters(
    method: str, given: Mapping[str, Any], where: KeyPath, *, of_model: bool, ignore: Callable[[str], None]
) -> dict[str, Setting]:
    """The parameters that stand at one key of a recipe, by our names.

    Args:
        method: mergekit's, whose parameters are known.
        given: mergekit's names and values.
        where: their key path.
        of_model: whether they are one model's own.
        ignore: is told what mergekit reads, and has no use for there.

    Raises:
        FusionError: naming a parameter that the method does not have, or whose value is not valid.
    """
    known = MERGE_METHODS[method].mergekit or {}
    found: dict[str, Setting] = {}
    for key, setting in given.items():
        parameter = known.get(key)
        if parameter is None and key in _known_to_mergekit():
            ignore(key)
        elif parameter is None:
            raise FusionError(f"{where.inner(key)} is not a parameter of {method}", suggestion(key, known))
        elif of_model and not parameter.per_model:
            ignore(f"{key} of one model")
        elif key.startswith("nuslerp_"):
            found[parameter.ours] = _rows(given, where)
        else:
            found[parameter.ours] = _setting(setting, parameter, where.inner(key))
    return found


def _known_to_mergekit() -> set[str]:
    """What mergekit reads for any method; where a method has no use for one, it is left out."""
    names = {name for row in MERGE_METHODS.values() for name in row.mergekit or ()}
    return names | {"int8_mask", "eps", "embed_slerp"}


def _setting(setting: object, parameter: MergekitParameter, where: KeyPath) -> Setting:
    """One value, gradient or choice by filters."""

    def convert(value: object, at: KeyPath) -> Any:
        return parameter.value(_value(value, parameter.kind, at))

    return map_setting(setting, convert, where, gradient=parameter.kind is not bool)


def _value(value: object, kind: type, where: KeyPath) -> Any:
    """A plain value, as leniently as mergekit takes it: 1e-4, which YAML takes for a text, and 1.0 for true."""
    if kind is bool and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    words = f"{expected(kind)}, or filters" if kind is bool else f"{expected(kind)}, a gradient or filters"
    return read(Annotated[kind, Expected(words)], value, where)


def _rows(given: Mapping[str, Any], where: KeyPath) -> str:
    """NuSLERP's two switches are one choice here."""
    flat, wise = (
        _value(given.get(key, default), bool, where.inner(key))
        for key, default in (("nuslerp_flatten", True), ("nuslerp_row_wise", False))
    )
    return "tensor" if flat else "column" if wise else "row"


def chained(first: Mapping[str, Setting], then: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings of two paths as those of one: what the first says nothing of for a tensor, the second decides."""
    found = dict(then)
    for key, setting in first.items():
        rest = found.get(key)
        is_open = _is_choice(setting) and all(entry.get("filter") for entry in setting)
        if rest is None or not is_open:
            found[key] = setting
        else:
            found[key] = [*setting, *(rest if _is_choice(rest) else [{"value": rest}])]
    return found


def by_filters(
    settings: Mapping[str, Mapping[str, Setting]], parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Setting]:
    """Settings of several modules as those of one model: a choice by what their tensors' names contain.

    Args:
        settings: module → its settings.
        parts: module → what the names of its tensors contain.
    """
    names = dict.fromkeys(key for given in settings.values() for key in given)
    return {
        key: [
            {"filter": part, "value": given[key]}
            for module, given in settings.items()
            if key in given
            for part in parts[module]
        ]
        for key in names
    }


def _is_choice(setting: Setting) -> bool:
    return isinstance(setting, list) and isinstance(setting[0], Mapping)
