"""What the card of each family shows that others do not: its settings, and its figure's alternative text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.hub.remote_code import refuse_kernels

if TYPE_CHECKING:
    from hf_fusion.cards.facts import CardFacts

MAX_TASKS_IN_ALT = 8  # tasks listed in the alternative text of a figure


@dataclass(frozen=True)
class CardContents:
    """How the card of one family is filled in, beside its template ``model_cards/NAME.md.j2``.

    Attributes:
        options: (config, folder) → the settings that the template shows; "fitted", where something is to be fitted.
        paper: options → address and title of the method's paper, as in `cards.citations`; empty without one.
        ranks: config → LoRA ranks of each expert, as text; empty where the config does not have them.
        fit: options → the arguments that ``hf-fusion fit`` was given; empty where nothing was fitted.
        view: facts → further variables of the template.
    """

    options: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    paper: Callable[[Mapping[str, Any]], tuple[str, str]]
    ranks: Callable[[Mapping[str, Any]], list[str | None]] = lambda config: []
    fit: Callable[[Mapping[str, Any]], list[str]] = lambda options: []
    view: Callable[[CardFacts], dict[str, Any]] = lambda facts: {}


def labelled_view(facts: CardFacts) -> dict[str, Any]:
    """Template variables: which columns the table of experts has."""
    return {
        "labelled": any(expert.labels for expert in facts.experts),
        "ranked": any(expert.rank for expert in facts.experts),
    }


def _ranks_text(ranks: Iterable[int]) -> str | None:
    """Ranks of one expert's modules: "8", "4 to 16"; None for a full model."""
    found = [rank for rank in ranks if rank]
    if not found:
        return None
    return str(found[0]) if len(set(found)) == 1 else f"{min(found)} to {max(found)}"


# ---------------------------------------------------------------- Fusion of Experts


def _foe_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    shown = ("mode", "fuser", "features_from", "frugal", "rule", "over", "weights", "fitted")
    return {key: config.get(key) for key in shown}


def _foe_ranks(config: Mapping[str, Any]) -> list[str | None]:
    """A backbone lists the ranks of its experts in their order."""
    seen: Counter[int] = Counter()
    found = []
    for row in config["experts"]:
        backbone = row["backbone"]
        modules = config["backbones"][backbone].get("ranks") or {}
        found.append(_ranks_text(ranks[seen[backbone]] for ranks in modules.values()))
        seen[backbone] += 1
    return found


def _foe_fit(options: Mapping[str, Any]) -> list[str]:
    return ["--frugal"] if options.get("frugal") else []


def _foe_paper(options: Mapping[str, Any]) -> tuple[str, str]:
    """An ensemble's rules are FusionBench's."""
    if options.get("rule"):
        return "https://arxiv.org/abs/2406.03280", "FusionBench"
    return "https://arxiv.org/abs/2310.01542", "Fusion of Experts"


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
    given = ("router_temperature", "routing", "base_by_reference", "head", "gate_decay")
    options = {key: config.get(key) for key in given} | {key: summary[key] for key in known}
    reads = "texts and images" if towers > 1 else "images" if model.main_input_name == "pixel_values" else "texts"
    return options | {"num_experts_per_tok": summary["top_k"], "reads": reads}


def _phatgoose_ranks(config: Mapping[str, Any]) -> list[str | None]:
    return [_ranks_text(config["profiles"][row["profile"]]["ranks"].values()) for row in config["experts"]]


def _phatgoose_paper(options: Mapping[str, Any]) -> tuple[str, str]:
    if options["routing"] == "arrow":
        return "https://arxiv.org/abs/2405.11157", "Arrow"
    return "https://arxiv.org/abs/2402.05859", "PHATGOOSE"


def _alt_text(experts: Sequence[str], tasks: Sequence[str], rows: Sequence[Sequence[float]], form: str) -> str:
    """Alternative text of a heat map (tasks × experts): the largest expert of each of the first tasks."""
    shown = [
        f"{task}: {experts[row.index(max(row))].rpartition('/')[2]} {form.format(max(row))}".replace("%", " %")
        for task, row in zip(tasks, map(list, rows), strict=True)
    ]
    more = "" if len(shown) <= MAX_TASKS_IN_ALT else f"; and {len(shown) - MAX_TASKS_IN_ALT} tasks more"
    return "; ".join(shown[:MAX_TASKS_IN_ALT]) + more


def _phatgoose_view(facts: CardFacts) -> dict[str, Any]:
    """Template variables: columns of the experts, the kinds of gates, and the figure's alternative text."""
    gates = {word for expert in facts.experts for word in (expert.gates or "").split()}
    view, routing = labelled_view(facts) | {"gates": gates}, facts.routing
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
        "fitted": bool(own.adaptation),
        "adapters": sum(bool(row.get("adapter")) for row in own.experts),
        "reads": reads,
    }


def _wemoe_fit(options: Mapping[str, Any]) -> list[str]:
    how = options.get("adaptation") or {}
    names = ["loss", "steps", "learning_rate", "batch_size", *(["diversity"] if how.get("loss") == "entropy" else [])]
    return [word for name in names if name in how for word in (f"--{name.replace('_', '-')}", str(how[name]))]


def _wemoe_paper(options: Mapping[str, Any]) -> tuple[str, str]:
    if options["routing"] == "smile":
        return "https://arxiv.org/abs/2408.10174", "SMILE"
    return "https://arxiv.org/abs/2402.00433", "WEMoE"


def _wemoe_view(facts: CardFacts) -> dict[str, Any]:
    """Template variables: columns of the experts, and the figure's alternative text."""
    view, found = labelled_view(facts), facts.routing
    if found:
        means = [[sum(layer) / len(rows) for layer in zip(*rows, strict=True)] for rows in found["coefficients"]]
        most = _alt_text(found["experts"], found["tasks"], means, "{:.2f}")
        view["alt"] = f"Coefficients by layer, one panel per task. The expert with the largest mean on {most}"
    return view


CONTENTS = {
    "foe": CardContents(_foe_options, _foe_paper, _foe_ranks, _foe_fit, labelled_view),
    "phatgoose": CardContents(_phatgoose_options, _phatgoose_paper, _phatgoose_ranks, view=_phatgoose_view),
    "wemoe": CardContents(_wemoe_options, _wemoe_paper, fit=_wemoe_fit, view=_wemoe_view),
}
"""Family, as in `families.FAMILIES` → the contents of its cards."""
