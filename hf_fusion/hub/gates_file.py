"""Reads and writes ``phatgoose_gates.safetensors``, the PHATGOOSE gates beside an adapter.

One tensor (d_in,) per linear layer that the adapter updates or saves in full, keyed by the layer's path in the base.
The metadata records the kind of the gates; without metadata they count as trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.io.files import own_file
from hf_fusion.io.saving import in_folder, replacing
from hf_fusion.types import Adapter, Gates

if TYPE_CHECKING:
    import torch

GATES_FILE, GATES_TAG = "phatgoose_gates.safetensors", "phatgoose-gates"
KINDS = ("trained", "average", "arrow")
FACTS = ("steps", "examples", "loss_before", "loss_after")
HALF_ERROR = 1e-3  # maximum relative error of a gate in half precision


def gate_sizes(adapter: Adapter, base: torch.nn.Module) -> dict[str, int]:
    """Module path → size of its gate (d_in), for each linear layer that an adapter updates or saves in full, sorted."""
    modules = dict(base.named_modules())
    saved = {name.removesuffix(".weight") for name in adapter.saved if name.endswith(".weight")}
    sizes = {path: linear_sizes(modules.get(path)) for path in {*adapter.lora, *saved}}
    return {path: size[0] for path, size in sorted(sizes.items()) if size is not None}


def refuse_gates(folder: Path, overwrite: bool) -> None:
    """Raises if a folder contains gates that may not be replaced.

    Raises:
        FusionError: naming the folder.
    """
    if not overwrite and (folder / GATES_FILE).exists():
        raise FusionError(
            f"{folder} already contains gates: {GATES_FILE}",
            "choose another folder (--output), or replace them: --overwrite (overwrite=True in Python)",
        )


def save_gates(gates: Gates, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes gates into an adapter's folder, atomically.

    They are stored as fp16 if that changes no gate by more than a thousandth of its norm (the router uses only their
    directions), else as fp32.

    Args:
        gates: vectors (d_in,) by module path.
        folder: created if missing.
        overwrite: whether to replace gates in the folder.

    Returns:
        The path of the file.

    Raises:
        FusionError: there are no gates, a gate has NaN or Inf, or the folder already contains gates.
    """
    from safetensors.torch import save_file

    if not gates.vectors:
        raise FusionError("there are no gates to save")
    for path, vector in gates.vectors.items():
        if vector.dim() != 1 or not vector.isfinite().all():
            raise FusionError(f"the gate of {path} is not a vector of finite numbers", hint="train the gates again")
    folder = Path(folder)
    refuse_gates(folder, overwrite)
    target = folder / GATES_FILE
    metadata = {"format": "pt", "kind": gates.kind, **{name: repr(value) for name, value in gates.facts.items()}}
    if gates.offsets:
        metadata["offsets"] = json.dumps(gates.offsets)
    with in_folder(folder), replacing(target) as partial:
        save_file(stored(gates), partial, metadata=metadata)
    return target


def stored(gates: Gates) -> dict[str, torch.Tensor]:
    """The gates as stored in their file: all fp16, or all fp32."""
    single = {path: vector.detach().float().cpu().contiguous() for path, vector in gates.vectors.items()}
    half = {path: vector.half() for path, vector in single.items()}
    lossless = all(
        (half[path].float() - vector).norm() <= HALF_ERROR * vector.norm() for path, vector in single.items()
    )
    return half if lossless else single


def read_gates(folder: str | Path, name: str, adapter: Adapter, base: torch.nn.Module) -> Gates | None:
    """Reads the gates in an adapter's folder; shapes are checked before any tensor is read.

    Args:
        folder: the adapter's folder.
        name: the adapter's name, for errors.
        adapter: the adapter, whose modules the gates must match.
        base: its base model.

    Returns:
        The gates, fp32; None if the folder has no gates.

    Raises:
        FusionError: a gate is missing, unknown, of the wrong shape or not finite; names the adapter and the module.
    """
    file = Path(folder) / GATES_FILE
    return parse_gates(file, name, gate_sizes(adapter, base)) if own_file(file) else None


def parse_gates(file: Path, name: str, sizes: Mapping[str, int]) -> Gates:
    """A gates file whose modules and lengths must be `sizes`; see `read_gates`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
            shapes = {path: tuple(tensors.get_slice(path).get_shape()) for path in tensors.keys()}  # noqa: SIM118
            if problem := gate_problem(shapes, sizes):
                raise FusionError(f"{name}: {GATES_FILE} {problem}", hint=_train_again(name))
            vectors = {path: tensors.get_tensor(path).float() for path in sizes}
    except (SafetensorError, OSError) as error:
        raise FusionError(f"{name}: {GATES_FILE} cannot be read ({error})", hint=_train_again(name)) from None
    for path, vector in vectors.items():
        if not vector.isfinite().all():
            raise FusionError(f"{name} has NaN or Inf in the gate of {path}", hint=_train_again(name))
    kind = metadata.get("kind", "")
    return Gates(vectors, kind if kind in KINDS else "trained", _offsets(metadata, name, sizes), _facts(metadata))


def _train_again(name: str) -> str:
    return f"train the gates again: hf-fusion fit gates {name} --data …"


def gate_problem(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], also: Collection[str] = ()) -> str:
    """What is wrong with gates of these shapes, as the end of a sentence; "" if nothing is.

    Args:
        shapes: module path → shape of its gate.
        sizes: module path → d_in of the required gates.
        also: modules whose gates are optional.
    """
    if missing := sorted(sizes.keys() - shapes.keys()):
        return f"lacks a gate for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
    if unknown := sorted(shapes.keys() - sizes.keys() - set(also)):
        return f"has a gate for {unknown[0]}, which the adapter does not adapt"
    for path, size in sizes.items():
        if shapes[path] != (size,):
            return f"has a gate of shape {list(shapes[path])} for {path}, whose input has {size} features"
    return ""


def _offsets(metadata: Mapping[str, str], name: str, sizes: Mapping[str, int]) -> dict[str, float]:
    """The offsets of whitened gates: one per gate, or none."""
    if "offsets" not in metadata:
        return {}
    try:
        offsets = {path: float(value) for path, value in json.loads(metadata["offsets"]).items()}
    except (ValueError, TypeError, AttributeError):
        offsets = {}
    if not sizes.keys() <= offsets.keys() or not all(map(math.isfinite, offsets.values())):
        raise FusionError(f"{name}: {GATES_FILE} does not give each gate a finite offset", hint=_train_again(name))
    return {path: offsets[path] for path in sizes}


def _facts(metadata: Mapping[str, str]) -> dict[str, float]:
    """The numeric facts in a file's metadata."""
    facts = {}
    for name in FACTS:
        try:
            facts[name] = float(metadata[name])
        except (KeyError, ValueError):
            continue
    return facts
