"""From a plan to a folder: tensor by tensor in threads, a chunk of each in memory, shard by shard on the disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.merging.engine.checkpoint import DTYPES, Entry, Files
from hf_fusion.merging.engine.output import Shard, Spec, as_bytes, layout
from hf_fusion.merging.engine.tensors import CHUNK, CPU, Tensors, compute_on, merge_tensors, scratch

logger = logging.getLogger(__name__)

NARROW = ("F16", "F8_E4M3", "F8_E5M2")
"""Types that do not reach as far as the float32 that is merged in."""


def device_of(wanted: str | torch.device) -> torch.device:
    """A device that is here.

    Raises:
        FusionError: it is none, or none that computes in float64, or not here.
    """
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise FusionError(f"{shown(wanted)} is no device", "use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise FusionError(f"{device}: methods need float64, which is only sure on cpu and cuda", "use one of these")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise FusionError(f"there is no device {device} here: {count} of its kind are", "use cpu")
    return device


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model.

    Attributes:
        spec: its name, type and sizes.
        make: opens what it is merged from and says how; or None: it is copied.
        inputs: opens what it is merged from alone.
        copied: the stored tensor it is a copy of, byte for byte.
        described: all that decides its values, as plain data, for the digest of the merge.
        held: bytes of memory that making it takes beside its chunks, where a model is run for it.
    """

    spec: Spec
    make: Callable[[], tuple[Tensors, Any]] | None = None
    inputs: Callable[[], Tensors] | None = None
    copied: Entry | None = None
    described: Any = field(default=None, compare=False)
    held: int = 0


def digest_of(targets: Iterable[Target], *more: Any) -> str:
    """One word for everything that decides the bytes of a merge: its tensors, and more plain data."""
    rows = [(t.spec.name, t.spec.dtype, t.spec.shape, t.described) for t in targets]
    return hashlib.sha256(json.dumps([*more, rows], default=str).encode()).hexdigest()


def write_tensors(
    targets: Sequence[Target],
    folder: Path,
    files: Files,
    *,
    threads: int,
    shard_bytes: int,
    process: tuple[int, int] = (0, 1),
    device: torch.device = CPU,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Spec]]:
    """Writes all shards of a merged model that are not there yet.

    Args:
        targets: its tensors, in the order of the files.
        folder: where the shards go; those with their final names are whole and kept.
        files: what the inputs are read with.
        threads: tensors that are merged at a time.
        shard_bytes: most bytes of a file.
        process: (number, count) of the processes that share the work: each writes every count-th shard.
        device: where whole matrices are multiplied and decomposed.
        progress: called with the bytes of each tensor that is done.

    Returns:
        What the model's shards hold; modules in folders below it have a file each.

    Raises:
        FusionError: an input cannot be read, the disk is full, or a merged tensor is not finite.
    """
    by_name = {target.spec.name: target for target in targets}
    planned = layout([target.spec for target in targets], shard_bytes)
    own = planned[process[0] :: process[1]]
    with ThreadPoolExecutor(threads, initializer=compute_on, initargs=(device,)) as pool:
        for name, specs in own:
            file = folder / name
            if file.exists():
                progress(sum(spec.nbytes for spec in specs))
                continue
            largest_first = sorted(specs, key=lambda spec: -spec.nbytes)
            with Shard(file, specs) as shard:
                jobs = [pool.submit(_write, by_name[spec.name], shard, files, progress) for spec in largest_first]
                try:
                    wait(jobs, return_when=FIRST_EXCEPTION)
                finally:  # no thread may write any more when the file is closed
                    for job in jobs:
                        job.cancel()
                    wait(jobs)
                for job in jobs:  # of several that failed, always the first is told
                    if not job.cancelled():
                        job.result()
                shard.finish()
    return [specs for name, specs in planned if "/" not in name]


@torch.inference_mode()
def _write(target: Target, shard: Shard, files: Files, progress: Callable[[int], None]) -> None:
    """Merges one tensor into its place."""
    spec = target.spec
    if target.make is None:
        assert target.copied is not None
        _copy(target.copied, spec.name, shard, files)
    else:
        try:
            _merge(target.make, spec, shard)
        except (ValueError, torch.linalg.LinAlgError) as error:  # a method's word for what it cannot merge
            reason = one_line(error)
            raise FusionError(reason if spec.name in reason else f"{spec.name}: {reason}") from error
        except torch.OutOfMemoryError as error:
            raise FusionError(
                f"{spec.name}: the device has no memory left ({one_line(error)})", "--threads 1, or --device cpu"
            ) from error
    progress(spec.nbytes)


def _merge(make: Callable[[], tuple[Tensors, Any]], spec: Spec, shard: Shard) -> None:
    tensors, merged = make()
    most = torch.finfo(getattr(torch, DTYPES[spec.dtype][0])).max if spec.dtype in NARROW else None
    for start, values in merge_tensors(tensors, merged, spec.dtype):
        if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
            raise not_finite(tensors)
        if most is not None and max(map(abs, values.aminmax())) > most:
            raise FusionError(f"{spec.name} goes beyond {most:g}, the most that {spec.dtype} holds", "dtype: bfloat16")
        shard.write(spec.name, start, as_bytes(values, spec.dtype, scratch("raw", torch.uint8)))


def _copy(entry: Entry, name: str, shard: Shard, files: Files) -> None:
    for start in range(0, entry.numel, CHUNK):
        raw = scratch("raw", torch.uint8)[: min(CHUNK, entry.numel - start) * entry.itemsize].numpy()
        files.read(entry, start, raw)
        shard.write(name, start, raw)


def not_finite(tensors: Tensors) -> FusionError:
    """Which of the inputs holds NaN or Inf; or none of them does."""
    for number, reader in enumerate([*([tensors.base] if tensors.base else []), *tensors.experts]):
        if not bool(tensors.whole(reader).isfinite().all()):
            what = "the base" if tensors.base and not number else f"expert {number + (0 if tensors.base else 1)}"
            return FusionError(f"{tensors.name} of {what} has NaN or Inf")
    return FusionError(f"{tensors.name} becomes NaN or Inf by this merge", "choose smaller weights")
