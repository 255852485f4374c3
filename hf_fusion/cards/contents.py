"""What the card of each family says that others do not: its settings, and its pictures in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.parts import CardContents, suite_view
from hf_fusion.hub.code import refuse_kernels

if TYPE_CHECKING:
    from hf_fusion.cards.card import CardFacts

MOST_TOLD = 8  # tasks of a picture that are told in words

# ---------------------------------------------------------------- Fusion of Experts


def _foe_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {key: config.get(key) for key in ("mode", "features_from", "frugal", "rule", "over", "weights")}


# ---------------------------------------------------------------- PHATGOOSE


def _phatgoose_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the config, and from the model it describes, built without memory."""
    from hf_fusion.hub.headers import on_meta
    from hf_fusion.models.assembly_phatgoose import readers_of
    from hf_fusion.models.configuration_phatgoose import PhatgooseConfig
    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter

    refuse_kernels(config, str(folder))
    model = on_meta(lambda: PhatgooseRouter(PhatgooseConfig.from_pretrained(folder)))
    summary, towers = model.summary(), len(readers_of(model.backbone, model.config.is_encoder_decoder))
    known = ("parameters", "expert_parameters", "routed_linears", "relative_cost")
    given = ("router_temperature", "routing", "base_by_reference", "head")
    options = {key: config.get(key) for key in given} | {key: summary[key] for key in known}
    reads = "texts and images" if towers > 1 else "images" if model.main_input_name == "pixel_values" else "texts"
    return options | {"num_experts_per_tok": summary["top_k"], "reads": reads}


def _most_by_task(experts: Sequence[str], tasks: Sequence[str], rows: Sequence[Sequence[float]], form: str) -> str:
    """A map of tasks × experts in words: who gets most on each of the first tasks."""
    shown = [
        f"{task}: {experts[row.index(max(row))].rpartition('/')[2]} {form.format(max(row))}".replace("%", " %")
        for task, row in zip(tasks, map(list, rows), strict=True)
    ]
    more = "" if len(shown) <= MOST_TOLD else f"; and {len(shown) - MOST_TOLD} tasks more"
    return "; ".join(shown[:MOST_TOLD]) + more


def _phatgoose_view(facts: CardFacts) -> dict[str, Any]:
    """What the suite's tables need, the kinds of gates, and the picture in words."""
    gates = {word for expert in facts.experts for word in (expert.gates or "").split()}
    view, routing = suite_view(facts) | {"gates": gates}, facts.routing
    if routing:
        most = _most_by_task(routing["experts"], routing["tasks"], routing["weights"], "{:.0%}")
        view["alt"] = f"Heat map of tasks and experts. The expert with the most weight on {most}"
    return view


# ---------------------------------------------------------------- WEMoE

# whether and how task vectors are stored -> what the card says of it
STORAGE = {
    "exact": "in the model's own precision",
    "bfloat16": "in bfloat16, beside a base in the model's own precision",
    "sparse": "without all but the largest {density:.0%} of their entries",
    "low-rank": "as products of rank {ranks}, which keep {energy:.1%} of their squared norm ({least:.1%} at least)",
}
STORAGE["low-rank-bfloat16"] = f"{STORAGE['low-rank']}, in bfloat16"


def _wemoe_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the config, and from the model it describes, built without memory."""
    from hf_fusion.hub.headers import on_meta
    from hf_fusion.models.configuration_wemoe import WEMoEConfig
    from hf_fusion.models.modeling_wemoe import WEMoEModel

    refuse_kernels(config, str(folder))
    model = on_meta(lambda: WEMoEModel(WEMoEConfig.from_pretrained(folder)))
    own, summary = model.config, model.summary()
    known = ("parameters", "upscaled_linears", "upscaled_parameters", "merged_parameters", "head_parameters")
    given = ("head", "routing", "router_layers", "shared_router", "batch_reduce", "scaling", "merge", "adaptation")
    options = {key: getattr(own, key) for key in given} | {key: summary[key] for key in known}
    linears = [linear for unit in model.units for linear in unit.linears if linear.biases is not None]
    options["upscaled_parameters"] += sum(linear.out_features for linear in linears)  # the base's biases
    ranks = [rank for unit in own.units for size in unit["sizes"] for rank in (size if isinstance(size, list) else [])]
    energy = list(summary["energy"].values()) or [1.0]
    storage = STORAGE[own.task_vectors].format(
        density=own.density,
        ranks=f"{min(ranks, default=0)} to {max(ranks, default=0)}" if len(set(ranks)) > 1 else max(ranks, default=0),
        energy=sum(energy) / len(energy),
        least=min(energy),
    )
    towers = all(hasattr(model.backbone, f"get_{kind}_features") for kind in ("text", "image"))
    reads = "texts and images" if towers else "images" if model.main_input_name == "pixel_values" else "texts"
    return options | {
        "router_parameters": summary["trainable"],
        "units": len(summary["units"]),
        "stored_bytes": summary["stored_bytes"],
        "merges": summary["relative_merge"] > 0,
        "storage": storage.replace("%", " %"),
        "top_k": own.num_experts_per_tok,
        "default_task": own.default_task,
        "task_heads": bool(own.task_heads),
        "adapters": sum(bool(row.get("adapter")) for row in own.experts),
        "reads": reads,
    }


def _wemoe_view(facts: CardFacts) -> dict[str, Any]:
    """What the suite's tables need, and the picture in words."""
    view, found = suite_view(facts), facts.routing
    if found:
        means = [[sum(layer) / len(rows) for layer in zip(*rows, strict=True)] for rows in found["coefficients"]]
        most = _most_by_task(found["experts"], found["tasks"], means, "{:.2f}")
        view["alt"] = f"Coefficients by layer, one panel a task. The expert with the largest mean on {most}"
    return view


CONTENTS = {
    "foe": CardContents(_foe_options),
    "phatgoose": CardContents(_phatgoose_options, _phatgoose_view),
    "wemoe": CardContents(_wemoe_options, _wemoe_view),
}
"""Name of a family, as in `families.FAMILIES` → what its cards say."""
