"""Estimates the cost of a merge: bytes from the headers, time from a trial merge of one tensor."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from hf_fusion.merging.engine.stream import Target
from hf_fusion.merging.engine.tensors import CHUNK, merge_tensors
from hf_fusion.merging.plan import Plan

_TRIAL = 1 << 22  # elements: long enough to time, short enough to wait for


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a merge.

    Attributes:
        read: bytes of all inputs.
        written: bytes of the merged weights.
        memory: peak memory of the process, in bytes.
        seconds: duration, if the inputs are in the page cache.
    """

    read: int
    written: int
    memory: int
    seconds: float


def estimate(plan: Plan, threads: int) -> Estimate:
    """Estimates the cost of a planned merge on this machine.

    One tensor of medium size is merged and discarded; other tensors are assumed to take the same time per element.

    Args:
        plan: of the merge.
        threads: tensors that are merged in parallel.
    """
    merged = [target for target in plan.targets if target.make is not None and not target.memory]
    models = [*([plan.base] if plan.base else []), *plan.experts]
    read = sum(entry.nbytes for model in models for entry in model.entries.values())
    inputs = len(models)
    if plan.method.needs == "whole":  # all inputs of a tensor, and as much working memory
        widest = sorted((_numel(target) for target in merged), reverse=True)[:threads]
        working = 4 * (2 * inputs + 2) * sum(widest)
    else:
        working = 4 * CHUNK * (4 * inputs + 8) * threads
    working += max((target.memory for target in plan.targets), default=0)
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
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
