"""Settings of a Space, from its environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

try:
    import spaces
except ImportError:
    spaces = None

# ZeroGPU's decorator; `spaces` can also be this project's folder, which has no such attribute
on_gpu: Any = spaces.GPU if hasattr(spaces, "GPU") else lambda function: function


@dataclass(frozen=True)
class Settings:
    """Which model is served.

    Attributes:
        model_id: its id, or a folder.
        revision: the commit whose code was reviewed; None if not set.
        trusted: whether the model's code may run.
        template: the form of a prompt, with {} for the prompt; None if not set.
    """

    model_id: str
    revision: str | None = None
    trusted: bool = False
    template: str | None = None


def read_settings(default: str) -> Settings:
    """The settings from environment variables; `default` is the model id if MODEL_ID is not set."""
    return Settings(
        os.environ.get("MODEL_ID", default),
        os.environ.get("MODEL_REVISION") or None,
        os.environ.get("TRUST_REMOTE_CODE", "").lower() in ("1", "true", "yes"),
        os.environ.get("PROMPT_TEMPLATE") or None,
    )
