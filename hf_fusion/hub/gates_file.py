"""Reads and writes ``phatgoose_gates.safetensors``, the PHATGOOSE gates beside an adapter.

Gaussian gates are three tensors for each of a few linear layers of the base: ``PATH.mean`` (d_in,), ``PATH.directions``
(r, d_in) and ``PATH.variances`` (r,). Gates of other kinds are one tensor (d_in,) per linear layer that the adapter
updates or saves in full, keyed by the layer's path in the base. The metadata records the kind of the gates; without
metadata they count as trained.
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
from hf_fusion.types import Adapter, Gates, Gaussian

if TYPE_CHECKING:
    import torch

GATES_FILE, GATES_TAG = "phatgoose_gates.safetensors", "phatgoose-gates"
KINDS = ("gaussian", "trained", "average", "arrow")
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

    if not gates.vectors and not gates.gaussians:
        raise FusionError("there are no gates to save")
    for path, vector in gates.vectors.items():
        if vector.dim() != 1 or not vector.isfinite().all():
            raise FusionError(f"the gate of {path} is not a vector of finite numbers", hint="train the gates again")
    for name, tensor in gate_tensors(gates).items():
        if not tensor.isfinite().all():
            raise FusionError(f"{name} of the gates has NaN or Inf", hint="train the gates again")
    folder = Path(folder)
    refuse_gates(folder, overwrite)
    target = folder / GATES_FILE
    metadata = {"format": "pt", "kind": gates.kind, **{name: repr(value) for name, value in gates.facts.items()}}
    if gates.offsets:
        metadata["offsets"] = json.dumps(gates.offsets)
    with in_folder(folder), replacing(target) as partial:
        save_file(stored(gates), partial, metadata=metadata)
    return target


def gate_tensors(gates: Gates) -> dict[str, torch.Tensor]:
    """The gates' tensors by their names in the file."""
    parts = {path: gaussian._asdict() for path, gaussian in gates.gaussians.items()}
    return gates.vectors | {f"{path}.{part}": tensor for path, named in parts.items() for part, tensor in named.items()}


def stored(gates: Gates) -> dict[str, torch.Tensor]:
    """The gates as stored in their file: all fp16, or all fp32."""
    single = {path: vector.detach().float().cpu().contiguous() for path, vector in gate_tensors(gates).items()}
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
    if not own_file(file):
        return None
    return parse_gates(file, name, gate_sizes(adapter, base), point_sizes(base))


def point_sizes(base: torch.nn.Module) -> dict[str, int]:
    """Path of a linear of the base whose input Gaussian gates read → width of the input."""
    from hf_fusion.models.points_phatgoose import gate_points  # imports torch

    sizes = {path: linear_sizes(base.get_submodule(path)) for path in gate_points(base)}
    return {path: size[0] for path, size in sizes.items() if size is not None}


def parse_gates(file: Path, name: str, sizes: Mapping[str, int], points: Mapping[str, int] | None = None) -> Gates:
    """A gates file whose modules and lengths must be `sizes`, or `points` if the gates are Gaussian; see `read_gates`.

    Without `points`, Gaussian gates of any base are accepted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
            shapes = {path: tuple(tensors.get_slice(path).get_shape()) for path in tensors.keys()}  # noqa: SIM118
            if problem := gate_problem(shapes, sizes, points=points):
                raise FusionError(f"{name}: {GATES_FILE} {problem}", hint=_train_again(name))
            vectors = {path: tensors.get_tensor(path).float() for path in shapes}
    except (SafetensorError, OSError) as error:
        raise FusionError(f"{name}: {GATES_FILE} cannot be read ({error})", hint=_train_again(name)) from None
    for path, vector in vectors.items():
        if not vector.isfinite().all():
            raise FusionError(f"{name} has NaN or Inf in the gate of {path}", hint=_train_again(name))
    if paths := gaussian_paths(shapes):
        gaussians = {path: Gaussian(*(vectors[f"{path}.{part}"] for part in Gaussian._fields)) for path in paths}
        return Gates({}, "gaussian", {}, _facts(metadata), gaussians)
    kind = metadata.get("kind", "")
    return Gates(vectors, kind if kind in KINDS else "trained", _offsets(metadata, name, sizes), _facts(metadata))


def _train_again(name: str) -> str:
    return f"train the gates again: hf-fusion fit gates {name} --data …"


def gaussian_paths(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Paths of the Gaussian gates among the tensors of a file."""
    return sorted(name.removesuffix(".directions") for name in shapes if name.endswith(".directions"))


def gate_problem(
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    also: Collection[str] = (),
    points: Mapping[str, int] | None = None,
) -> str:
    """What is wrong with gates of these shapes, as the end of a sentence; "" if nothing is.

    Args:
        shapes: module path → shape of its gate.
        sizes: module path → d_in of the required gates.
        also: modules whose gates are optional.
        points: path → d_in of the inputs that Gaussian gates of this base read, if known.
    """
    if paths := gaussian_paths(shapes):
        return _gaussian_problem(shapes, dict.fromkeys(paths) if points is None else points)
    if missing := sorted(sizes.keys() - shapes.keys()):
        return f"lacks a gate for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
    if unknown := sorted(shapes.keys() - sizes.keys() - set(also)):
        return f"has a gate for {unknown[0]}, which the adapter does not adapt"
    for path, size in sizes.items():
        if shapes[path] != (size,):
            return f"has a gate of shape {list(shapes[path])} for {path}, whose input has {size} features"
    return ""


def _gaussian_problem(shapes: Mapping[str, tuple[int, ...]], points: Mapping[str, int | None]) -> str:
    """What is wrong with Gaussian gates, see `gate_problem`; any width fits where it is None."""
    required = [f"{path}.{part}" for path in points for part in Gaussian._fields]
    if missing := [name for name in required if name not in shapes]:
        return f"lacks the tensor {missing[0]} of its Gaussian gates"
    if unknown := sorted(set(shapes) - set(required)):
        return f"has a tensor {unknown[0]}, which Gaussian gates of this base do not have"
    for path, width in points.items():
        mean, directions, variances = (shapes[f"{path}.{part}"] for part in Gaussian._fields)
        width = (mean[0] if mean else 0) if width is None else width
        if mean != (width,) or len(directions) != 2 or directions[1] != width or variances != directions[:1]:
            found = f"{list(mean)}, {list(directions)} and {list(variances)}"
            return f"has a Gaussian gate of shapes {found} for {path}, whose input has {width} features"
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
