"""YAML as plain data, from whoever wrote it: small, finite, and with nothing in it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.io.files import open_given

MAX_BYTES = 200_000
MAX_VALUES = 50_000  # aliases counted as often as they are used
MAX_DEPTH = 50
MAX_DIGITS = 100  # of what is not a text; PyYAML's time for 1:1:1… grows with its square
_TEXT = "tag:yaml.org,2002:str"


def read_yaml(path: Path) -> Any:
    """The only document of a YAML file.

    Raises:
        FusionError: it cannot be read, is too large or not UTF-8, is not YAML, names a key twice (parsers disagree on
            which counts), or holds itself or too much through aliases.
    """
    try:
        with open_given(path, called=one_line(path)) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FusionError(f"{one_line(path)} cannot be read ({error.strerror}).", "check the path") from None
    if len(raw) > MAX_BYTES:
        raise FusionError(f"{path} is longer than {MAX_BYTES} bytes: no recipe is.", "check the path")
    try:
        text = raw.decode()
    except ValueError as error:
        raise FusionError(f"{path} is not valid YAML: {one_line(error)}", "correct it there") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path | str, *, repeated: bool = False) -> Any:
    """The only document of a text in YAML.

    Args:
        text: the YAML.
        path: what errors call it.
        repeated: whether a key may be there twice: then the last counts.

    Raises:
        FusionError: as `read_yaml`.
    """
    if len(text) > MAX_BYTES:
        raise FusionError(f"{path} has {len(text):,} characters of YAML: none is so long.", "shorten it")
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
        reason = f"it is nested more than {MAX_DEPTH} deep"
    # scalars that do not fit their tag (2001-99-99, !!bool x) fail in PyYAML's constructors, each in its own way
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = one_line(error)
    raise FusionError(f"{path} is not valid YAML: {reason}", "correct it there")


def _several(path: Path | str, loader: yaml.SafeLoader, first: yaml.Node | None) -> FusionError:
    """What a file of several documents is: mergekit-multi keeps merges that build on each other in one."""
    nodes = [first]
    while loader.check_node():
        nodes.append(loader.get_node())
    mappings = [node.value for node in nodes if isinstance(node, yaml.MappingNode)]
    if any(key.value == "merge_method" for pairs in mappings for key, _ in pairs):
        return FusionError(
            f"{path} holds {len(nodes)} merges, of which some are models of others, as mergekit-multi runs them: one is"
            " fused at a time",
            "save each as a file, fuse them in order, and write the --output folder of a merge where the next names it",
        )
    return FusionError(f"{path} holds {len(nodes)} YAML documents, where one is read", "save each as a file of its own")


def _check(root: yaml.Node | None, repeated: bool) -> None:
    """Refuses what would not end, or not say one thing, before any value is made of it."""
    pending = [] if root is None else [(root, 0)]
    seen = 0
    while pending:
        node, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or holds itself")
        if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT and len(node.value) > MAX_DIGITS:
            raise ValueError(f"{shown(node.value)} is longer than any number, line {node.start_mark.line + 1}")
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys and not repeated:
                    raise ValueError(f"{shown(key.value)} is there twice, again in line {key.start_mark.line + 1}")
                keys.add((key.tag, key.value))
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        seen += len(children)
        if seen > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES} values, aliases counted each time")
        pending += [(child, depth + 1) for child in children]
