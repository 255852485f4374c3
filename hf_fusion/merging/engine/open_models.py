"""Opens the models of a merge: names, shapes and dtypes of their tensors, and readers of their values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError
from hf_fusion.hub.adapter_placement import place_in_files, refuse_sizes
from hf_fusion.hub.bases import base_ref, warn_of_other_bases
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.download import download
from hf_fusion.hub.lora import adapter_weights_file, read_adapter
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.refs_to_files import recorded_base, resolve, resolve_repo
from hf_fusion.hub.selection import pick_modules, pick_small, safe_files
from hf_fusion.hub.task_heads import label_names
from hf_fusion.io.files import own_file
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import DTYPES, OpenFiles, TensorEntry, read_checkpoint
from hf_fusion.merging.engine.tensors import FileReader, MemoryReader, Reader
from hf_fusion.merging.tied_weights import drop_tied_copies, missing_tied_entries
from hf_fusion.types import Adapter, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass
class Model:
    """A base or an expert.

    Attributes:
        name: ``owner/name@sha`` or a folder.
        folder: contains its files.
        config: content of its ``config.json``.
        entries: its tensors by name in its files; for an adapter, those of its base.
        license: from its card, or None.
        adapter: its LoRA adapter, which applies to the model of `entries`; None for a full model.
        under: folder of an adapter's base.
        modules: subfolders whose weights are among `entries`, such as ``2_Dense/linear.weight``.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    license: str | None = None
    adapter: Adapter | None = None
    under: Path | None = None
    modules: tuple[str, ...] = ()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of its tensors."""
        saved = self.adapter.saved.get(name) if self.adapter else None
        return tuple(saved.shape) if saved is not None else self.entries[name].shape

    def module_of(self, name: str) -> str:
        """The subfolder of the module that a tensor belongs to; "" for the model itself."""
        return next((folder for folder in self.modules if name.startswith(f"{folder}/")), "")

    def reader(self, name: str, files: OpenFiles) -> Reader:
        """A reader of one of its tensors."""
        if self.adapter is None:
            return FileReader(self.entries[name], files)
        saved = self.adapter.saved.get(name)
        stored = FileReader(self.entries[name], files) if saved is None else MemoryReader(saved)
        pair = self.adapter.lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        path = name.removesuffix(".weight")
        if name.endswith(".bias") and (bias := self.adapter.biases.get(name.removesuffix(".bias"))) is not None:
            return AddedReader(stored, bias)
        if path in self.adapter.rows:
            return ReplacedRowsReader(stored, *self.adapter.rows[path])
        is_transposed = self.adapter.transposed and path not in self.adapter.embeddings
        return LoraReader(stored, *pair, is_transposed) if pair else stored


class LoraReader:
    """Reads W + B A, a weight with a LoRA update, which is computed a few rows at a time.

    Args:
        weight: W, (d_out, d_in), or (d_in, d_out) for GPT-2's Conv1D, to which the transposed update is added.
        a: A, (r, d_in).
        b: B, (d_out, r).
        transposed: whether a square W is (d_in, d_out).
    """

    def __init__(self, weight: Reader, a: torch.Tensor, b: torch.Tensor, transposed: bool = False) -> None:
        self.weight, self.shape = weight, weight.shape
        square = self.shape[0] == self.shape[1]
        is_transposed = transposed if square else self.shape != (b.shape[0], a.shape[1])
        self.left, self.right = (a.T, b.T) if is_transposed else (b, a)
        self.left, self.right = self.left.float(), self.right.float()

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        self.weight.read(start, out)
        width = self.shape[1]
        first, last = start // width, -(-(start + len(out)) // width)
        update = (self.left[first:last] @ self.right).view(-1)  # rows first..last, flat
        out.add_(update[start - first * width :][: len(out)])


class AddedReader:
    """Reads the sum of a tensor and one in memory of the same shape, such as a bias and its change."""

    def __init__(self, stored: Reader, added: torch.Tensor) -> None:
        self.stored, self.shape = stored, stored.shape
        self.added = added.float().flatten()

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        self.stored.read(start, out)
        out.add_(self.added[start : start + len(out)])


class ReplacedRowsReader:
    """Reads an embedding with some rows replaced.

    Args:
        weight: (tokens, width).
        rows: indices of the replaced rows, (n,).
        values: their values, (n, width).

    Raises:
        FusionError: a row does not exist.
    """

    def __init__(self, weight: Reader, rows: torch.Tensor, values: torch.Tensor) -> None:
        self.weight, self.shape = weight, weight.shape
        if values.shape[1:] != self.shape[1:] or (len(rows) and int(rows.max()) >= self.shape[0]):
            raise FusionError(f"an adapter replaces rows up to {int(rows.max())} of an embedding of {[*self.shape]}")
        self.values = {int(row): value.float().flatten() for row, value in zip(rows, values, strict=True)}

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        self.weight.read(start, out)
        width = self.shape[1]
        for row, values in self.values.items():
            first, last = max(start, row * width), min(start + len(out), (row + 1) * width)
            if first < last:
                out[first - start : last - start] = values[first - row * width : last - row * width]


def open_models(
    names: Sequence[str], api: HfApi | None = None, base: str | None = None, *, merges_base: bool = True
) -> list[Model]:
    """Opens models from ids or folders; downloads missing files in parallel, and reads no values.

    Args:
        names: ``owner/name``, ``owner/name@revision`` or folders. LoRA adapters are opened on the base before a plus
            sign, ``owner/base+owner/adapter``, else on `base`, else on the recorded one.
        api: the Hub's client.
        base: of the adapters, instead of the recorded bases, which are not resolved then; ignored if it is one of
            `names` and an adapter.
        merges_base: whether the method uses `base` itself; if not, an adapter must need it.

    Raises:
        FusionError: a model cannot be found or read.
    """
    unique = {name: ModelRef.parse_pair(name) for name in names}
    sources = dict(zip(unique, in_parallel(lambda parts: resolve(parts[1], api), unique.values()), strict=True))
    for name, source in sources.items():
        if unique[name][0] and not source.is_adapter:
            raise FusionError(f"{name}: {source.name} is not a LoRA adapter", "write owner/base+owner/adapter")
    adapters = {name: source for name, source in sources.items() if source.is_adapter}
    if base and not merges_base and all(unique[name][0] for name in adapters):
        raise FusionError(
            f"{base} is not needed: no expert is an adapter without a base, and the method does not use one",
            "list it among the experts, or leave it out",
        )
    if base in adapters:  # an adapter cannot be the base of others
        base = None
    # (base, whether it must be a repo): a base that an adapter on the Hub records is never a local folder
    wanted_bases = {
        name: _base_of(source, unique[name][0] or (ModelRef.parse(base) if base else None))
        for name, source in adapters.items()
    }
    resolved = {(unique[name][1], False): source for name, source in sources.items() if not unique[name][0]}
    others = sorted(set(wanted_bases.values()) - resolved.keys(), key=str)
    found = in_parallel(lambda own: (resolve_repo if own[1] else resolve)(own[0], api), others)
    resolved |= dict(zip(others, found, strict=True))
    bases = {name: resolved[own] for name, own in wanted_bases.items()}
    warn_of_other_bases((sources[name], base_ref(bases[name])) for name in bases if not unique[name][0])
    for name, under in bases.items():
        if under.is_adapter:
            raise FusionError(f"{name} has {under.name} as its base, which is an adapter too", "merge that one first")
    wanted = [*sources.values(), *bases.values()]
    files = [(source, _files(source)) for source in wanted]
    download(files, api)
    for source, own in files:
        for file in own:
            own_file(_folder(source) / file, _folder(source))
    models: dict[Path, Model] = {}
    for source in wanted:
        if not source.is_adapter:
            models.setdefault(_folder(source), _model(source))
    opened = {
        name: _adapted(source, models[_folder(bases[name])]) if source.is_adapter else models[_folder(source)]
        for name, source in sources.items()
    }
    for name, (base_name, _) in unique.items():
        if base_name:
            opened[name].name = f"{models[_folder(bases[name])].name}+{opened[name].name}"
    return [opened[name] for name in names]


def _base_of(adapter: Source, given: ModelRef | None) -> tuple[ModelRef, bool]:
    return (given, False) if given else (recorded_base(adapter), not adapter.is_local)


def _files(source: Source) -> list[str]:
    weights = safe_files(source)
    if not weights and not source.is_adapter and (modules := pick_modules(source)):
        places = ", ".join(dict.fromkeys(file.rpartition("/")[0] for file in modules))
        raise FusionError(
            f"{source.name} has its model in {places}, as its modules.json says, and not at its root",
            "merge these folders one by one",
        )
    if not weights:
        stem = "adapter_model" if source.is_adapter else "model"
        raise FusionError(
            f"{source.name} has no {stem}.safetensors", "only safetensors are merged; convert it, or load and save it"
        )
    return weights + pick_small(source, code=True) + pick_modules(source)


def _folder(source: Source) -> Path:
    assert source.folder is not None
    return source.folder


def _model(source: Source) -> Model:
    folder = _folder(source)
    name = str(source.ref)
    if not own_file(folder / "config.json"):
        raise FusionError(f"{source.name} has no config.json", "download it again, or save it again")
    config = read_json(folder / "config.json", source.name)
    if config.get("quantization_config"):
        raise FusionError(f"{source.name}: its weights are quantized", "use the unquantized checkpoint")
    license_id = source.card.get("license")
    modules = _modules(source)
    entries = read_checkpoint(folder, source.name) | _named(modules)
    known = str(license_id).lower() if license_id else None
    return Model(name, folder, config, entries, known, modules=tuple(modules))


def _modules(source: Source) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of sentence-transformers' modules in subfolders, by folder."""
    folders = dict.fromkeys(file.rpartition("/")[0] for file in pick_modules(source))
    root = _folder(source)
    return {own: read_checkpoint(root / own, f"{source.name}/{own}", root) for own in folders}


def _named(modules: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    return {f"{folder}/{name}": entry for folder, own in modules.items() for name, entry in own.items()}


def _adapted(source: Source, base: Model) -> Model:
    folder = _folder(source)
    adapter = read_adapter(folder, source.name, embeddings=True)
    adapter.base = base.name
    name = str(source.ref)
    tied = missing_tied_entries(base)
    known_entries = base.entries | tied
    placed = place_in_files(
        adapter,
        source.adapter,
        base.config,
        [*(own for own in base.entries if not base.module_of(own)), *tied],
        called=source.name,
        base=base.name,
        labels=label_names(source.config),
    )
    entries = {own: known_entries[name] for own, name in placed.names.items()}
    entries |= _saved_alone(placed.adapter, entries, folder)
    shapes = {own: entry.shape for own, entry in known_entries.items()}
    grown = {placed.names[own]: tuple(t.shape) for own, t in placed.adapter.saved.items() if own in placed.names}
    refuse_sizes(placed, shapes | grown, source.name, base.name)
    license_id = source.card.get("license")
    known = str(license_id).lower() if license_id else None
    modules = _modules(source)  # trained with the adapter: they replace the base's
    entries |= {own: entry for own, entry in base.entries.items() if base.module_of(own)} | _named(modules)
    folders = tuple(dict.fromkeys((*base.modules, *modules)))
    made = Model(name, folder, placed.config, entries, known, placed.adapter, base.folder, folders)
    return drop_tied_copies(made, {own: entries[own] for own in tied if own in entries})


def _saved_alone(adapter: Adapter, known: Mapping[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    """Entries for tensors that an adapter saves and its base does not have."""
    file = adapter_weights_file(folder)
    assert file is not None  # checked by `_files`
    types = {f"torch.{name}": key for key, (name, _) in DTYPES.items()}
    return {
        name: TensorEntry(
            name, types[str(tensor.dtype)], tuple(tensor.shape), file, 0
        )  # read from memory, not from there
        for name, tensor in adapter.saved.items()
        if name not in known
    }


# ---------------------------------------------------------------- names of tensors


def match_names(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """Maps tensor names of a model to those of another.

    A model with a head has a prefix on the names of its body (``bert.``, ``model.``), which the body alone lacks. The
    prefix with which most names agree is used.

    Args:
        first: a model's tensors by name.
        other: another's.

    Returns:
        Name in the first -> name in the other, for names that agree.
    """
    # the prefix of a body is frequent; rare ones are not tried
    heads = (Counter(name.partition(".")[0] + "." for name in names).most_common(8) for names in (first, other))
    prefixes = ["", *(prefix for found in heads for prefix, _ in found)]
    best: dict[str, str] = {}
    for prefix in prefixes:
        for found in (
            {name: prefix + name for name in first if prefix + name in other},
            {name: name.removeprefix(prefix) for name in first if name.removeprefix(prefix) in other},
        ):
            if len(found) > len(best):
                best = found
    return best


LAYER = re.compile(r"^(?P<stack>(?:.*?[._])?(?:layers|layer|h|blocks|block))\.(?P<number>\d+)\.(?P<rest>.+)$")
"""Matches a tensor of a layer: path of the stack of layers, index of the layer, and name within the layer."""


def layer_index(name: str) -> int | None:
    """The index of the layer that a tensor belongs to, within its stack; None outside of layers."""
    match = LAYER.match(name)
    return int(match["number"]) if match else None


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside of the layers precedes them (embeddings) or follows them (final norms, heads)."""
    return "embed_out" not in name and ("embed" in name or re.search(r"\b(wte|wpe|shared)\b", name) is not None)


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """Relative depth of every tensor: 0 in the first layer of its stack, 1 in the last; 0 outside, as in mergekit."""
    last: dict[str, int] = {}
    for name in names:
        if match := LAYER.match(name):
            last[match["stack"]] = max(last.get(match["stack"], 0), int(match["number"]))
    found = {}
    for name in names:
        match = LAYER.match(name)
        end = last[match["stack"]] if match else 0
        found[name] = int(match["number"]) / end if match and end else float(match is not None)
    return found
