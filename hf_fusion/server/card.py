"""The YAML front matter of a README.md: safe parsing of untrusted text, and the Hub's checks."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import yaml

from hf_fusion.server.plain_json import MAX_DEPTH, MAX_VALUES, plain

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MAX_YAML = 1 << 20 if yaml.__with_libyaml__ else 1 << 16

# field → types that the Hub accepts
_SHAPES: dict[str, tuple[type, ...]] = {
    "license": (str, list),
    "library_name": (str,),
    "pipeline_tag": (str,),
    "tags": (list,),
    "datasets": (str, list),
    "base_model": (str, list),
    "base_model_relation": (str,),
    "language": (str, list),
    "model-index": (list,),
}
_NAMES: dict[type, str] = {str: "a string", list: "an array"}


# libyaml reads a megabyte in a second; without it, less is read
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _refuse_bombs(source: str) -> None:
    """Check a card's YAML before it is loaded.

    Raises:
        yaml.YAMLError: it has aliases, which can expand to gigabytes, or too many values or levels.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(source, _LOADER)):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a card")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES:,} values")


def split(text: str) -> tuple[str, str]:
    """A card's YAML and its text; the YAML is empty without front matter."""
    match = FRONT_MATTER.match(text[: MAX_YAML + 16])
    return (match[1], text[match.end() :]) if match else ("", text)


def parse(text: str) -> dict[str, Any]:
    """The metadata of a card, as plain JSON values; the result is cached and must not be changed.

    Raises:
        ValueError: the YAML cannot be read, or is not a mapping.
    """
    found = _parse(split(text)[0])
    if isinstance(found, str):
        raise ValueError(found)
    return found


@lru_cache(maxsize=16)
def _parse(source: str) -> dict[str, Any] | str:
    """The metadata, or the error message; cached, since a client checks a card and then pushes it."""
    try:
        _refuse_bombs(source)
        data = yaml.load(source, _LOADER)  # noqa: S506 - a SafeLoader
        data = {} if data is None else data
        if not isinstance(data, dict):
            return "the metadata must be a mapping of names to values"
        metadata: dict[str, Any] = plain(json.loads(json.dumps(data, default=str)))
        return metadata
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        return f"the metadata is not valid YAML: {error}"


def problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card, in words for its author."""
    if not split(text)[0]:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = parse(text)
    except ValueError as error:
        return [str(error)], []
    errors = [
        f'"{name}" must be {" or ".join(_NAMES[shape] for shape in shapes)}'
        for name, shapes in _SHAPES.items()
        if data.get(name) is not None and not isinstance(data[name], shapes)
    ]
    return errors, []


def strings(value: object) -> list[str]:
    """A field that may be one string or several, always as a list."""
    items = value if isinstance(value, list) else [value]
    return [str(item) for item in items if item is not None and not isinstance(item, (dict, list))]
