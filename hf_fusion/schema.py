"""A merging method's parameters, read from its signature: names, types, defaults and ranges.

    def ties(tensors, *, weight: EachNumber = (1.0,), density: Annotated[EachNumber, Range(0, 1)] = (0.2,))

`EachNumber` is one number for every expert: given once it counts for all of them. A value may differ from tensor to
tensor: a list of numbers runs over the layers, first to last (a gradient); a list of {filter, value} takes the first
whose filter is in the tensor's name, and the last without a filter for what is left.
"""

from __future__ import annotations

import ast
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from hf_fusion.errors import FusionError, shown

MOST = 1 << 63  # of whole numbers; Python's have no end, a float's and torch's do


class PerExpert:
    """Marks a parameter of which every expert has its own."""


EachNumber = Annotated[Sequence[float], PerExpert]
Per = Literal["tensor", "row", "column"]
"""What is measured, and weighed, as one."""


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: as recipes call it.
        kind: float, int, bool or str.
        default: `inspect.Parameter.empty` where it must be given.
        per_expert: whether every expert has its own.
        limits: of a number, or None.
        choices: of a text.
    """

    name: str
    kind: type
    default: Any
    per_expert: bool = False
    limits: Range | None = None
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {float: "a number", int: "a whole number", bool: "true or false"}[self.kind]
        return f"{words} {self.limits}" if self.limits else words

    def checked(self, value: Any, where: str) -> Any:
        """A plain value, if it is one that may be given.

        Raises:
            FusionError: naming where it stands and what is expected.
        """
        if self.kind is float and type(value) is int and abs(value) < MOST:
            value = float(value)
        good = type(value) is self.kind and (not self.choices or value in self.choices)
        if good and self.kind is float:
            good = math.isfinite(value)
        if good and self.kind is int:
            good = abs(value) < MOST
        if good and self.limits:
            good = self.limits.low <= value <= self.limits.high
        if not good:
            raise FusionError(f"{where}: {self.name} is {shown(value)}, expected {self.expected}")
        return value


@cache
def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The keyword parameters of a method, by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            found[name] = _parameter(name, hints[name], parameter.default)
    return found


@cache
def declared(file: Path, name: str) -> dict[str, Parameter]:
    """`parameters_of` a function in a file that is not imported, since its imports would take seconds.

    Its annotations and defaults may use what this module and `typing` define, and the file's own plain constants.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known: dict[str, Any] = {**vars(typing), **globals()}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            with suppress(Exception):  # of torch, or of what else was not imported
                exec(compile(ast.Module([node], []), str(file), "exec"), known)
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    own = function.args
    kept = ast.arguments([], [], None, own.kwonlyargs, own.kw_defaults, None, [])
    stub = ast.FunctionDef(name, kept, [ast.Pass()], [], None, None, lineno=1, col_offset=0)
    exec(compile(ast.fix_missing_locations(ast.Module([stub], [])), str(file), "exec"), known)
    return parameters_of(known[name])


def decorated(file: Path, decorator: str, known: Mapping[str, Any]) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """The functions of a file that have a decorator, and its arguments each time, without importing the file.

    Args:
        file: Python source.
        decorator: its name.
        known: what its arguments may use beside literals.

    Returns:
        (name of the function, positional arguments, keyword arguments) of each decorator, from top to bottom.
    """
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                words, facts = (
                    ast.List(call.args, ast.Load()),
                    ast.Dict([ast.Constant(own.arg) for own in call.keywords], [own.value for own in call.keywords]),
                )
                both = ast.fix_missing_locations(ast.Expression(ast.Tuple([words, facts], ast.Load())))
                found.append((node.name, *eval(compile(both, str(file), "eval"), dict(known))))
    return found


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    limits, per_expert = None, False
    while get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        limits = next((note for note in notes if isinstance(note, Range)), limits)
        per_expert = per_expert or PerExpert in notes
    if get_origin(hint) is Literal:
        return Parameter(name, str, default, choices=get_args(hint))
    if per_expert and default is not inspect.Parameter.empty:
        [default] = default  # one for all of them
    return Parameter(name, float if per_expert else hint, default, per_expert, limits)


Setting = Any
"""A value, a list of numbers over the layers, or a list of {filter, value}."""


def value_at(setting: Setting, tensor: str, depth: float) -> Any:
    """What a setting says for one tensor.

    Args:
        setting: a value; numbers that are reached one after the other from the first layer to the last; or
            {filter, value} entries of which the first counts whose filter is part of the tensor's name.
        tensor: its name.
        depth: 0 for the first layer, 1 for the last.

    Returns:
        The value, or None where no filter fits.
    """
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            pattern = entry.get("filter")
            if pattern in (None, "*") or pattern in tensor:
                return value_at(entry["value"], tensor, depth)
        return None
    place = depth * (len(setting) - 1)
    low = min(math.floor(place), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (place - low) * (setting[high] - setting[low])


def check_setting(parameter: Parameter, setting: Setting, where: str) -> None:
    """Refuses what `value_at` could not make a valid value of.

    Raises:
        FusionError: naming where it stands, the parameter and what is expected.
    """
    if not isinstance(setting, list):
        parameter.checked(setting, where)
        return
    if not setting:
        raise FusionError(f"{where}: {parameter.name} is an empty list, expected {parameter.expected}")
    if any(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            if not isinstance(entry, Mapping) or set(entry) - {"filter", "value"} or "value" not in entry:
                raise FusionError(f"{where}: {parameter.name} holds {shown(entry)}, expected {{filter: …, value: …}}")
            if not isinstance(entry.get("filter"), (str, type(None))):
                raise FusionError(f"{where}: {parameter.name} has the filter {shown(entry['filter'])}, expected a text")
            check_setting(parameter, entry["value"], where)
        return
    if parameter.kind not in (float, int):
        raise FusionError(f"{where}: {parameter.name} is {shown(setting)}, expected {parameter.expected}")
    for entry in setting:
        parameter.checked(entry, where)


def arguments_at(
    known: Mapping[str, Parameter],
    shared: Sequence[Mapping[str, Setting]],
    own: Sequence[Sequence[Mapping[str, Setting]]],
    tensor: str,
    depth: float,
) -> dict[str, Any]:
    """A method's arguments for one tensor.

    Args:
        known: the method's parameters.
        shared: settings for all experts, the most particular first.
        own: settings of each expert likewise; they count before the shared ones.
        tensor: its name.
        depth: 0 for the first layer, 1 for the last.

    Raises:
        FusionError: one that must be given is not.
    """

    def found(parameter: Parameter, settings: Sequence[Mapping[str, Setting]]) -> Any:
        for each in settings:
            value = value_at(each.get(parameter.name), tensor, depth)
            if value is not None:
                return parameter.kind(value)
        if parameter.required:
            raise FusionError(
                f"{parameter.name} is not given for {tensor}", hint=f"give {parameter.name}: {parameter.expected}"
            )
        return parameter.default

    return {
        name: [found(parameter, [*each, *shared]) for each in own] if parameter.per_expert else found(parameter, shared)
        for name, parameter in known.items()
    }
