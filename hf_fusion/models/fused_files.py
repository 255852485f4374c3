"""Checks that a published model reads only files of its own repo or folder.

transformers opens files that an index, a configuration or a link names, and saves and pushes their content.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

INDEXES = ("model.safetensors.index.json",)
ALL_INDEXES = (*INDEXES, "pytorch_model.bin.index.json")
PROCESSOR_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
MOST_BYTES = 256 << 20  # of a JSON file; the largest that are known have a tenth of it
_PLAIN = re.compile(r"(?!\.+$)[\w.-]{1,200}", re.ASCII)
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
# keys of which values are paths; other texts are looked at if they have a separator
_PATHS = re.compile(r"(\w+_)?(files?|paths?|dir|folders?|subfolder|vocab|merges|spm)|init_inputs|repo_id")
# texts that nothing opens: tokens, labels, templates, and where something was made
_TEXTS = re.compile(
    r"\w*name_or_path|special_tokens_map_file|chat_template\w*|id2label|label2id|\w*_tokens?|added_tokens_decoder|content"
)
# names that are looked for in the model alone, never in the folder that this runs in
_WITHIN = ("fast_tokenizer_files", "folders", "subfolder")
_BELOW = re.compile(r"processor_\d+|additional_chat_templates|\w+_tokenizer")
_SHARED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")


class ForeignFileError(ValueError):
    """A model names or links to a file outside of its repo or folder."""


def check_files(source: Any, hub: Mapping[str, Any], indexes: tuple[str, ...] = INDEXES) -> None:
    """Check that index files and configuration name no files elsewhere, and that no link leads out of the folder.

    Args:
        source: a folder, or an id on the Hub.
        hub: revision, subfolder and other Hub arguments of ``from_pretrained``.
        indexes: the index files that may be read.

    Raises:
        ForeignFileError: there is one; the message names both files.
    """
    folder = Path(source, hub.get("subfolder") or "")
    if Path(source).is_dir() and folder.is_dir():
        _check_folder(folder)
    for file in indexes:
        content = _read(source, file, hub)
        if content is None:
            continue
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict):
            raise ForeignFileError(f"{source}: {file} has no weight_map")
        for place in places.values():
            if not is_plain(place):
                raise ForeignFileError(f"{source}: {file} names {place!r}, which is not a file beside it")
    config = _read(source, "config.json", hub)
    if isinstance(config, dict) and (other := config.get("transformers_weights")) and not is_plain(other):
        raise ForeignFileError(f"{source}: config.json names the weights {other!r}, which are not files beside it")


def check_processor(source: Any, hub: Mapping[str, Any]) -> None:
    """Check that the configuration of a tokenizer or image processor names no file outside of its model.

    Args:
        source: a folder, or an id on the Hub.
        hub: revision, subfolder and other Hub arguments of ``from_pretrained``.

    Raises:
        ForeignFileError: there is one; the message names both files.
    """
    folder = Path(source, hub.get("subfolder") or "")
    if Path(source).is_dir() and folder.is_dir():
        _check_folder(folder)
    for file in PROCESSOR_FILES:
        for key, value in _paths(_read(source, file, hub)):
            if _leads_out(key, value, folder, is_here=Path(source).is_dir()):
                raise ForeignFileError(f"{source}: {file} has {key}: {value!r}, which is outside the model's folder")


def check_base(source: Any, base: Any) -> None:
    """Check that a base that is referenced at a commit on the Hub is not read from a local folder instead.

    Args:
        source: the model.
        base: what its configuration names.

    Raises:
        ForeignFileError: naming the base.
    """
    if not isinstance(base, str) or not _REPO.fullmatch(base) or base.startswith(".") or ".." in base:
        raise ForeignFileError(f"{source} names {base!r} as its base, which is not an id on the Hub")
    if Path(base).is_dir():
        raise ForeignFileError(f"{source} has the base {base}, and here is a folder of that name: load it elsewhere")


def is_plain(name: Any) -> bool:
    """Whether a name is that of a file in the same folder, on any operating system."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def _check_folder(folder: Path) -> None:
    """Every file at a folder's root, and in the sub-folders that are read, must be a file of the folder."""
    below = [path for path in folder.iterdir() if path.is_dir() and _BELOW.fullmatch(path.name)]
    for place in (folder, *below):
        if place.is_symlink() and place != folder:
            raise ForeignFileError(f"{place} is a link to another folder")
        for file in place.iterdir():
            if file.name.startswith(".") or file.is_dir() or not file.exists():
                continue
            if not stat.S_ISREG(file.stat().st_mode):
                raise ForeignFileError(f"{file} is a pipe or a device, not a file")
            if not _is_own(file, folder):
                raise ForeignFileError(f"{file} is a link to {file.resolve()}, outside of its model")


def _is_own(file: Path, folder: Path) -> bool:
    """Whether a file lies in its model's folder, or among the blobs that the Hub's cache links to from there."""
    target, root = file.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return True
    snapshot = next((path for path in (root, *root.parents) if path.parent.name == "snapshots"), None)
    if snapshot is None:
        return False
    repo = snapshot.parent.parent
    if target.parent == repo / "blobs":
        return True
    shared = repo.parent / "blobs"  # content that repos share
    is_cache = repo.name.startswith("models--") and target.is_relative_to(shared)
    return is_cache and _SHARED.fullmatch(target.relative_to(shared).as_posix()) is not None


def _leads_out(key: str, value: str, folder: Path, is_here: bool) -> bool:
    """Whether a text is the path of something outside of a model.

    Paths of another machine are often recorded, and harmless: nothing is there.
    """
    if not 0 < len(value) < 4096 or "\0" in value:
        return False
    path, is_path = Path(value), _PATHS.fullmatch(key) is not None
    if not is_here and is_path and ".." in path.parts:
        return True
    # a name alone is looked for in the model, but what a class is given, as its words, is opened as it is
    is_looked_up = not path.is_absolute() and (key in _WITHIN or not is_here and key not in ("vocab", "merges"))
    places = [*([folder / path] if is_here else []), *([] if is_looked_up else [path])]
    found = next((place for place in places if os.path.lexists(place)), None)
    return found is not None and (is_path or not found.is_dir()) and not (is_here and _is_own(found, folder))


def _read(source: Any, file: str, hub: Mapping[str, Any]) -> Any:
    """The content of a JSON file; None where there is none."""
    # a Hub that is out of reach does not keep a model in the cache from loading
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, file, **quiet, **hub)
    if path is None:
        return None
    if Path(path).stat().st_size > MOST_BYTES:
        raise ForeignFileError(f"{source}: {file} has more than {MOST_BYTES:,} bytes")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ForeignFileError(f"{source}: {file} is not valid JSON") from None


def _paths(content: Any) -> Iterator[tuple[str, str]]:
    """The texts that may be paths, each with its key or that of the paths it is among."""
    pending: list[tuple[str, Any]] = [("", content)]
    while pending:
        key, value = pending.pop()
        is_path = _PATHS.fullmatch(key) is not None
        if isinstance(value, Mapping):
            pending += [
                (key if is_path else name, inner) for name, inner in value.items() if not _TEXTS.fullmatch(name)
            ]
        elif isinstance(value, list) and key not in ("vocab", "merges"):  # tokens, where it is not a file of them
            pending += [(key, inner) for inner in value]
        elif isinstance(value, str) and (is_path or "/" in value or "\\" in value):
            yield key, value


__all__ = ["ALL_INDEXES", "ForeignFileError", "check_base", "check_files", "check_processor", "is_plain"]
