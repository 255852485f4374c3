"""The validator: each annotation accepts its values; errors name the position and what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from hf_fusion.errors import FusionError
from hf_fusion.io.declarations import declared
from hf_fusion.schema import (
    Before,
    EachNumber,
    Expected,
    KeyPath,
    OneOf,
    Range,
    Settings,
    Text,
    fields_of,
    parameters_of,
    read,
    read_class,
)

WHERE = KeyPath("file.yaml", "key")


@dataclass(frozen=True)
class Inner:
    """What `Outer` holds."""

    share: Annotated[float, Range(0, 1)]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    """A file with all kinds of fields."""

    kind: Literal["one", "other"]
    inner: Inner | None = None
    many: dict[str, Inner] = field(default_factory=dict)
    steps: Annotated[int, Range(1)] = 1
    settings: Settings = field(default_factory=dict)


# annotation, values that pass → what becomes of them, (value, what is expected) of those that do not
KINDS: list[tuple[Any, list[tuple[Any, Any]], list[tuple[Any, str]]]] = [
    (float, [(1, 1.0), (0.5, 0.5)], [(True, "a number"), ("1", "a number"), (float("nan"), "a number")]),
    (float, [(-(1 << 62), -float(1 << 62))], [(1 << 63, "a number"), (10**400, "a number"), (None, "a number")]),
    (int, [(3, 3)], [(3.0, "a whole number"), (True, "a whole number"), (1 << 63, "a whole number")]),
    (bool, [(True, True)], [(1, "true or false"), ("true", "true or false")]),
    (str, [("", ""), ("a\nb", "a\nb")], [(1, "a string"), (None, "a string")]),
    (Text, [("a", "a")], [(" ", "a string")]),
    (str | None, [(None, None), ("a", "a")], [(1, "a string")]),
    (str | dict[str, int], [("a", "a"), ({"a": 1}, {"a": 1})], [(1, "a string or names and values")]),
    (Annotated[float, Range(0)], [(0, 0.0)], [(-1, "a number at least 0")]),
    (Annotated[float, Range()], [(-1, -1.0)], [("a", "a number")]),
    (Annotated[int, Range(1, 2)], [(2, 2)], [(3, "a whole number from 1 to 2")]),
    (Literal["a", "b"], [("a", "a")], [("c", "one of a, b"), (["a"], "one of a, b"), (None, "one of a, b")]),
    (Annotated[str, OneOf(("x", "y"))], [("x", "x")], [("z", "one of x, y"), (1, "one of x, y")]),
    (list[int], [([1], [1]), ([], [])], [(1, "a list"), ({}, "a list"), ("ab", "a list")]),
    (Sequence[str], [(("a",), ["a"])], [("ab", "a list of strings")]),
    (Annotated[list[str], Expected("at least one", bool)], [(["a"], ["a"])], [([], "at least one")]),
    (tuple[int, int], [([1, 2], (1, 2))], [([1], "a list"), ([1, 2, 3], "a list")]),
    (Mapping[str, Any], [({"a": []}, {"a": []})], [([], "names and values")]),
    (Settings, [(None, {}), ({"a": 1}, {"a": 1})], [("a", "names and values")]),
    (Annotated[str, Before(lambda value, where: str(value))], [(1, "1")], []),
    (Any, [(None, None), ([1], [1])], []),
    (Inner, [({"share": 1}, Inner(1.0))], [(1, "{share: …, names: …}")]),
    (list[Inner], [([], [])], [(1, "a list of {share: …, names: …}")]),
]


@pytest.mark.parametrize(("hint", "good", "wrong"), KINDS, ids=[str(row[0])[:60] for row in KINDS])
def test_values_pass_or_are_reported(hint, good, wrong):
    for value, made in good:
        found = read(hint, value, WHERE)
        assert found == made and type(found) is type(made)
    for value, expected in wrong:
        with pytest.raises(FusionError) as raised:
            read(hint, value, WHERE)
        assert raised.value.message.startswith("file.yaml: key is ")
        assert raised.value.message.endswith(f", expected {expected}")


# what is written → the message and the hint
FAULTS = {
    "{kind: one, steps: 0}": ("f.yaml: steps is 0, expected a whole number at least 1", None),
    "{kind: othr}": ("f.yaml: kind is 'othr', expected one of one, other", "did you mean other?"),
    "{kind: one, step: 2}": ("f.yaml: step is not a supported key", "did you mean steps?"),
    "{kind: one, 3: 2}": (
        "f.yaml: [3] is not a supported key",
        "use one of kind, inner, many, steps, settings",
    ),
    "{steps: 2}": ("f.yaml: kind is missing", "kind: one of one, other"),
    "[kind]": ("f.yaml holds ['kind'], expected {kind: …}", "use kind, inner, many, steps, settings"),
    "{kind: one, inner: {share: 2}}": ("f.yaml: inner.share is 2, expected a number from 0 to 1", None),
    "{kind: one, inner: {}}": ("f.yaml: inner.share is missing", "share: a number from 0 to 1"),
    "{kind: one, inner: {share: 1, names: [a, 3]}}": ("f.yaml: inner.names[1] is 3, expected a string", None),
    "{kind: one, many: {a: {share: x}}}": ("f.yaml: many.a.share is 'x', expected a number from 0 to 1", None),
    "{kind: one, many: {3: {share: 1}}}": ("f.yaml: a key of many is 3, expected a string", None),
    "{kind: one, settings: {[1]: 2}}": ("f.yaml is not valid YAML", None),
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_reported_by_file_and_keys(text, tmp_path):
    from hf_fusion.io.yaml_files import parse_yaml

    message, hint = FAULTS[text]
    with pytest.raises(FusionError) as raised:
        read_class(Outer, parse_yaml(text, "f.yaml"), KeyPath("f.yaml"))
    assert raised.value.message.startswith(message)
    if "valid YAML" not in message:
        assert raised.value.hint == hint


def test_defaults_apply_to_missing_keys():
    assert read_class(Outer, {"kind": "one"}, WHERE) == Outer("one")
    assert read_class(Outer, {"steps": 2}, WHERE, {"kind": "one", "steps": 3}) == Outer("one", steps=2)
    assert read_class(Inner, {}, WHERE, share=0.5) == Inner(0.5)
    with pytest.raises(FusionError, match="key.share is not a supported key"):
        read_class(Inner, {"share": 1}, WHERE, share=0.5)


def test_strange_keys_are_shown_on_one_short_line():
    for key in ("\x1b[2J", "a\nb", "x" * 10_000, ""):
        with pytest.raises(FusionError) as raised:
            read_class(Inner, {"share": 1, key: 1}, WHERE)
        assert len(raised.value.message) < 300 and raised.value.message.isprintable()


DECLARED = '''
import nowhere_to_be_found
from hf_fusion.schema import EachNumber, Range

T: float = 0.25

def between(x, *, t: Annotated[float, Range(0, 1)] = T, weight: EachNumber = (1.0,), kind: Literal["a"] = "a"):
    """A point between."""

class Model:
    def build(cls, experts: Sequence[Any], base: Any = None, top: int | None = None) -> Nothing:
        """A model."""
'''


def test_declarations_are_read_without_importing(tmp_path):
    file = Path(tmp_path / "declares.py")
    file.write_text(DECLARED, encoding="utf-8")
    found = declared(file, "between")
    assert list(found) == ["t", "weight", "kind"]
    assert [(each.kind, each.default, each.per_expert) for each in found.values()] == [
        (float, 0.25, False),
        (float, 1.0, True),
        (str, "a", False),
    ]
    assert list(declared(file, "build")) == ["base", "top"]

    def between(tensors, *, t: Annotated[float, Range(0, 1)] = 0.25, weight: EachNumber = (1.0,)) -> None: ...

    assert parameters_of(between)["weight"] == found["weight"] and parameters_of(between)["t"] == found["t"]


def test_a_field_is_required_where_it_has_no_default():
    assert [name for name, each in fields_of(Outer).items() if each.required] == ["kind"]
