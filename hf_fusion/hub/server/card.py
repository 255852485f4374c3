"""The YAML at the top of a README.md: parsed without trusting it, checked as the Hub checks it."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MAX_YAML = 1 << 20

# field -> what the Hub wants it to be
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


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases: nested aliases make a few lines unfold into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a card")
        return super().compose_node(parent, index)


def split(text: str) -> tuple[str, str]:
    """A card's YAML and its text; the YAML is empty where there is none."""
    match = FRONT_MATTER.match(text[: MAX_YAML + 16])
    return (match[1], text[match.end() :]) if match else ("", text)


def parse(text: str) -> dict[str, Any]:
    """The metadata of a card, as plain JSON values.

    Raises:
        ValueError: the YAML cannot be read, or is not a mapping.
    """
    source, _ = split(text)
    try:
        data = yaml.load(source, _Loader)  # noqa: S506 - a SafeLoader
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise ValueError("the metadata must be a mapping of names to values")
        return json.loads(json.dumps(data, default=str))
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(f"the metadata is no valid YAML: {error}") from error


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


def strings(value: Any) -> list[str]:
    """A field that may be one string or several, always as a list."""
    items = value if isinstance(value, list) else [value]
    return [str(item) for item in items if item is not None and not isinstance(item, (dict, list))]
