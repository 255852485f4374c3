"""Edits READMEs in place: adds a tag, sets metadata, replaces a section. All other bytes stay unchanged.

Also escapes text for Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hf_fusion.errors import FusionError, printable
from hf_fusion.io.yaml_files import parse_yaml

_HEAD = re.compile(r"(\s*---[ \t]*\r?\n)(.*?)^---[ \t]*(?:\r?\n|\Z)", re.MULTILINE | re.DOTALL)


def add_tag(text: str, tag: str) -> str:
    """Adds a tag to the metadata of a README, which are created if there are none.

    Args:
        text: the README.
        tag: without special characters of YAML.

    Raises:
        FusionError: the metadata are not valid YAML, or the tags cannot be edited in place.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    match = _HEAD.match(text)
    if match is None:
        return newline.join(("---", "tags:", f"- {tag}", "---", "")) + (newline + text if text else "")
    before = _parse(match[2])
    tags = before.get("tags")
    present = tags if isinstance(tags, list) else [] if tags is None else [tags]
    if tag in present:
        return text
    head = _with_tag(match[2], tag, newline)
    if _parse(head) != {**before, "tags": [tag, *present]}:  # such as an alias
        raise FusionError(
            "the tags of README.md cannot be edited automatically", hint=f"add the tag {tag!r} to README.md by hand"
        )
    return text[: match.start(2)] + head + text[match.end(2) :]


def _with_tag(head: str, tag: str, newline: str) -> str:
    """Inserts the tag before the others, in block, flow or scalar notation."""
    root = yaml.compose(head, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    node = next((value for key, value in pairs if key.value == "tags"), None)
    if node is None:
        gap = "" if not head or head.endswith("\n") else newline
        return f"{head}{gap}tags:{newline}- {tag}{newline}"
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return f"{head[:start]}- {tag}{newline}{' ' * node.start_mark.column}{head[start:]}"
    if isinstance(node, yaml.SequenceNode):
        return f"{head[: start + 1]}{tag}{', ' if node.value else ''}{head[start + 1 :]}"
    if start == end:  # no value after the colon
        return f"{head[:start]} [{tag}]{head[end:]}"
    known = head[start:end] if yaml.safe_load(head[start:end]) is not None else ""
    return f"{head[:start]}[{tag}{', ' if known else ''}{known}]{head[end:]}"


def read_metadata(text: str) -> dict[str, Any]:
    """The metadata of a README; empty if there are none.

    Raises:
        FusionError: the metadata are not valid YAML, or not a mapping.
    """
    match = _HEAD.match(text)
    return _parse(match[2]) if match else {}


def filter_metadata(metadata: object) -> dict[str, Any]:
    """The metadata of a card that this package uses, without values of the wrong type."""
    card = metadata if isinstance(metadata, dict) else {}
    kinds = {"base_model": _is_names, "license": _is_names, "pipeline_tag": _is_name}
    return {key: card[key] for key, is_right in kinds.items() if is_right(card.get(key))}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_names(value: object) -> bool:
    return _is_name(value) or isinstance(value, list) and bool(value) and all(map(_is_name, value))


def put_metadata(text: str, values: dict[str, Any]) -> str:
    """Sets keys in the metadata of a README, which are created if there are none.

    Other keys keep their values and order. If all values are set already, the text is unchanged.

    Args:
        text: the README.
        values: key → YAML value.

    Raises:
        FusionError: the metadata are not valid YAML, or not a mapping.
    """
    match, before = _HEAD.match(text), read_metadata(text)
    if all(key in before and before[key] == value for key, value in values.items()):
        return text
    newline = "\r\n" if "\r\n" in text else "\n"
    head = yaml.safe_dump({**before, **values}, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{head}---\n".replace("\n", newline) + text[match.end() if match else 0 :]


def _parse(head: str) -> dict[str, Any]:
    content = parse_yaml(head, "the metadata of README.md", repeated=True)
    if content is not None and not isinstance(content, dict):
        raise FusionError("the metadata of README.md is not a mapping of names to values", "correct it")
    return content or {}


def put_section(text: str, name: str, section: str) -> str:
    """Replaces a section between markers in a README, or appends it.

    Args:
        text: the README.
        name: of the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.
        section: Markdown, without the markers.

    Raises:
        FusionError: a marker has no counterpart.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    block = f"{begin}\n{section.strip()}\n{end}".replace("\n", newline)
    begins, ends = (list(re.finditer(rf"^{re.escape(mark)}[ \t]*\r?$", text, re.MULTILINE)) for mark in (begin, end))
    if not begins and not ends:
        gap = newline * max(0, 2 - (len(text) - len(text.rstrip("\r\n"))) // len(newline)) if text else ""
        return f"{text}{gap}{block}{newline}"
    if len(begins) != 1 or len(ends) != 1 or begins[0].start() > ends[0].start():
        raise FusionError(
            f"README.md has {len(begins)} begin and {len(ends)} end markers of {name} instead of one each",
            hint=f"keep one {begin} and, after it, one {end}, or remove all of them",
        )
    return text[: begins[0].start()] + block + text[ends[0].start() + len(end) :]


def escape_markdown(value: object) -> str:
    """Escapes text for Markdown: without markup, HTML, table separators or line breaks."""
    text = printable(" ".join(str("" if value is None else value).split()))
    return re.sub(r"[&<>|`*\[\]\\~#!$]", lambda match: f"&#{ord(match[0])};", text)
