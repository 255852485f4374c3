"""Small models as files, written byte by byte where libraries would refuse to."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_fusion import FusionError
from hf_fusion.merging.engine.checkpoint import DTYPES, INDEX, SINGLE
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.methods.declaration import MergeMethod
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import Recipe, RecipeExpert

NOWHERE = HfApi(endpoint="http://127.0.0.1:9")
"""A Hub that is not there: a name that is no folder ends in an error at once."""

SHAPES = {
    "embed.weight": (7, 4),
    "layers.0.mlp.weight": (6, 4),
    "layers.0.mlp.bias": (6,),
    "layers.1.mlp.weight": (6, 4),
    "layers.1.mlp.bias": (6,),
    "head.weight": (3, 4),
}

OF_MODELS = {name: row for name, row in MERGE_METHODS.items() if row.merges == "models" and not row.statistics}


def model(folder: Path, seed: int, shapes=SHAPES, shards: int = 1, dtype=torch.float32) -> Path:
    """A folder with weights drawn from a seed, in one file or in shards with an index, and a configuration."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        own = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(own, folder / (SINGLE if shards == 1 else file), metadata={"format": "pt"})
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {"architectures": ["Tiny"], "model_type": "tiny", "num_hidden_layers": 2, "vocab_size": 7}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def models(folder: Path, **options) -> list[Path]:
    """A base and two experts."""
    return [model(folder / name, seed, **options) for seed, name in enumerate(("base", "one", "two"))]


def recipe_of(folders: list[Path], method: str = "task_arithmetic", **parameters) -> Recipe:
    base, *experts = map(str, folders)
    return Recipe(method, tuple(map(RecipeExpert, experts)), base, parameters)


def recipe_for(method: str, experts: list[Path], base: Path | None = None, **parameters: Any) -> Recipe:
    """With as many of the experts as the method merges, and with the base where it needs one."""
    row = MERGE_METHODS[method]
    merged = tuple(RecipeExpert(str(folder)) for folder in experts[: row.experts[1]])
    return Recipe(method, merged, str(base) if base and row.base else None, {**needed(row), **parameters})


def needed(row: MergeMethod) -> dict[str, float]:
    """Values for what has no default."""
    return {p.name: 0.5 for p in row.parameters.values() if p.required}


def header_of(file: Path) -> tuple[dict, bytes]:
    """A safetensors file's header, and its data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(file: Path, header: dict | str | bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file of any header, valid or not; `length` is what it says of it, if not the truth."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def row(dtype: str, shape: list, start: int = 0) -> dict:
    """A tensor in a header, at its true size."""
    size = math.prod(shape) * DTYPES[dtype][1]
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def tree(folder: Path) -> dict[str, str]:
    """All that lies in a folder, hidden or not: by path, what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def refused(match: str, recipe: Recipe | Path, out: Path, watched: Path) -> FusionError:
    """The error of a merge that must not happen: one line, a next step, and nothing written or taken away."""
    before = tree(watched)
    with pytest.raises(FusionError, match=match) as caught:
        merge(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), out, api=NOWHERE, threads=1)
    is_clear(caught.value)
    assert tree(watched) == before
    return caught.value


def is_clear(error: FusionError) -> None:
    assert error.message.isprintable() and 10 < len(error.message) < 1500, error.message
    # the next step: a hint, or what is expected
    assert (error.hint or "").isprintable() and (error.hint or ", expected " in error.message), error.message


def weights_of(folder: Path) -> dict[str, bytes]:
    """All files of a merged model, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def started_quickly() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported what a merge needs already."""
    context = multiprocessing.get_context("forkserver")
    # all that this file imports; itself it is not on the path of that process
    context.set_forkserver_preload(["hf_fusion.merging.merge", "transformers.modeling_utils", "pytest"])
    return context


def merge_here(
    recipe: str, out: str, options: dict, most_bytes: int | None = None, told=None, environment: dict | None = None
) -> None:
    """A merge as the only work of a process, of files of so many bytes at most; its error, or None, goes to a pipe."""
    os.environ.update(environment or {})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in a shell's background
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        merge(load_recipe(recipe), out, api=NOWHERE, **options)
    except FusionError as error:
        if told is None:
            raise
        told.send((error.message, error.hint))
    else:
        if told is not None:
            told.send(None)
