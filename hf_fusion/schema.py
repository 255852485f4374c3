"""The one validator: plain values, as YAML, JSON and the command line give them, checked by annotations.

    @dataclass(frozen=True)
    class Fitting:
        split: Text = "train"
        share: Annotated[float, Range(0, 1)] = 0.15

    read(Fitting, {"share": 2}, KeyPath("suite.yaml", "tasks.cola.fitting"))

raises "suite.yaml: tasks.cola.fitting.share is 2, expected a number from 0 to 1". Supported annotations are str, int,
float, bool, None, Any, Literal, unions, lists, tuples, dictionaries and dataclasses, and `Annotated` with the marks of
this module.
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

MOST = 1 << 63  # whole numbers must be smaller: torch's have 64 bits, Python's are unbounded
REQUIRED = inspect.Parameter.empty
"""Default of a required field."""
_WRONG = object()
Class = TypeVar("Class")


@dataclass(frozen=True)
class KeyPath:
    """Where a value is, for errors: in a file or a model, below these keys."""

    file: str
    path: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.path)))

    def inner(self, *keys: object) -> KeyPath:
        """The key path of the value or list element below these keys."""
        path = self.path
        for key in keys:
            name = key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 200 else shown(key)
            path += f"[{key}]" if type(key) is int else f".{name}" if path else str(name)
        return KeyPath(self.file, path)


# ---------------------------------------------------------------- marks for `Annotated`


@dataclass(frozen=True)
class Range:
    """The range of a number, including both ends."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}" if self.low > -math.inf else ""
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Expected:
    """A description of the value for errors, and a check beyond that of its type."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True


@dataclass(frozen=True)
class OneOf:
    """The strings that a value may be, if `Literal` cannot list them."""

    choices: Sequence[str]


@dataclass(frozen=True)
class Before:
    """A conversion of the value before it is checked; it gets the key path for its errors."""

    convert: Callable[[Any, KeyPath], Any]


PER_EXPERT = "one for each expert"
"""Marks a parameter that each expert has separately."""
EachNumber = Annotated[Sequence[float], PER_EXPERT]
"""One number per expert; a single number applies to all experts."""
Per = Literal["tensor", "row", "column"]
"""The unit that is measured and weighted as a whole."""


def is_text(value: object) -> bool:
    """Whether a value is a string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_plain(value: object) -> bool:
    """Whether a value consists of types that YAML and JSON have."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(each) for pair in value.items() for each in pair)
    return value is None or type(value) in (str, int, float, bool)


Text = Annotated[str, Expected("a string", is_text)]
Settings = Annotated[
    dict[str, Any], Before(lambda value, where: {} if value is None else value), Expected("names and values")
]
"""Parameters of any type by name; null for none."""


# ---------------------------------------------------------------- fields


@dataclass(frozen=True)
class Field:
    """One field of a class, or one parameter of a function.

    Attributes:
        name: its key in files.
        hint: its annotation; for `per_expert`, that of one number.
        default: its default; `REQUIRED` if there is none.
        per_expert: whether each expert has a separate value.
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
        """Its type: float, int, bool or str; str also for a choice of strings."""
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
    """The parameters of a function that are passed by name: those after the ``*``, and those with a default."""
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
    """Checks a plain value against its annotation, and converts it.

    Args:
        hint: the annotation.
        value: the value, as read from YAML or JSON.
        where: the file, and the keys that lead to the value or to what contains it.
        keys: further keys that lead to the value.

    Raises:
        FusionError: the value does not match; the error names the key path, the value and what was expected.
    """
    if hint is str and isinstance(value, str) or hint is int and type(value) is int and abs(value) < MOST:
        return value  # often one of thousands, whose key paths would take longer to build than the check
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
    """Builds a dataclass from the plain values of a mapping.

    Args:
        cls: its fields are the mapping's keys.
        content: the mapping.
        where: the file, and the keys that lead to it.
        defaults: values, already checked, of fields that the mapping lacks.
        given: values of fields that are not read from the mapping.

    Raises:
        FusionError: a key is unknown or missing, or a value does not match its field.
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
    """Checks the values of a mapping, each against its field; keys may be missing.

    Raises:
        FusionError: a key is unknown, or a value does not match its field.
    """
    refuse_unknown(content, known, where)
    return {key: read(known[key].hint, value, where, key) for key, value in content.items()}


def refuse_unknown(content: Iterable[object], known: Iterable[str], where: KeyPath) -> None:
    """Raises a `FusionError` for the first unknown key, with the closest known one."""
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
    """An annotation's type, and its marks."""
    return (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())


def _holds(note: object, value: Any) -> bool:
    if isinstance(note, Range):
        return bool(note.low <= value <= note.high)
    if isinstance(note, OneOf):
        return value in note.choices
    return note.holds(value) if isinstance(note, Expected) else True


def _converted(kind: Any, value: Any, where: KeyPath) -> Any:
    """A value converted to its type; `_WRONG` if it has another type. Errors in inner values are raised."""
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
    """Whether a value has the outermost type of an annotation."""
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
