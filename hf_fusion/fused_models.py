"""The public model classes, whose `from_experts` here also takes ids and folders, not only loaded experts.

`hf_fusion.models` is published with each model and does not import hf_fusion, so its classes get their loaders here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_fusion.hub.gates_file import read_gates
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.in_memory import merge_to_start_from
from hf_fusion.models.configuration_foe import FoEConfig
from hf_fusion.models.configuration_phatgoose import PhatgooseConfig
from hf_fusion.models.configuration_wemoe import WEMoEConfig
from hf_fusion.models.modeling_foe import FoEForGeneration, FoEModel
from hf_fusion.models.modeling_phatgoose import PhatgooseForGeneration, PhatgooseRouter
from hf_fusion.models.modeling_wemoe import WEMoEForGeneration, WEMoEModel
from hf_fusion.models.processing_foe import FoEProcessor
from hf_fusion.models.trace_foe import FoETrace
from hf_fusion.models.trace_phatgoose import PhatgooseTrace
from hf_fusion.models.trace_wemoe import WEMoETrace
from hf_fusion.training.gates import arrow_prototypes

if TYPE_CHECKING:
    from pathlib import Path

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.types import Expert


logger = logging.getLogger(__name__)


def _load_for_foe(experts: Sequence[ExpertLike], base: ExpertLike | None = None) -> list[Expert]:
    """Loads the experts of `FoEModel.from_experts`."""
    return load_experts(experts, base=base)


def _load_for_phatgoose(
    experts: Sequence[ExpertLike],
    base: ExpertLike | None = None,
    missing_gates: str | Mapping[str, str | Path] | None = None,
    all_arrow: bool = False,
) -> list[Expert]:
    """Loads the experts of `PhatgooseRouter.from_experts`, with substitutes for missing gates."""
    loaded = load_experts(experts, base=base)
    names = [expert.name for expert in loaded]
    given = dict(missing_gates) if isinstance(missing_gates, Mapping) else {}
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"missing_gates names {unknown[0]}, but the experts are {', '.join(names)}")
    if superfluous := [expert.name for expert in loaded if expert.name in given and expert.gates is not None]:
        raise ValueError(f"missing_gates names {superfluous[0]}, which has gates")

    without = [expert.name for expert in loaded if expert.gates is None]
    to_arrow = [name for name in without if missing_gates == "arrow" or given.get(name) == "arrow"]
    if to_arrow and any(expert.gates is not None and expert.gates.gaussians for expert in loaded):
        logger.warning("%s has no gates: all experts are routed by Arrow prototypes", to_arrow[0])
        all_arrow = True  # scores of Gaussian gates and of prototypes cannot be compared

    def stand_in(expert: Expert) -> Expert:
        where = "arrow" if all_arrow or missing_gates == "arrow" else given.get(expert.name)
        if where is None or expert.adapter is None or (expert.gates is not None and not all_arrow):
            return expert
        if where == "arrow":
            return replace(expert, gates=arrow_prototypes(expert))
        gates = read_gates(where, expert.name, expert.adapter, expert.model)
        if gates is None:
            raise ValueError(f"{where} contains no gates for {expert.name}: write them there with hf_fusion.save_gates")
        return replace(expert, gates=gates)

    return [stand_in(expert) for expert in loaded]


def _load_for_wemoe(
    experts: Sequence[ExpertLike], base: ExpertLike | None = None
) -> tuple[list[Expert], Expert | None]:
    """Loads the experts and the base of `WEMoEModel.from_experts`."""
    base = load_experts([base])[0] if base is not None else None
    return load_experts(experts, base=base), base


FoEModel.load_experts = staticmethod(_load_for_foe)
PhatgooseRouter.load_experts = staticmethod(_load_for_phatgoose)
WEMoEModel.load_experts = staticmethod(_load_for_wemoe)
WEMoEModel.static_merge = staticmethod(merge_to_start_from)

__all__ = [
    "FoEConfig", "FoEForGeneration", "FoEModel", "FoEProcessor", "FoETrace", "PhatgooseConfig",
    "PhatgooseForGeneration", "PhatgooseRouter", "PhatgooseTrace", "WEMoEConfig", "WEMoEForGeneration",
    "WEMoEModel", "WEMoETrace",
]  # fmt: skip
