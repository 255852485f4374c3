"""A model's folder, looked at as a whole before anything reads it: no path of a model leaves its snapshot.

transformers, PEFT and safetensors open what an index file, a configuration or a link names, wherever that lies, and
what they have read is saved and published with the fused model. `check_snapshot` refuses such a folder before they are
given it; what this package opens by itself goes through `hf_fusion.io.files` besides.
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
# configurations that transformers passes on to classes, whose arguments may be paths
_CONFIGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", *PROCESSORS)
# arguments that are paths, by their names; other texts are looked at if they have a separator
_PATHS = re.compile(r"(\w+_)?(files?|paths?|dir|folders?|subfolder|vocab|merges|spm)|init_inputs|repo_id")
# texts that no loader opens: tokens, labels, templates, and where something was made
_TEXTS = re.compile(
    r"\w*name_or_path|special_tokens_map_file|chat_template\w*|id2label|label2id|\w*_tokens?|added_tokens_decoder|content"
)
# names that are looked for in the model's folder alone, never in the one that this runs in
_WITHIN = ("fast_tokenizer_files", "folders", "subfolder")
_BESIDE = re.compile(r"(?!\.+$)[\w.-]{1,200}", re.ASCII)
_LONGEST = 4096  # characters of a path that can be there


def check_snapshot(folder: Path, name: str) -> None:
    """Refuses a model's folder from which a file, an index or a configuration leads out.

    Looked at are all files at its root but the hidden ones, and those in sub-folders that its manifests name. Links to
    other files of the folder are allowed, as are those of the Hub's cache to its blobs, and a link that the folder
    itself is. Other sub-folders are not read by any loader, and may lead anywhere.

    Args:
        folder: the model's.
        name: what errors call the model.

    Raises:
        FusionError: naming the file, and the entry that leads out; also for pipes, sockets and devices, and for small
            files that are too large, or grow while they are looked at.
    """
    sizes = _sizes(folder, [*_at_root(folder), *_below(folder, name)])
    for file in sizes:
        if file.endswith(INDEXES):
            read_index(folder / file, name)
        elif file.rpartition("/")[2] in _CONFIGS:
            _check_config(folder, file, name)
    if grown := next((file for file, size in sizes.items() if _size(folder / file) != size), None):
        raise FusionError(
            f"{one_line(folder / grown)} changes while it is looked at", "run it again once nothing writes to it"
        )


def read_index(index: Path, name: str) -> dict[str, str]:
    """An index file's tensors, and the file beside it that holds each.

    Args:
        index: ``model.safetensors.index.json`` or the like.
        name: what errors call the model.

    Raises:
        FusionError: it cannot be read, or names what is not a file beside it.
    """
    try:
        text = read_file(index, most=MAX_BYTES)
        if text.count(b",") > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} entries")
        content = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FusionError(f"{name}: {index.name} is not valid ({why_not(error)})", "fetch it again") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise FusionError(f"{name}: {index.name} has no weight_map of names and files", "fetch it again")
    suffix = ".safetensors" if index.name.endswith(f".safetensors{INDEXES}") else ""
    named = list(places.values())
    for place in set(named) if all(isinstance(place, str) for place in named) else named:
        if not isinstance(place, str) or not place.endswith(suffix) or not _BESIDE.fullmatch(place):
            what = f"{name}: {index.name} names {shown(place)}, which is no file beside it"
            raise FusionError(what, "fetch it again")
    return places


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice: readers disagree on which of the two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(name)} is there twice")
    return found


def why_not(error: Exception) -> str:
    """What a JSON parser says, on one line."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)


def _at_root(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise FusionError(f"{folder} cannot be read ({error.strerror})", "check who may read it") from None
    return sorted(own for own in found if not own.startswith("."))


def _below(folder: Path, name: str) -> list[str]:
    """The files of sub-folders that are read, as paths from the folder."""
    local_named_files(folder, name, code=True)  # refuses links to other folders
    files = list(local_files(folder))
    named = named_folders(name, files, lambda file: read_content(folder / file, name))
    starts = tuple(f"{own}/" for own in named)
    processors = [f"{own}/{file}" for own in _processors(folder, name) for file in _at_root(folder / own)]
    return [file for file in files if file.startswith(starts)] + processors


def _processors(folder: Path, name: str) -> list[str]:
    """The folders of a FoE's processors."""
    file = folder / PROCESSORS[0]
    content = _content(folder, PROCESSORS[0], name) if own_file(file, folder) else None
    named = content.get("folders") if isinstance(content, Mapping) else None
    found = [own for own in named if own] if isinstance(named, list) else []
    for own in found:
        if not isinstance(own, str) or not _BESIDE.fullmatch(own):
            raise FusionError(
                f"{name}: {file.name} names {shown(own)}, which is not a folder within the model", "fetch it again"
            )
        if (folder / own).is_symlink():
            raise FusionError(f"{name}: {own} is a link to another folder", "put the folder itself there")
    return [own for own in found if (folder / own).is_dir()]


def _sizes(folder: Path, files: Iterable[str]) -> dict[str, int]:
    """The size of each file that is the folder's own; links that lead nowhere are left out."""
    sizes = {}
    for file in files:
        if not own_file(folder / file, folder):
            refuse_special(folder / file)
            continue
        size = _size(folder / file)
        if size > MOST_BYTES and not file.endswith(WEIGHTS):
            raise FusionError(
                f"{one_line(folder / file)} has {size:,} bytes: only weights are larger than {MOST_BYTES:,}",
                "take it away",
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
    """Refuses a configuration that has a class open a file outside of the model."""
    for key, value in _texts(_content(folder, file, name)):
        if key == "transformers_weights":  # which transformers loads instead of model.safetensors
            leads_out = not _BESIDE.fullmatch(value)
        elif key == "auto_map":
            leads_out = "--" not in value and ("/" in value or "\\" in value)
        else:
            places = [(folder / file).parent / value, *([] if key in _WITHIN else [Path(value)])]
            is_path = _PATHS.fullmatch(key) is not None
            leads_out = (is_path or "/" in value or "\\" in value) and _leads_out(value, places, folder, is_path)
        if leads_out:
            raise FusionError(
                f"{name}: {file} has {key}: {shown(value)}, which lies outside of the model",
                f"take {key} out of {file}, or leave {name} out",
            )


def _texts(content: object) -> Iterator[tuple[str, str]]:
    """The texts that may be paths, each with its key or that of the paths it is among; as deep as JSON may be."""
    pending: list[tuple[str, Any]] = [("", content)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            is_kept = key == "auto_map" or _PATHS.fullmatch(key) is not None
            pending += [(key if is_kept else own, inner) for own, inner in value.items() if not _TEXTS.fullmatch(own)]
        elif isinstance(value, list) and key not in ("vocab", "merges"):  # tokens, where it is not a file of them
            pending += [(key, inner) for inner in value]
        elif isinstance(value, str):
            yield key, value


def _leads_out(value: str, places: Iterable[Path], root: Path, with_folders: bool) -> bool:
    """Whether a text is the path of something outside of a root: of the first of some places that is there.

    Paths of another machine are often recorded, and harmless: nothing is there.

    Args:
        value: the text.
        places: where it would be looked for.
        root: the model's folder.
        with_folders: whether a folder counts too.
    """
    if not value or len(value) > _LONGEST or "\0" in value:
        return False
    try:
        found = next((path for path in places if os.path.lexists(path)), None)
        return found is not None and (with_folders or not found.is_dir()) and not is_within(found.resolve(), root)
    except (OSError, ValueError, RuntimeError):  # no path that this machine could have, or a link in a circle
        return False
