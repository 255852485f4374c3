"""A merging method's parameters where they differ from tensor to tensor: gradients over the layers, filters by name.

A setting is a value; a list of numbers that are reached one after the other from the first layer to the last (a
gradient); or a list of {filter, value}, of which the first counts whose filter is part of the tensor's name, and the
last without a filter for what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.schema import Field, KeyPath, expected, read, read_class

Setting = Any


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """One entry of a list of {filter, value}: the setting of the tensors whose names contain the filter."""

    filter: str | None = None
    value: object


def map_setting(setting: Setting, convert: Callable[[Any, KeyPath], Any], where: KeyPath, *, gradient: bool) -> Setting:
    """A setting with each of its values converted.

    Args:
        setting: as YAML gives it.
        convert: what becomes of a value, at its key path; it raises for values that are not valid.
        where: the setting's key path.
        gradient: whether its values are numbers, and a list of them is a gradient.

    Raises:
        FusionError: naming the key path and what is expected.
    """
    if not isinstance(setting, list):
        return convert(setting, where)
    if any(isinstance(entry, Mapping) for entry in setting):
        found = []
        for number, entry in enumerate(setting):
            filtered = read_class(Filtered, entry, where.inner(number))
            value = map_setting(filtered.value, convert, where.inner(number, "value"), gradient=gradient)
            found.append(
                {"value": value} if filtered.filter in (None, "*") else {"filter": filtered.filter, "value": value}
            )
        return found
    if not setting and gradient:
        raise FusionError(f"{where} is [], expected a value, a gradient or filters")
    return [convert(entry, where.inner(i)) for i, entry in enumerate(setting)] if gradient else convert(setting, where)


def check_settings(
    method: str, known: Mapping[str, Field], given: Mapping[str, Setting], where: KeyPath, *, of_expert: bool = False
) -> None:
    """Refuses settings that a method does not have, or that are out of their ranges.

    Args:
        method: its name.
        known: its parameters.
        given: settings by the parameters' names.
        where: their key path.
        of_expert: whether they are one expert's own.

    Raises:
        FusionError: naming the key path and what is expected.
    """
    for key, value in given.items():
        if key not in known:
            message = ": ".join(filter(None, (str(where), f"{method} has no parameter {key!r}")))
            raise FusionError(message, suggestion(key, known, f"hf-fusion methods {method}"))
        check_setting(known[key], value, where.inner(key))
        if of_expert and not known[key].per_expert:
            raise FusionError(f"{where}: {key} is the same for all experts", "give it under parameters:")


def check_setting(field: Field, setting: Setting, where: KeyPath) -> None:
    """Refuses what `value_at` could not make a valid value of.

    Raises:
        FusionError: naming the key path and what is expected.
    """
    map_setting(setting, lambda value, at: read(field.hint, value, at), where, gradient=field.kind in (float, int))


def value_at(setting: Setting, tensor: str, depth: float) -> Any:
    """What a setting says for one tensor.

    Args:
        setting: checked by `check_setting`.
        tensor: its name.
        depth: 0 for the first layer, 1 for the last.

    Returns:
        The value, or None where no filter fits.
    """
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for entry in setting:
            pattern = entry.get("filter")
            if pattern in (None, "*") or pattern in tensor:
                return value_at(entry["value"], tensor, depth)
        return None
    position = depth * (len(setting) - 1)
    low = min(math.floor(position), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (position - low) * (setting[high] - setting[low])


def arguments_at(
    known: Mapping[str, Field],
    shared: Sequence[Mapping[str, Setting]],
    by_expert: Sequence[Sequence[Mapping[str, Setting]]],
    tensor: str,
    depth: float,
) -> dict[str, Any]:
    """A method's arguments for one tensor.

    Args:
        known: the method's parameters.
        shared: settings for all experts, the most particular first.
        by_expert: settings of each expert in the same order; they count before the shared ones.
        tensor: its name.
        depth: 0 for the first layer, 1 for the last.

    Raises:
        FusionError: a required parameter has no value.
    """

    def found(field: Field, settings: Sequence[Mapping[str, Setting]]) -> Any:
        for each in settings:
            value = value_at(each.get(field.name), tensor, depth)
            if value is not None:
                return field.kind(value)
        if field.required:
            raise FusionError(f"{field.name} has no value for {tensor}", f"give {field.name}: {expected(field.hint)}")
        return field.default

    return {
        name: [found(field, [*each, *shared]) for each in by_expert] if field.per_expert else found(field, shared)
        for name, field in known.items()
    }
