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
    """The single document of a YAML file.

    Raises:
        FusionError: it cannot be read, is too large or not UTF-8, is not YAML, has duplicate keys (on which parsers
            disagree), contains itself, or expands too much by aliases.
    """
    try:
        with open_given(path, called=one_line(path)) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FusionError(f"{one_line(path)} cannot be read ({error.strerror})", "check the path") from None
    if len(raw) > MAX_BYTES:
        raise FusionError(f"{path} is longer than {MAX_BYTES:,} bytes, the limit for recipes", "check the path")
    try:
        text = raw.decode()
    except ValueError as error:
        raise FusionError(f"{path} is not valid YAML: {one_line(error)}", "correct the file") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path | str, *, repeated: bool = False) -> Any:
    """The single document of a YAML text.

    Args:
        text: the YAML.
        path: its name in errors.
        repeated: whether duplicate keys are allowed; then the last one counts.

    Raises:
        FusionError: see `read_yaml`.
    """
    if len(text) > MAX_BYTES:
        raise FusionError(
            f"{path} has {len(text):,} characters of YAML, more than the limit of {MAX_BYTES:,}", "shorten it"
        )
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_node() if loader.check_node() else None
            if loader.check_node():
                raise _several(path, loader, root)
            _check(root, repeated)
            return None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        reason = f"it is nested more than {MAX_DEPTH} levels deep"
    # scalars that do not match their tag (2001-99-99, !!bool x) raise various errors in PyYAML's constructors
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = one_line(error)
    raise FusionError(f"{path} is not valid YAML: {reason}", "correct the file")


def _several(path: Path | str, loader: yaml.SafeLoader, first: yaml.Node | None) -> FusionError:
    """The error for a file with several documents; mergekit-multi uses them for merges that depend on each other."""
    nodes = [first]
    while loader.check_node():
        nodes.append(loader.get_node())
    mappings = [node.value for node in nodes if isinstance(node, yaml.MappingNode)]
    if any(key.value == "merge_method" for pairs in mappings for key, _ in pairs):
        return FusionError(
            f"{path} contains {len(nodes)} merges, as for mergekit-multi, but hf_fusion runs one merge at a time",
            "save each in a separate file, fuse them in order, and name the --output folder of a merge in the next",
        )
    return FusionError(f"{path} contains {len(nodes)} YAML documents instead of one", "save each in a separate file")


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
