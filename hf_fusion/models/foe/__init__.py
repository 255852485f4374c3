"""Fusion of Experts: everything in this folder travels with a published model."""

from typing import Any

from .configuration_foe import FoEConfig
from .generation_foe import FoEForGeneration
from .modeling_foe import FoEModel
from .processing_foe import FoEProcessor


def _load_experts(experts: Any, base: Any = None) -> Any:
    """Where hf_fusion is installed, `from_experts` takes ids and folders too."""
    from hf_fusion.hub.load import load_experts

    return load_experts(experts, base=base)


FoEModel.load_experts = staticmethod(_load_experts)

__all__ = ["FoEConfig", "FoEForGeneration", "FoEModel", "FoEProcessor"]
