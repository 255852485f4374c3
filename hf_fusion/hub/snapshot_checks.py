"""Checks a model's folder before libraries read it: no file, index or configuration may lead out of it.

transformers, PEFT and safetensors open any file that an index, a configuration or a link names, and its content is
saved and published with the fused model. `check_snapshot` refuses such a folder first. Files that this package opens
itself are also checked by `hf_fusion.io.files`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.hub.manifests import PROCESSORS, local_files, local_named_files, named_folders, read_content
from hf_fusion.io.files import MOST_BYTES, is_within, own_file, read_file, refuse_special
from hf_fusion.io.json_files import MAX_BYTES, MAX_VALUES, parse

INDEXES = ".index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".ckpt")
# configurations with arguments that may be paths
_CONFIGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", *PROCESSORS)
# keys whose values are paths; other strings are checked if they contain a separator
_PATHS = re.compile(r"(\w+_)?(files?|paths?|dir|folders?|subfolder|vocab|merges|spm)|init_inputs|repo_id")
# keys whose values are never opened: tokens, labels, templates, origins
_TEXTS = re.compile(
    r"\w*name_or_path|special_tokens_map_file|chat_template\w*|id2label|label2id|\w*_tokens?|added_tokens_decoder|content"
)
# keys whose values are only resolved in the model's folder, never in the working directory
_WITHIN = ("fast_tokenizer_files", "folders", "subfolder")
_BESIDE = re.compile(r"(?!\.+$)[\w.-]{1,200}", re.ASCII)
_LONGEST = 4096  # characters; longer strings are not paths


def check_snapshot(folder: Path, name: str) -> None:
    """Raises if a file, an index or a configuration of a model's folder leads out of it.

    Checks all files at its root except hidden ones, and those in subfolders that its manifests name. Allowed are links
    to other files of the folder, links of the Hub's cache to its blobs, and a folder that is itself a link. Other
    subfolders are not read by any loader and not checked.

    Args:
        folder: the model's folder.
        name: the model's name, for errors.

    Raises:
        FusionError: naming the file and the entry that leads out; also for pipes, sockets and devices, and for small
            files that are too large or change during the check.
    """
    sizes = _sizes(folder, [*_at_root(folder), *_below(folder, name)])
    for file in sizes:
        if file.endswith(INDEXES):
            read_index(folder / file, name)
        elif file.rpartition("/")[2] in _CONFIGS:
            _check_config(folder, file, name)
    if grown := next((file for file, size in sizes.items() if _size(folder / file) != size), None):
        raise FusionError(
            f"{one_line(folder / grown)} changed while it was checked",
            "run the command again when nothing writes to the file",
        )


def read_index(index: Path, name: str) -> dict[str, str]:
    """Reads an index file: tensor name -> file beside the index.

    Args:
        index: such as ``model.safetensors.index.json``.
        name: of the model, for errors.

    Raises:
        FusionError: it cannot be read, or names a path that is not beside it.
    """
    try:
        text = read_file(index, most=MAX_BYTES)
        if text.count(b",") > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} entries")
        content = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FusionError(f"{name}: {index.name} is not valid ({parser_message(error)})", "download it again") from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise FusionError(f"{name}: {index.name} has no weight_map of names and files", "download it again")
    suffix = ".safetensors" if index.name.endswith(f".safetensors{INDEXES}") else ""
    named = list(files.values())
    for file in set(named) if all(isinstance(file, str) for file in named) else named:
        if not isinstance(file, str) or not file.endswith(suffix) or not _BESIDE.fullmatch(file):
            what = f"{name}: {index.name} names {shown(file)}, which is not a file beside it"
            raise FusionError(what, "download it again")
    return files


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; raises for duplicate keys, on which parsers disagree."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(name)} occurs twice")
    return found


def parser_message(error: Exception) -> str:
    """A JSON parser's message on one line."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)


def _at_root(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise FusionError(f"{folder} cannot be read ({error.strerror})", "check its permissions") from None
    return sorted(own for own in found if not own.startswith("."))


def _below(folder: Path, name: str) -> list[str]:
    """The files in subfolders that loaders read, as paths from the folder."""
    local_named_files(folder, name, code=True)  # refuses links to other folders
    files = list(local_files(folder))
    named = named_folders(name, files, lambda file: read_content(folder / file, name))
    starts = tuple(f"{own}/" for own in named)
    processors = [f"{own}/{file}" for own in _processors(folder, name) for file in _at_root(folder / own)]
    return [file for file in files if file.startswith(starts)] + processors


def _processors(folder: Path, name: str) -> list[str]:
    """The subfolders of a FoE's processors."""
    file = folder / PROCESSORS[0]
    content = _content(folder, PROCESSORS[0], name) if own_file(file, folder) else None
    named = content.get("folders") if isinstance(content, Mapping) else None
    found = [own for own in named if own] if isinstance(named, list) else []
    for own in found:
        if not isinstance(own, str) or not _BESIDE.fullmatch(own):
            raise FusionError(
                f"{name}: {file.name} names {shown(own)}, which is not a folder inside the model", "download it again"
            )
        if (folder / own).is_symlink():
            raise FusionError(f"{name}: {own} is a link to another folder", "replace the link with the folder itself")
    return [own for own in found if (folder / own).is_dir()]


def _sizes(folder: Path, files: Iterable[str]) -> dict[str, int]:
    """The size of each regular file; broken links are left out."""
    sizes = {}
    for file in files:
        if not own_file(folder / file, folder):
            refuse_special(folder / file)
            continue
        size = _size(folder / file)
        if size > MOST_BYTES and not file.endswith(WEIGHTS):
            raise FusionError(
                f"{one_line(folder / file)} has {size:,} bytes, but only weights may have more than {MOST_BYTES:,}",
                "remove it from the folder",
            )
        sizes[file] = size
    return sizes


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _content(folder: Path, file: str, name: str) -> Any:
    return parse(read_file(folder / file, folder, most=MAX_BYTES), file, name)


def _check_config(folder: Path, file: str, name: str) -> None:
    """Raises if a configuration names a file outside of the model."""
    for key, value in _texts(_content(folder, file, name)):
        if key == "transformers_weights":  # read instead of model.safetensors
            leads_out = not _BESIDE.fullmatch(value)
        elif key == "auto_map":
            leads_out = "--" not in value and ("/" in value or "\\" in value)
        else:
            candidates = [(folder / file).parent / value, *([] if key in _WITHIN else [Path(value)])]
            is_path = _PATHS.fullmatch(key) is not None
            leads_out = (is_path or "/" in value or "\\" in value) and _leads_out(value, candidates, folder, is_path)
        if leads_out:
            raise FusionError(
                f"{name}: {file} has {key}: {shown(value)}, which is outside the model's folder",
                f"remove {key} from {file}, or leave {name} out",
            )


def _texts(content: object) -> Iterator[tuple[str, str]]:
    """Yields strings that may be paths, with their keys, at any depth."""
    pending: list[tuple[str, Any]] = [("", content)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            is_kept = key == "auto_map" or _PATHS.fullmatch(key) is not None
            pending += [(key if is_kept else own, inner) for own, inner in value.items() if not _TEXTS.fullmatch(own)]
        elif isinstance(value, list) and key not in ("vocab", "merges"):  # lists of tokens, unless they are file names
            pending += [(key, inner) for inner in value]
        elif isinstance(value, str):
            yield key, value


def _leads_out(value: str, candidates: Iterable[Path], root: Path, with_folders: bool) -> bool:
    """Whether a string is a path to an existing file outside of a root.

    Recorded paths of other machines are common and harmless, since they do not exist here.

    Args:
        value: the string.
        candidates: paths that it may be resolved to; the first existing one counts.
        root: the model's folder.
        with_folders: whether folders count as well.
    """
    if not value or len(value) > _LONGEST or "\0" in value:
        return False
    try:
        found = next((path for path in candidates if os.path.lexists(path)), None)
        return found is not None and (with_folders or not found.is_dir()) and not is_within(found.resolve(), root)
    except (OSError, ValueError, RuntimeError):  # not a valid path, or a circular link
        return False
