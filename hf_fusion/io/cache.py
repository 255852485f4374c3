"""The cache folder, for trained experts, converted weights and experts' outputs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``HF_FUSION_CACHE``; else ``hf_fusion`` in ``HF_HOME`` where that is set; else ``~/.cache/hf_fusion``."""
    home = os.environ.get("HF_HOME")
    usual = Path(home) / "hf_fusion" if home else Path("~/.cache/hf_fusion").expanduser()
    return Path(os.environ.get("HF_FUSION_CACHE", usual))
