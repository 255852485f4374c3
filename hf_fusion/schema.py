"""The one validator: plain values, as YAML, JSON and the command line give them, checked by annotations.

    @dataclass(frozen=True)
    class Fitting:
        split: Text = "train"
        share: Annotated[float, Range(0, 1)] = 0.15

    read(Fitting, {"share": 2}, KeyPath("suite.yaml", "tasks.cola.fitting"))

raises "suite.yaml: tasks.cola.fitting.share is 2, expected a number from 0 to 1". Understood are str, int, float, bool,
None, Any, Literal, unions, lists, tuples, dictionaries and dataclasses, and `Annotated` with what this module defines.
`parameters_of` describes the parameters of a function in the same way.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from hf_fusion.errors import FusionError, listed, nearest, shown, suggestion

MOST = 1 << 63  # whole numbers must be smaller: torch's are, and Python's have no end
REQUIRED = inspect.Parameter.empty
"""The default of a field that must be given."""
_WRONG = object()
Class = TypeVar("Class")


@dataclass(frozen=True)
class KeyPath:
    """Where a value stands, for errors: in a file or a model, below these keys."""

    file: str
    path: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.path)))

    def inner(self, *keys: object) -> KeyPath:
        """The key path of a mapping's value, or of a list's element, which these keys lead to."""
        path = self.path
        for key in keys:
            name = key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 200 else shown(key)
            path += f"[{key}]" if type(key) is int else f".{name}" if path else str(name)
        return KeyPath(self.file, path)


# ---------------------------------------------------------------- what annotations may say beside a type


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}" if self.low > -math.inf else ""
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Expected:
    """What a value must be, in words for errors, and a check of the value beyond that of its type."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True


@dataclass(frozen=True)
class OneOf:
    """The texts that a value may be, where `Literal` cannot list them."""

    choices: Sequence[str]


@dataclass(frozen=True)
class Before:
    """A conversion of the value as it was written, before it is checked; it takes the key path for its errors."""

    convert: Callable[[Any, KeyPath], Any]


PER_EXPERT = "one for each expert"
"""Marks a parameter of which every expert has its own."""
EachNumber = Annotated[Sequence[float], PER_EXPERT]
"""A number for every expert; given once, it counts for all of them."""
Per = Literal["tensor", "row", "column"]
"""What is measured, and weighed, as one."""


def is_text(value: object) -> bool:
    """Whether a value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def is_plain(value: object) -> bool:
    """Whether a value is one that YAML and JSON give."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(each) for pair in value.items() for each in pair)
    return value is None or type(value) in (str, int, float, bool)


Text = Annotated[str, Expected("a string", is_text)]
Settings = Annotated[
    dict[str, Any], Before(lambda value, where: {} if value is None else value), Expected("names and values")
]
"""Parameters by name, whatever they are; null for none."""


# ---------------------------------------------------------------- fields


@dataclass(frozen=True)
class Field:
    """One field of a class, or one parameter of a function.

    Attributes:
        name: in files.
        hint: its annotation; of one number.
        default: `REQUIRED` where it must be given.
        per_expert: whether every expert has its own.
    """

    name: str
    hint: Any
    default: Any = REQUIRED
    per_expert: bool = False

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is REQUIRED

    @property
    def kind(self) -> Any:
        """Its type: float, int, bool, or str also where a text is one of several."""
        kind = _parts(self.hint)[0]
        return str if get_origin(kind) is Literal else kind

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        return expected(self.hint)


def fields_of(cls: Any) -> dict[str, Field]:
    """The fields of a dataclass, by name."""
    return _fields_of(cls)


@cache
def _fields_of(cls: Any) -> dict[str, Field]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for row in dataclasses.fields(cls):
        has_default = row.default is not dataclasses.MISSING or row.default_factory is not dataclasses.MISSING
        found[row.name] = Field(row.name, hints[row.name], None if has_default else REQUIRED)
    return found


@cache
def parameters_of(function: Callable[..., Any]) -> dict[str, Field]:
    """The parameters of a function that are given by name: those after the ``*``, and those that have a default."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint, default = hints.get(name), parameter.default
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and default is REQUIRED:
            continue
        if per_expert := PER_EXPERT in get_args(hint):
            notes = [note for note in get_args(hint)[1:] if note != PER_EXPERT]
            hint = Annotated[(float, *notes)] if notes else float
            default = default if default is REQUIRED else default[0]  # one for all of them
        found[name] = Field(name, hint, default, per_expert)
    return found


# ---------------------------------------------------------------- checking


def read(hint: Any, value: object, where: KeyPath, *keys: object) -> Any:
    """A plain value as an annotation says.

    Args:
        hint: the annotation.
        value: as YAML or JSON give it.
        where: the file, and the keys that lead to the value, or to what holds it;
        keys: then those that lead on to the value.

    Raises:
        FusionError: it is something else; naming its key path, what it is and what is expected.
    """
    if hint is str and isinstance(value, str) or hint is int and type(value) is int and abs(value) < MOST:
        return value  # one of thousands: to write their paths down would take longer than to check them
    where, (kind, notes) = where.inner(*keys), _parts(hint)
    for note in notes:
        if isinstance(note, Before):
            value = note.convert(value, where)
    found = _converted(kind, value, where)
    if found is _WRONG or not all(_holds(note, found) for note in notes):
        choices = [each for note in notes if isinstance(note, OneOf) for each in note.choices]
        choices += get_args(kind) if get_origin(kind) is Literal else ()
        near = isinstance(value, str) and nearest(value, choices)
        raise _wrong(value, hint, where, suggestion(value, choices) if near else None)
    return found


def _wrong(value: object, hint: Any, where: KeyPath, what_next: str | None) -> FusionError:
    verb = "is" if where.path else "holds"
    return FusionError(f"{where} {verb} {shown(value)}, expected {expected(hint)}", what_next)


def read_class(
    cls: type[Class], content: object, where: KeyPath, defaults: Mapping[str, Any] | None = None, **given: Any
) -> Class:
    """A dataclass of the plain values that a mapping holds.

    Args:
        cls: its fields are the mapping's keys.
        content: the mapping.
        where: the file, and the keys that lead to it.
        defaults: values of fields, read already, that count where the mapping has none.
        given: fields that are not read.

    Raises:
        FusionError: a key is unknown or missing, or a value is not what its field says.
    """
    known = {name: field for name, field in fields_of(cls).items() if name not in given}
    if not isinstance(content, Mapping):
        raise _wrong(content, cls, where, f"use {listed([*known])}")
    values = {**(defaults or {}), **read_fields(known, content, where)}
    for name, field in known.items():
        if field.required and name not in values:
            raise FusionError(f"{where.inner(name)} is missing", f"{name}: {field.expected}")
    return cls(**given, **values)


def read_fields(known: Mapping[str, Field], content: Mapping[Any, Any], where: KeyPath) -> dict[str, Any]:
    """The plain values of a mapping, each by its field; not all of them must be there.

    Raises:
        FusionError: a key is unknown, or a value is not what its field says.
    """
    refuse_unknown(content, known, where)
    return {key: read(known[key].hint, value, where, key) for key, value in content.items()}


def refuse_unknown(content: Iterable[object], known: Iterable[str], where: KeyPath) -> None:
    """Raises a `FusionError` for the first key that is not known, with the closest one that is."""
    known = list(known)
    for key in content:
        if key not in known:
            raise FusionError(f"{where.inner(key)} is not a supported key", suggestion(key, known))


def expected(hint: Any) -> str:
    """What a value must be, in words."""
    kind, notes = _parts(hint)
    for note in notes:
        if isinstance(note, Expected):
            return note.words
        if isinstance(note, OneOf):
            return f"one of {listed(note.choices)}"
    return " ".join(filter(None, [_words(kind), *(str(note) for note in notes if isinstance(note, Range))]))


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {listed(inner)}"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(each) for each in inner if each is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        known = fields_of(kind)
        named = [name for name, field in known.items() if field.required or len(known) <= 3]
        return f"{{{', '.join(f'{name}: …' for name in named)}}}"
    if origin in (list, tuple, Sequence):
        if dataclasses.is_dataclass(inner[0]):
            return f"a list of {expected(inner[0])}"
        return "a list of strings" if inner[0] in (str, Text) else "a list"
    return _NAMES.get(origin or kind, "a value")


_NAMES: dict[Any, str] = {
    **{str: "a string", int: "a whole number", float: "a number", bool: "true or false"},
    **{dict: "names and values", Mapping: "names and values"},
}


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation's type, and what is noted beside it."""
    return (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())


def _holds(note: object, value: Any) -> bool:
    if isinstance(note, Range):
        return bool(note.low <= value <= note.high)
    if isinstance(note, OneOf):
        return value in note.choices
    return note.holds(value) if isinstance(note, Expected) else True


def _converted(kind: Any, value: Any, where: KeyPath) -> Any:
    """A value as its type has it, `_WRONG` where it is another; what is wrong inside of it is raised."""
    cls, origin, inner = kind, get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is float:
        number = float(value) if type(value) is int and abs(value) < MOST else value
        return number if type(number) is float and math.isfinite(number) else _WRONG
    if kind is int:
        return value if type(value) is int and abs(value) < MOST else _WRONG
    if kind in (bool, types.NoneType):
        return value if type(value) is kind else _WRONG
    if origin is Literal:
        return value if isinstance(value, str) and value in inner else _WRONG
    if origin in (Union, types.UnionType):
        fitting = [each for each in inner if _is_alike(each, value)]
        return read(fitting[0], value, where) if fitting else _WRONG
    if not _is_alike(kind, value):
        return _WRONG
    if dataclasses.is_dataclass(kind):
        return read_class(cls, value, where)
    if origin in (list, tuple, Sequence):
        each = inner if origin is tuple and Ellipsis not in inner else inner[:1] * len(value)
        if len(each) != len(value):
            return _WRONG
        read_all = [read(hint, item, where, i) for i, (hint, item) in enumerate(zip(each, value, strict=True))]
        return tuple(read_all) if origin is tuple else read_all
    if origin in (dict, Mapping):
        of = KeyPath(where.file, f"a key of {where.path}")
        keys = [read(inner[0], key, of) for key in value]
        return {key: read(inner[1], item, where, key) for key, item in zip(keys, value.values(), strict=True)}
    return value


def _is_alike(hint: Any, value: object) -> bool:
    """Whether a value is of the outermost type that an annotation names."""
    kind = _parts(hint)[0]
    origin = get_origin(kind) or kind
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple))
    if origin in (dict, Mapping) or dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping)
    if origin is float:
        return type(value) in (float, int)
    if origin in (int, bool, types.NoneType):
        return type(value) is origin
    return isinstance(value, str) if origin in (str, Literal) else origin is Any or isinstance(value, origin)
