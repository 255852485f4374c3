"""PHATGOOSE: everything in this folder travels with a published model."""

from typing import Any

from .configuration_phatgoose import PhatgooseConfig
from .modeling_phatgoose import PhatgooseForGeneration, PhatgooseRouter
from .trace_phatgoose import RoutingTrace


def _load_experts(
    experts: Any, base: Any = None, prototypes: str | None = None, all_prototypes: bool = False
) -> list[Any]:
    """Where hf_fusion is installed, `from_experts` takes ids and folders, and makes prototypes for missing gates."""
    from dataclasses import replace

    from hf_fusion.hub.load import load_experts
    from hf_fusion.training.gates import arrow_prototypes

    loaded = load_experts(experts, base=base)
    if prototypes is None:
        return loaded
    return [
        replace(expert, gates=arrow_prototypes(expert)) if all_prototypes or expert.gates is None else expert
        for expert in loaded
    ]


PhatgooseRouter.load_experts = staticmethod(_load_experts)

__all__ = ["PhatgooseConfig", "PhatgooseForGeneration", "PhatgooseRouter", "RoutingTrace"]
