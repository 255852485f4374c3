"""What the card of each family shows that others do not: its settings, and its figure's alternative text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.evaluation.results import Results
from hf_fusion.hub.remote_code import refuse_kernels

if TYPE_CHECKING:
    from hf_fusion.cards.card import CardFacts

MAX_TASKS_IN_ALT = 8  # tasks listed in the alternative text of a figure


@dataclass(frozen=True)
class CardContents:
    """How the card of one family is filled in, beside its template ``model_cards/NAME.md.j2``.

    Attributes:
        options: (config, folder) → the settings that the template shows.
        view: facts → further variables of the template.
    """

    options: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    view: Callable[[CardFacts], dict[str, Any]] = lambda facts: {}


def suite_view(facts: CardFacts) -> dict[str, Any]:
    """Template variables: groups of tasks, the predictors compared task by task, and whether experts have labels."""
    results = facts.measured or Results([], [])
    groups = results.groups().items()
    return {
        "groups": [{"name": name, "tasks": tasks, "n": sum(task.n for task in tasks)} for name, tasks in groups],
        "compared": [p for p in results.predictors if p.kind in ("base", "fused", "baseline")],
        "labelled": any(expert.labels for expert in facts.experts),
    }


# ---------------------------------------------------------------- Fusion of Experts


def _foe_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {key: config.get(key) for key in ("mode", "features_from", "frugal", "rule", "over", "weights")}


# ---------------------------------------------------------------- PHATGOOSE


def _phatgoose_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the config, and from its model built on the meta device."""
    from hf_fusion.hub.headers import build_on_meta
    from hf_fusion.models.assembly_phatgoose import readers_of
    from hf_fusion.models.configuration_phatgoose import PhatgooseConfig
    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter

    refuse_kernels(config, str(folder))
    model = build_on_meta(lambda: PhatgooseRouter(PhatgooseConfig.from_pretrained(folder)))
    summary, towers = model.summary(), len(readers_of(model.backbone, model.config.is_encoder_decoder))
    known = ("parameters", "expert_parameters", "routed_linears", "relative_cost")
    given = ("router_temperature", "routing", "base_by_reference", "head")
    options = {key: config.get(key) for key in given} | {key: summary[key] for key in known}
    reads = "texts and images" if towers > 1 else "images" if model.main_input_name == "pixel_values" else "texts"
    return options | {"num_experts_per_tok": summary["top_k"], "reads": reads}


def _alt_text(experts: Sequence[str], tasks: Sequence[str], rows: Sequence[Sequence[float]], form: str) -> str:
    """Alternative text of a heat map (tasks × experts): the largest expert of each of the first tasks."""
    shown = [
        f"{task}: {experts[row.index(max(row))].rpartition('/')[2]} {form.format(max(row))}".replace("%", " %")
        for task, row in zip(tasks, map(list, rows), strict=True)
    ]
    more = "" if len(shown) <= MAX_TASKS_IN_ALT else f"; and {len(shown) - MAX_TASKS_IN_ALT} tasks more"
    return "; ".join(shown[:MAX_TASKS_IN_ALT]) + more


def _phatgoose_view(facts: CardFacts) -> dict[str, Any]:
    """Template variables: those of a suite, the kinds of gates, and the figure's alternative text."""
    gates = {word for expert in facts.experts for word in (expert.gates or "").split()}
    view, routing = suite_view(facts) | {"gates": gates}, facts.routing
    if routing:
        most = _alt_text(routing["experts"], routing["tasks"], routing["weights"], "{:.0%}")
        view["alt"] = f"Heat map of tasks and experts. The expert with the most weight on {most}"
    return view


# ---------------------------------------------------------------- WEMoE

# `task_vectors` of the config → words on the card
STORAGE = {
    "exact": "in the model's own precision",
    "bfloat16": "in bfloat16, beside a base in the model's own precision",
    "sparse": "without all but the largest {density:.0%} of their entries",
    "low-rank": "as products of rank {ranks}, which keep {energy:.1%} of their squared norm ({least:.1%} at least)",
}
STORAGE["low-rank-bfloat16"] = f"{STORAGE['low-rank']}, in bfloat16"


def _wemoe_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the config, and from its model built on the meta device."""
    from hf_fusion.hub.headers import build_on_meta
    from hf_fusion.models.configuration_wemoe import WEMoEConfig
    from hf_fusion.models.modeling_wemoe import WEMoEModel

    refuse_kernels(config, str(folder))
    model = build_on_meta(lambda: WEMoEModel(WEMoEConfig.from_pretrained(folder)))
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
    """Template variables: those of a suite, and the figure's alternative text."""
    view, found = suite_view(facts), facts.routing
    if found:
        means = [[sum(layer) / len(rows) for layer in zip(*rows, strict=True)] for rows in found["coefficients"]]
        most = _alt_text(found["experts"], found["tasks"], means, "{:.2f}")
        view["alt"] = f"Coefficients by layer, one panel per task. The expert with the largest mean on {most}"
    return view


CONTENTS = {
    "foe": CardContents(_foe_options),
    "phatgoose": CardContents(_phatgoose_options, _phatgoose_view),
    "wemoe": CardContents(_wemoe_options, _wemoe_view),
}
"""Family, as in `families.FAMILIES` → the contents of its cards."""
