"""Validation of config.json: a table of fields and kinds, checked before a model is built."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

FILE = "config.json"
FORMAT = 1
"""The format version that this code writes, and the newest one that it reads."""
MAX_DEPTH, MAX_TEXT = 64, 1 << 20  # levels of lists and mappings; characters of a string
# transformers builds lists of these lengths before any weight could show that they are wrong
LISTED = re.compile(r"layer|depth|stage|labels|num_blocks")
MAX_LISTED = 1 << 16
ROOTS = ("eps", "epsilon", "theta")  # negative values give NaN
# some models can be built with negative sizes, and only fail when they run
SIZE = re.compile(r"(?!.*window)((num|n|max)_.*|.*_(size|sizes|dim|heads|layers|channels|labels)|d_(model|ff|kv)|dim)")
Row = tuple[str, Any, bool, str]
"""(field, value, whether it is valid, what is expected)"""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


class Kind(NamedTuple):
    """The allowed values of a field.

    Attributes:
        find: (value, field) → rows with the faults in it.
        required: whether the file must contain the field.
    """

    find: Callable[[Any, str], Iterator[Row]]
    required: bool = True


Table = Mapping[str, Kind]


def kind(accepts: Callable[[Any], bool], expected: str) -> Kind:
    """A value that `accepts` returns True for."""
    return Kind(lambda value, where: iter([] if accepts(value) else [(where, value, False, expected)]))


def one_of(*allowed: Any) -> Kind:
    """One of the given strings or numbers."""
    return kind(
        lambda value: any(value == known and type(value) is type(known) for known in allowed),
        f"one of {', '.join(map(str, allowed))}",
    )


def whole(least: int = 0) -> Kind:
    """An integer from `least` to 2³¹ - 1."""
    return kind(lambda value: type(value) is int and least <= value < 1 << 31, f"a whole number of at least {least}")


def number(above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Kind:
    """A finite number greater than `above`, at least `least` and at most `most`."""
    known = {"above": above, "at least": least, "at most": most}
    limits = " and".join(f" {name} {limit:g}" for name, limit in known.items() if math.isfinite(limit))
    return kind(
        lambda value: type(value) in (int, float) and above < value and least <= value <= most and abs(value) < 1e300,
        f"a number{limits}",
    )


def optional(inner: Kind) -> Kind:
    """A value that can be null or missing."""
    return Kind(lambda value, where: iter([]) if value is None else inner.find(value, where), required=False)


def each(inner: Kind, least: int = 0) -> Kind:
    """A list of at least `least` values of one kind."""

    def find(value: Any, where: str) -> Iterator[Row]:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            yield where, value, False, f"a list of at least {least}" if least else "a list"
            return
        for index, entry in enumerate(value):
            yield from inner.find(entry, f"{where}[{index}]")

    return Kind(find)


def values(inner: Kind) -> Kind:
    """A mapping of names to values."""

    def find(value: Any, where: str) -> Iterator[Row]:
        if not isinstance(value, Mapping):
            yield where, value, False, "names and values"
            return
        for key, entry in value.items():
            yield from inner.find(entry, f"{where}[{_short.repr(key)}]")

    return Kind(find)


def row(table: Table) -> Kind:
    """A mapping with known keys; further keys are allowed."""

    def find(value: Any, where: str) -> Iterator[Row]:
        if not isinstance(value, Mapping):
            yield where, value, False, "names and values"
            return
        for key, inner in table.items():
            if key in value:
                yield from inner.find(value[key], f"{where}.{key}")
            elif inner.required:
                yield f"{where}.{key}", "missing", False, "there"

    return Kind(find)


FLAG = kind(lambda value: isinstance(value, bool), "true or false")
TEXT = kind(lambda value: isinstance(value, str), "a string")
NAME = kind(
    lambda value: isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable(), "a name, printable"
)
MAPPING = kind(lambda value: isinstance(value, Mapping), "names and values")
TOKENS = kind(
    lambda value: type(value) is int or (isinstance(value, list) and all(type(token) is int for token in value)),
    "the id of a token",
)
MODEL = row({"model_type": NAME})
"""The config of an inner model."""
CLASSES = kind(
    lambda value: (
        isinstance(value, Mapping)
        and sorted(map(str, value)) == sorted(map(str, range(len(value))))
        and all(isinstance(label, str) for label in value.values())
    ),
    "a name for each class, numbered from 0",
)
FLAGS: Table = {
    name: optional(FLAG)
    for name in (
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_word_embeddings",
    )
}
# fields that modules of many models read from every config, and that config classes do not check
INNER: Table = {**FLAGS, "chunk_size_feed_forward": optional(whole())}
# fields of every config of transformers
COMMON: Table = {
    **INNER,
    "format_version": optional(whole()),
    "id2label": optional(CLASSES),
    "label2id": optional(values(whole())),
    "num_labels": optional(whole(1)),
    "problem_type": optional(
        one_of("regression", "single_label_classification", "multi_label_classification", "semantic_segmentation")
    ),
    "dtype": optional(one_of("float32", "float16", "bfloat16", "float64")),
    "torch_dtype": optional(one_of("float32", "float16", "bfloat16", "float64")),
    "architectures": optional(each(NAME)),
    "pad_token_id": optional(whole(-1)),
    "bos_token_id": optional(TOKENS),
    "eos_token_id": optional(TOKENS),
    "recipe": optional(MAPPING),
    "chunk_size_feed_forward": optional(whole()),
    "attn_implementation": optional(NAME),
}


def refuse(rows: Iterator[Row] | Sequence[Row], prefix: str = f"{FILE}: ") -> None:
    """Raises ValueError for the first invalid row; the message begins with `prefix`."""
    for where, value, is_right, expected in rows:
        if not is_right:
            printed = "missing" if value == "missing" else f"{_short.repr(value)}"
            raise ValueError(f"{prefix}{where.lstrip('.')} is {printed}; it must be {expected}")


def check_file(content: Any, table: Table, config_class: type) -> None:
    """Check the content of a config.json.

    Args:
        content: the parsed JSON.
        table: the fields of the family.
        config_class: the class to build from it.

    Raises:
        ValueError: a field is invalid, or the format is newer; the message names the field and what is expected.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{FILE} holds {_short.repr(content)}; it must hold names and values")
    check_format(content.get("format_version"))
    refuse(_plain(content, "", 0))
    refuse(
        (key, value, not callable(getattr(config_class, key, None)), "a field that is a value")
        for key, value in content.items()
    )
    refuse(row({**COMMON, **table}).find(content, ""))


def check_values(config: Any, table: Table) -> None:
    """Check a config that was built in Python, for those fields that are set."""
    given = {name: getattr(config, name) for name in table if getattr(config, name, None) is not None}
    refuse(row({name: table[name] for name in given}).find(given, ""), f"{type(config).__name__}.")


class NewerFormatError(ValueError):
    """A config has a newer format than this code reads."""


def check_format(version: Any) -> None:
    """Raises NewerFormatError for a format that is newer than this code; the oldest files have no version."""
    if type(version) is int and version > FORMAT:
        raise NewerFormatError(
            f"this folder was saved by a newer hf_fusion (format {_short.repr(version)}, this one reads up to "
            f"{FORMAT}): pip install -U hf_fusion, or load it with its own code: trust_remote_code=True"
        )


def check_sizes(content: Mapping[str, Any], where: str = "") -> None:
    """Check numbers of layers, sizes and flags before a model is built on the meta device.

    Args:
        content: the config of a model.
        where: name of the config in error messages.

    Raises:
        ValueError: a field is invalid; the message names it.
    """
    refuse(_sizes(content, where))
    refuse(row(INNER).find(content, where))


def check_plain(content: Mapping[str, Any]) -> None:
    """Check for values that no field can have: NaN, numbers of more than 64 bits, very long strings, deep nesting.

    Raises:
        ValueError: a field is invalid; the message names it.
    """
    refuse(found for key, value in content.items() for found in _plain(value, str(key), 1))


def inner_config(build: Callable[..., Any], content: Mapping[str, Any], where: str) -> Any:
    """The config of an inner model.

    Args:
        build: `AutoConfig.for_model`.
        content: its arguments.
        where: name of the config in error messages.

    Raises:
        ValueError: they describe no valid config; the message says where and why.
    """
    check_sizes(content, where)
    try:
        return build(**content)
    except Exception as error:  # config classes of transformers raise various errors for such values
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        printed = "".join(character if character.isprintable() else "?" for character in reason)
        raise ValueError(f"{FILE}: {where} describes no model ({printed})") from None


def _plain(value: Any, where: str, depth: int) -> Iterator[Row]:
    """Rows for values that no field can have."""
    if depth > MAX_DEPTH:
        yield where[:100], "nested deeply", False, f"of at most {MAX_DEPTH} levels"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            name = key if str(key).isidentifier() else f"[{_short.repr(key)}]"
            yield from _plain(inner, f"{where}.{name}" if name == key else where + name, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _plain(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, str):
        is_text = len(value) <= MAX_TEXT and not any("\ud800" <= character <= "\udfff" for character in value)
        yield where, value, is_text, f"Unicode of at most {MAX_TEXT} characters"
    elif isinstance(value, float):
        # some configs use Infinity for "no limit"
        yield where, value, not math.isnan(value) and (math.isfinite(value) or "limit" in where), "a finite number"
    elif isinstance(value, int):
        yield where, value, abs(value) < 1 << 63, "a number of at most 64 bits"


def _sizes(value: Any, where: str) -> Iterator[Row]:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        field, name = f"{where}.{key}".lstrip("."), str(key)
        if isinstance(inner, Mapping):
            yield from _sizes(inner, field)
            continue
        counts = [count for count in (inner if isinstance(inner, list) else [inner]) if type(count) is int]
        if LISTED.search(name):
            yield field, inner, max(counts, default=0) <= MAX_LISTED, f"at most {MAX_LISTED}"
        if SIZE.fullmatch(name):
            yield field, inner, min(counts, default=0) >= 0, "at least 0"
        if name.endswith(ROOTS) and type(inner) in (int, float):
            yield field, inner, inner >= 0, "at least 0"


__all__ = [
    "CLASSES",
    "FLAG",
    "FORMAT",
    "MAPPING",
    "MODEL",
    "NAME",
    "TEXT",
    "Row",
    "Table",
    "check_file",
    "check_format",
    "check_plain",
    "check_sizes",
    "check_values",
    "each",
    "inner_config",
    "kind",
    "number",
    "one_of",
    "optional",
    "refuse",
    "row",
    "values",
    "whole",
]
