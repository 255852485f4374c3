"""What measurements ran on."""

from __future__ import annotations

import platform

import torch


def machine() -> str:
    """One line on the processor, the device, Python and torch."""
    threads = torch.get_num_threads()
    device = f"{threads} CPU thread{'s' * (threads > 1)}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}"
