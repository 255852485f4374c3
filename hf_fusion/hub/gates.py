"""PHATGOOSE's gates beside an adapter: the file ``phatgoose_gates.safetensors`` and the tag that finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_fusion.experts import Adapter
from hf_fusion.hub.adapters import linear_sizes

if TYPE_CHECKING:
    import torch

GATES_FILE, GATES_TAG = "phatgoose_gates.safetensors", "phatgoose-gates"


def gate_sizes(adapter: Adapter, base: torch.nn.Module) -> dict[str, int]:
    """Module path → length of its gate (d_in), for each linear that an adapter updates or saves whole, sorted."""
    modules = dict(base.named_modules())
    saved = {name.removesuffix(".weight") for name in adapter.saved if name.endswith(".weight")}
    sizes = {path: linear_sizes(modules.get(path)) for path in {*adapter.lora, *saved}}
    return {path: size[0] for path, size in sorted(sizes.items()) if size is not None}
