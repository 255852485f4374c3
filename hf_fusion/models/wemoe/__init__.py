"""WEMoE: everything in this folder travels with a published model."""

from typing import Any

from .build_wemoe import check_options
from .configuration_wemoe import WEMoEConfig
from .modeling_wemoe import WEMoEForGeneration, WEMoEModel
from .routing_wemoe import WEMoETrace


def _load_experts(experts: Any, base: Any = None) -> tuple[list[Any], Any]:
    """Where hf_fusion is installed, `from_experts` takes ids, folders and bare models."""
    from hf_fusion.hub.load import load_experts

    base = load_experts([base])[0] if base is not None else None
    return load_experts(experts, base=base), base


WEMoEModel.load_experts = staticmethod(_load_experts)

__all__ = ["WEMoETrace", "WEMoEConfig", "WEMoEForGeneration", "WEMoEModel", "check_options"]
