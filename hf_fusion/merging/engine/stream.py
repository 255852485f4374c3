"""Executes a planned merge: tensors in parallel threads, each in chunks, shard by shard on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.merging.engine.checkpoint import DTYPES, OpenFiles, TensorEntry
from hf_fusion.merging.engine.output import Shard, TensorSpec, convert_to_bytes, plan_files
from hf_fusion.merging.engine.tensors import CHUNK, CPU, Tensors, compute_on, merge_tensors, scratch

logger = logging.getLogger(__name__)

NARROW_DTYPES = ("F16", "F8_E4M3", "F8_E5M2")
"""Dtypes with a smaller range than float32, in which merges are computed."""


def parse_device(wanted: str | torch.device) -> torch.device:
    """An available device.

    Raises:
        FusionError: it is not a device, does not support float64, or is not available.
    """
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise FusionError(f"{shown(wanted)} is not a device", "use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise FusionError(f"{device}: methods need float64, which only cpu and cuda always support", "use one of these")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise FusionError(f"device {device} is not available: {count} of its type are", "use cpu")
    return device


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model.

    Attributes:
        spec: its name, dtype and shape.
        make: opens its inputs and calls the method: () -> (inputs, what the method returned); None for a copy.
        inputs: opens its inputs alone.
        copied: the stored tensor that is copied byte for byte.
        identity: everything that determines its values, as plain data, for the digest of the merge.
        memory: bytes that computing it takes besides its chunks, if it runs a model.
    """

    spec: TensorSpec
    make: Callable[[], tuple[Tensors, Any]] | None = None
    inputs: Callable[[], Tensors] | None = None
    copied: TensorEntry | None = None
    identity: object = field(default=None, compare=False)
    memory: int = 0


def compute_digest(targets: Iterable[Target], *more: object) -> str:
    """SHA-256 of everything that determines the bytes of a merge: its tensors, and more plain data."""
    rows = [(t.spec.name, t.spec.dtype, t.spec.shape, t.identity) for t in targets]
    return hashlib.sha256(json.dumps([*more, rows], default=str).encode()).hexdigest()


def write_tensors(
    targets: Sequence[Target],
    folder: Path,
    files: OpenFiles,
    *,
    threads: int,
    shard_bytes: int,
    process: tuple[int, int] = (0, 1),
    device: torch.device = CPU,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[TensorSpec]]:
    """Writes the shards of a merged model that do not exist yet.

    Args:
        targets: its tensors, in the order of the files.
        folder: for the shards; those with their final names are complete and kept.
        files: reads the inputs.
        threads: tensors that are merged in parallel.
        shard_bytes: maximum bytes of a file.
        process: (rank, count) of the processes that share the work: each writes every count-th shard.
        device: for products and decompositions of whole matrices.
        progress: called with the bytes of each finished tensor.

    Returns:
        The tensors of each of the model's shards, without modules in subfolders, which have one file each.

    Raises:
        FusionError: an input cannot be read, the disk is full, or a merged tensor is not finite.
    """
    by_name = {target.spec.name: target for target in targets}
    planned = plan_files([target.spec for target in targets], shard_bytes)
    assigned = planned[process[0] :: process[1]]
    with ThreadPoolExecutor(threads, initializer=compute_on, initargs=(device,)) as pool:
        for name, specs in assigned:
            file = folder / name
            if file.exists():
                progress(sum(spec.nbytes for spec in specs))
                continue
            largest_first = sorted(specs, key=lambda spec: -spec.nbytes)
            with Shard(file, specs) as shard:
                jobs = [pool.submit(_write, by_name[spec.name], shard, files, progress) for spec in largest_first]
                try:
                    wait(jobs, return_when=FIRST_EXCEPTION)
                finally:  # no thread may write after the file is closed
                    for job in jobs:
                        job.cancel()
                    wait(jobs)
                for job in jobs:  # if several failed, the first error is raised
                    if not job.cancelled():
                        job.result()
                shard.finish()
    return [specs for name, specs in planned if "/" not in name]


@torch.inference_mode()
def _write(target: Target, shard: Shard, files: OpenFiles, progress: Callable[[int], None]) -> None:
    """Merges one tensor and writes it to its shard."""
    spec = target.spec
    if target.make is None:
        assert target.copied is not None
        _copy(target.copied, spec.name, shard, files)
    else:
        with explain_merge_errors(spec.name):
            _merge(target.make, spec, shard)
    progress(spec.nbytes)


@contextmanager
def explain_merge_errors(name: str) -> Iterator[None]:
    """Turns the errors of methods within this context into a `FusionError` that names the tensor."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # raised by methods for what they cannot merge
        reason = one_line(error)
        raise FusionError(reason if name in reason else f"{name}: {reason}") from error
    except torch.OutOfMemoryError as error:
        raise FusionError(
            f"{name}: the device has no memory left ({one_line(error)})", "--threads 1, or --device cpu"
        ) from error


def _merge(make: Callable[[], tuple[Tensors, Any]], spec: TensorSpec, shard: Shard) -> None:
    for start, values in merged_values(make, spec):
        shard.write(spec.name, start, convert_to_bytes(values, spec.dtype, scratch("raw", torch.uint8)))


def merged_values(make: Callable[[], tuple[Tensors, Any]], spec: TensorSpec) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, values) of a merged tensor in order, in float32 or in its dtype, checked to be finite in it.

    Raises:
        FusionError: a value is not finite, or exceeds the maximum of the dtype.
        ValueError: the method cannot merge the tensor.
    """
    tensors, merged = make()
    most = torch.finfo(getattr(torch, DTYPES[spec.dtype][0])).max if spec.dtype in NARROW_DTYPES else None
    for start, values in merge_tensors(tensors, merged, spec.dtype):
        if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
            raise not_finite_error(tensors)
        if most is not None and max(map(abs, values.aminmax())) > most:
            raise FusionError(f"{spec.name} exceeds {most:g}, the maximum of {spec.dtype}", "dtype: bfloat16")
        yield start, values


def _copy(entry: TensorEntry, name: str, shard: Shard, files: OpenFiles) -> None:
    for start in range(0, entry.numel, CHUNK):
        raw = scratch("raw", torch.uint8)[: min(CHUNK, entry.numel - start) * entry.itemsize].numpy()
        files.read(entry, start, raw)
        shard.write(name, start, raw)


def not_finite_error(tensors: Tensors) -> FusionError:
    """The error for a merged tensor with NaN or Inf: names the input that has them, if one does."""
    for index, reader in enumerate([*([tensors.base] if tensors.base else []), *tensors.experts]):
        if not bool(tensors.whole(reader).isfinite().all()):
            what = "the base" if tensors.base and not index else f"expert {index + (0 if tensors.base else 1)}"
            return FusionError(f"{tensors.name} of {what} has NaN or Inf")
    return FusionError(f"{tensors.name} becomes NaN or Inf in this merge", "choose smaller weights")
