"""The most memory that a model took: of this process, or of its GPU."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def forget_peak(on_gpu: bool) -> None:
    """Resets the peak; on systems other than Linux it cannot be reset, and stays that of the process."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(on_gpu: bool) -> int:
    """The most memory since `forget_peak`, in bytes."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
