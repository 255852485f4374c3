"""The demo's weights, in a separate distribution so that hf_fusion itself stays small (they take 36 MB)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hf_fusion.errors import FusionError


def demo_weights(name: str) -> Path:
    """A folder or file of the distribution ``hf_fusion_demo``.

    Args:
        name: "digit_experts", "vit_experts", "smollm2_experts", a path below one of them, or
            "smollm2_reference.jsonl".

    Raises:
        FusionError: the distribution is not installed, or does not contain this name.
    """
    spec = find_spec("hf_fusion_demo")
    hint = "pip install 'hf_fusion[demo]', or in a clone: pip install ./demo_weights '.[demo]'"
    if spec is None or spec.origin is None:
        raise FusionError("the demo's weights are not installed (hf_fusion_demo)", hint)
    path = Path(spec.origin).parent / name
    if not path.exists():
        raise FusionError(f"hf_fusion_demo has no {name}", hint)
    return path
