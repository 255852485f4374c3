"""What measurements ran on."""

from __future__ import annotations

import platform

import torch


def machine() -> str:
    """One line on the processor, the device, Python and torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}"
