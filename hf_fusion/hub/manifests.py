"""Finds the subfolders that a model's manifests name, without which a copy of its root does not load.

- ``modules.json`` (sentence-transformers): the folder of each module (``1_Pooling``, ``2_Dense``), and what a router
  among them names in its ``router_config.json``;
- ``additional_chat_templates/``: chat templates beside the default one, as transformers saves them;
- ``NAME_tokenizer/``: a processor's tokenizers beside its first (InstructBLIP's ``qformer_tokenizer``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.io.files import own_file, read_file
from hf_fusion.io.json_files import parse

MODULES = "modules.json"
TEMPLATES = "additional_chat_templates"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_ROUTERS = ("router_config.json", "config.json")  # the second is the former name in sentence-transformers
_WANTED = (".json", ".txt", ".model", ".jinja", ".safetensors")
_PICKLED = ("pytorch_model.bin", "model.safetensors")
_DEEPEST = 4  # maximum nesting of folders

Read = Callable[[str], Any]


def named_files(name: str, files: Iterable[str], read: Read, *, code: bool) -> list[str]:
    """The files of all subfolders that a model's manifests name, including weights.

    Args:
        name: the model's name, for errors.
        files: all files of the model, as paths from its root.
        read: returns the content of one of its JSON files.
        code: include Python files.

    Raises:
        FusionError: a manifest is not in the format of sentence-transformers, or names a folder outside of the model.
    """
    known = set(files)
    starts = tuple(f"{folder}/" for folder in named_folders(name, known, read))
    wanted = (*_WANTED, ".py") if code else _WANTED
    return sorted(
        file for file in known if file.startswith(starts) and file.endswith(wanted) and not file.endswith(".index.json")
    )


def named_folders(name: str, files: Iterable[str], read: Read) -> list[str]:
    """The subfolders that a model's manifests name; see `named_files`."""
    known = set(files)
    folders = [*module_folders(name, known, read), TEMPLATES]
    if any(file in known for file in PROCESSORS):
        tops = {top for file in known for top, below, _ in [file.partition("/")] if below}
        folders += sorted(top for top in tops if top.endswith("_tokenizer"))
    return folders


def module_folders(name: str, files: Iterable[str], read: Read) -> list[str]:
    """The folders of sentence-transformers' modules, in order, without the model's root; see `named_files`."""
    known = set(files)
    if MODULES not in known:
        return []
    rows = read(MODULES)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "path" in row for row in rows):
        raise FusionError(f"{name}: {MODULES} is not a list of modules and their paths", "download it again")
    found: dict[str, None] = {}
    for row in rows:
        for folder in _routed(name, _inside(name, MODULES, row["path"]), known, read, _DEEPEST):
            found[folder] = None
    return [folder for folder in found if folder]


def refuse_pickled(name: str, files: Iterable[str], folders: Iterable[str]) -> None:
    """Raises for modules that have only pickle weights.

    Raises:
        FusionError: naming the file.
    """
    known = set(files)
    for folder in folders:
        pickled, safe = (f"{folder}/{file}" for file in _PICKLED)
        if pickled in known and safe not in known:
            raise FusionError(
                f"{name} has only pickle weights in {pickled}, and only safetensors are merged",
                "load the model with SentenceTransformer, and save it again",
            )


def local_files(folder: Path) -> Iterator[str]:
    """All files of a folder that manifests can name, as relative paths; links to folders are not followed."""
    is_named = own_file(folder / MODULES)  # without it, only two kinds of subfolders can be named
    for root, folders, files in os.walk(folder):
        place = Path(root).relative_to(folder)
        if not place.parts and not is_named:
            folders[:] = [own for own in folders if own == TEMPLATES or own.endswith("_tokenizer")]
        hidden = [own for own in folders if own.startswith((".", "__pycache__", "checkpoint-"))]
        folders[:] = sorted(set(folders) - set(hidden)) if len(place.parts) < _DEEPEST else []
        yield from ((place / file).as_posix() for file in files)


def local_named_files(folder: Path, name: str, *, code: bool) -> list[str]:
    """`named_files` of a folder on the disk.

    Raises:
        FusionError: as there; or a folder that is named is a link to another.
    """

    def read(file: str) -> Any:
        return read_content(folder / file, name)

    files = list(local_files(folder))
    for own in named_folders(name, files, read):
        # the target of a link is not part of the model, and must not be read or published
        steps = [folder / own, *(folder / own).parents][: own.count("/") + 1]
        if any(step.is_symlink() for step in steps):
            raise FusionError(f"{name}: {own} is a link to another folder", "replace the link with the folder itself")
    return named_files(name, files, read, code=code)


def read_content(file: Path, name: str) -> Any:
    """The content of a JSON file; errors name the model and the file."""
    return parse(read_file(file), file.name, name)


def _routed(name: str, folder: str, known: set[str], read: Read, depth: int) -> Iterator[str]:
    """A module's folder and, for a router, those of the modules that it routes to."""
    yield folder
    prefix = f"{folder}/" if folder else ""
    for file in _ROUTERS if folder else _ROUTERS[:1]:
        content = read(prefix + file) if prefix + file in known else None
        if not isinstance(content, Mapping) or "structure" not in content or "types" not in content:
            continue
        types = content["types"]
        if not isinstance(types, Mapping) or not depth:
            raise FusionError(f"{name}: {prefix}{file} is not a router of sentence-transformers", "download it again")
        for own in types:
            yield from _routed(name, prefix + _inside(name, prefix + file, own), known, read, depth - 1)
        return


def _inside(name: str, manifest: str, path: object) -> str:
    """A path that a manifest names, in its shortest form; "" is the root.

    Raises:
        FusionError: it is not a path, or leads out of the model.
    """
    if isinstance(path, str) and path.isprintable() and len(path) < 500:
        plain, windows = PurePosixPath(path), PureWindowsPath(path)
        if not plain.is_absolute() and not windows.anchor and ".." not in windows.parts and "\\" not in path:
            return "" if plain == PurePosixPath(".") else plain.as_posix()
    raise FusionError(
        f"{name}: {manifest} names {shown(path)}, which is not a folder inside the model",
        f"correct {manifest}, or leave {name} out",
    )
