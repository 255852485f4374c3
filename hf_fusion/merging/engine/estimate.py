"""What a merge will take, before it is made: bytes from the headers, seconds from one tensor merged for a trial."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from hf_fusion.merging.engine.stream import Target
from hf_fusion.merging.engine.tensors import CHUNK, merge_tensors
from hf_fusion.merging.plan import Plan

_TRIAL = 1 << 22  # elements: enough to be timed, little to wait for


@dataclass(frozen=True)
class Estimate:
    """What a merge will take.

    Attributes:
        read: bytes of all inputs.
        written: bytes of the merged weights.
        memory: bytes at its peak, of the whole process.
        seconds: of the merge, if the disk is as fast as its cache.
    """

    read: int
    written: int
    memory: int
    seconds: float


def estimate(plan: Plan, threads: int) -> Estimate:
    """What a planned merge will take on this machine.

    One tensor of a middling size is merged and thrown away; the others are taken to cost as much for each element.
    """
    merged = [target for target in plan.targets if target.make is not None and not target.held]
    models = [*([plan.base] if plan.base else []), *plan.experts]
    read = sum(entry.nbytes for model in models for entry in model.entries.values())
    inputs = len(models)
    if plan.method.needs == "whole":  # all inputs of one tensor at once, and about as much to work with
        widest = sorted((_numel(target) for target in merged), reverse=True)[:threads]
        working = 4 * (2 * inputs + 2) * sum(widest)
    else:
        working = 4 * CHUNK * (4 * inputs + 8) * threads
    working += max((target.held for target in plan.targets), default=0)
    seconds = 0.0
    if merged:
        trial = min(merged, key=lambda target: abs(_numel(target) - _TRIAL))
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a merge
        began = time.perf_counter()
        with torch.inference_mode():
            assert trial.make is not None
            for _ in merge_tensors(*trial.make(), trial.spec.dtype):
                pass
        spent = time.perf_counter() - began
        torch.set_num_threads(before)
        seconds = spent * sum(map(_numel, merged)) / max(1, _numel(trial)) / threads
    return Estimate(read, plan.nbytes, _resident() + working, seconds)


def _numel(target: Target) -> int:
    count = 1
    for size in target.spec.shape:
        count *= size
    return count


def _resident() -> int:
    """Bytes of memory that this process has had at its peak: what is imported, so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
