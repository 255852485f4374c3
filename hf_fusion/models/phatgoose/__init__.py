"""PHATGOOSE: everything in this folder travels with a published model."""

from typing import Any

from .assembly_phatgoose import check_options, readers_of
from .configuration_phatgoose import PhatgooseConfig
from .modeling_phatgoose import PhatgooseForGeneration, PhatgooseRouter
from .trace_phatgoose import PhatgooseTrace


def _load_experts(experts: Any, base: Any = None, missing_gates: Any = None, all_arrow: bool = False) -> list[Any]:
    """Where hf_fusion is installed, `from_experts` takes ids and folders, and finds stand-ins for missing gates."""
    from dataclasses import replace

    from hf_fusion.hub.gates import read_gates
    from hf_fusion.hub.load import load_experts
    from hf_fusion.training.gates import arrow_prototypes

    loaded = load_experts(experts, base=base)
    names = [expert.name for expert in loaded]
    given = {} if missing_gates in (None, "arrow") else dict(missing_gates)
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"missing_gates names {unknown[0]}, but the experts are {', '.join(names)}")
    if superfluous := [expert.name for expert in loaded if expert.name in given and expert.gates is not None]:
        raise ValueError(f"missing_gates names {superfluous[0]}, which has gates")

    def stand_in(expert: Any) -> Any:
        where = "arrow" if all_arrow or missing_gates == "arrow" else given.get(expert.name)
        if where is None or expert.adapter is None or (expert.gates is not None and not all_arrow):
            return expert
        if where == "arrow":
            return replace(expert, gates=arrow_prototypes(expert))
        gates = read_gates(where, expert.name, expert.adapter, expert.model)
        if gates is None:
            raise ValueError(f"{where} holds no gates for {expert.name}: write them there with hf_fusion.save_gates")
        return replace(expert, gates=gates)

    return [stand_in(expert) for expert in loaded]


PhatgooseRouter.load_experts = staticmethod(_load_experts)

__all__ = [
    "PhatgooseConfig",
    "PhatgooseForGeneration",
    "PhatgooseRouter",
    "PhatgooseTrace",
    "check_options",
    "readers_of",
]
