"""Parses untrusted YAML, with limits on size, nesting and values, and without duplicate keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.io.files import open_given

MAX_BYTES = 200_000
MAX_VALUES = 50_000  # aliases count at each use
MAX_DEPTH = 50
MAX_DIGITS = 100  # of scalars other than strings; PyYAML's time for 1:1:1… is quadratic
_TEXT = "tag:yaml.org,2002:str"


def read_yaml(path: Path) -> Any:
    """The single document of a YAML file; see `read_documents`."""
    return parse_yaml(_text(path), path)


def read_documents(path: Path) -> list[Any]:
    """All documents of a YAML file.

    Raises:
        FusionError: it cannot be read, is too large or not UTF-8, is not YAML, has duplicate keys (on which parsers
            disagree), contains itself, or expands too much by aliases.
    """
    return _documents(_text(path), path)


def _text(path: Path) -> str:
    try:
        with open_given(path, called=one_line(path)) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FusionError(f"{one_line(path)} cannot be read ({error.strerror})", "check the path") from None
    if len(raw) > MAX_BYTES:
        raise FusionError(f"{path} is longer than {MAX_BYTES:,} bytes, the limit for recipes", "check the path")
    try:
        return raw.decode()
    except ValueError as error:
        raise FusionError(f"{path} is not valid YAML: {one_line(error)}", "correct the file") from None


def parse_yaml(text: str, path: Path | str, *, repeated: bool = False) -> Any:
    """The single document of a YAML text.

    Args:
        text: the YAML.
        path: its name in errors.
        repeated: whether duplicate keys are allowed; then the last one counts.

    Raises:
        FusionError: see `read_documents`, or there are several documents.
    """
    found = _documents(text, path, repeated=repeated, is_single=True)
    return found[0] if found else None


def _documents(text: str, path: Path | str, *, repeated: bool = False, is_single: bool = False) -> list[Any]:
    if len(text) > MAX_BYTES:
        raise FusionError(
            f"{path} has {len(text):,} characters of YAML, more than the limit of {MAX_BYTES:,}", "shorten it"
        )
    try:
        loader = yaml.SafeLoader(text)
        try:
            nodes = []
            while loader.check_node():
                nodes.append(loader.get_node())
            if is_single and len(nodes) > 1:
                what = f"{path} contains {len(nodes)} YAML documents instead of one"
                raise FusionError(what, "save each in a separate file")
            for node in nodes:
                _check(node, repeated)
            return [loader.construct_document(node) for node in nodes]
        finally:
            loader.dispose()
    except RecursionError:
        reason = f"it is nested more than {MAX_DEPTH} levels deep"
    # scalars that do not match their tag (2001-99-99, !!bool x) raise various errors in PyYAML's constructors
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = one_line(error)
    raise FusionError(f"{path} is not valid YAML: {reason}", "correct the file")


def _check(root: yaml.Node | None, repeated: bool) -> None:
    """Raises for recursion, duplicate keys and excessive size, before values are constructed."""
    pending = [] if root is None else [(root, 0)]
    seen = 0
    while pending:
        node, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep, or contains itself")
        if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT and len(node.value) > MAX_DIGITS:
            raise ValueError(f"{shown(node.value)} in line {node.start_mark.line + 1} is too long for a number")
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys and not repeated:
                    raise ValueError(
                        f"the key {shown(key.value)} occurs twice, the second time in line {key.start_mark.line + 1}"
                    )
                keys.add((key.tag, key.value))
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        seen += len(children)
        if seen > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values, counting aliases at each use")
        pending += [(child, depth + 1) for child in children]
