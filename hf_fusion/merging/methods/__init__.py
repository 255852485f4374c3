"""The static merging methods: a function each, in the file that its kind is named by, and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.schema import Parameter, declared, parameters_of


@dataclass(frozen=True)
class MergeMethod:
    """A static merging method.

    Attributes:
        place: its file in this folder, and the function there: (`Tensors`, parameters) -> `Combination`, a function
            of a `Chunk`, or the merged tensor.
        title: what cards and tables call it.
        base: whether it needs the model that the experts were fine-tuned from, or takes it if it is there; "" where it
            has no use for it.
        experts: how many it merges: at least, at most (None: any number).
        needs: what of a tensor is in memory at once: "chunks" of it, read once; chunks read twice or more for their
            "norms" or their "thresholds"; or the "whole" of it, for all experts.
        paper: arXiv number or address.
        statistics: what must have been measured of every expert on its own data, if anything: a folder that its
            ``parameters: {statistics: FOLDER}`` names (`hf_fusion.training.measure`).
        merges: whole models, or LoRA adapters into one adapter (`hf_fusion.merging.lora`): its function is then of
            a module's factors.
        plan: "module:function" in `hf_fusion.merging` that plans the merged model, where its tensors are not those of
            its models.
        own: what every expert may have beside its parameters, for that plan.
    """

    place: str
    title: str
    base: Literal["", "optional", "needed"]
    experts: tuple[int, int | None]
    needs: Literal["chunks", "norms", "thresholds", "whole"]
    paper: str = ""
    statistics: Literal["", "fisher", "gram"] = ""
    merges: Literal["models", "adapters"] = "models"
    plan: str = ""
    own: tuple[str, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), name)

    @property
    def url(self) -> str:
        """Where its paper is; empty where there is none."""
        return f"https://arxiv.org/abs/{self.paper}" if self.paper[:1].isdigit() else self.paper

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Its parameters, by name: read from its file, which is not imported for it where that can be avoided."""
        module, _, name = self.place.partition(":")
        try:
            return declared(Path(__file__).with_name(f"{module}.py"), name)
        except NameError:  # they are told in words that another file defines
            return parameters_of(self.function)


def method_named(name: str) -> MergeMethod:
    """A row of `MERGE_METHODS`.

    Raises:
        FusionError: there is none of that name.
    """
    if name not in MERGE_METHODS:
        raise FusionError(f"{shown(name)} is not a static method", suggestion(name, MERGE_METHODS))
    return MERGE_METHODS[name]


# A new method is one more row.
MERGE_METHODS = {
    "linear": MergeMethod("linear:linear", "Linear (average)", "", (1, None), "chunks", "2203.05482"),
    "task_arithmetic": MergeMethod(
        "linear:task_arithmetic", "Task arithmetic", "needed", (1, None), "chunks", "2212.04089"
    ),
    "expo": MergeMethod("linear:expo", "ExPO", "needed", (1, 1), "chunks", "2404.16792"),
    "fisher": MergeMethod("measured:fisher", "Fisher", "", (1, None), "chunks", "2111.09832", statistics="fisher"),
    "regmean": MergeMethod("measured:regmean", "RegMean", "", (1, None), "whole", "2212.09849", statistics="gram"),
    "lora": MergeMethod("lora:lora", "LoRA adapters as one", "", (1, None), "whole", merges="adapters"),
    "moe": MergeMethod(
        "moe:moe",
        "MoE up-scaling",
        "optional",
        (1, None),
        "chunks",
        "2212.05055",
        plan="moe.plan:plan_moe",
        own=("prompts", "negative_prompts", "noise_scale", "residual_scale"),
    ),
    "passthrough": MergeMethod("passthrough:passthrough", "Passthrough", "", (1, 1), "chunks", "2312.15166"),
    "slerp": MergeMethod("spherical:slerp", "SLERP", "", (2, 2), "norms", "https://doi.org/10.1145/325165.325242"),
    "nuslerp": MergeMethod(
        "spherical:nuslerp", "NuSLERP", "optional", (2, 2), "norms", "https://doi.org/10.1145/325165.325242"
    ),
    "multislerp": MergeMethod(
        "spherical:multislerp",
        "Multi-SLERP",
        "optional",
        (2, None),
        "norms",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    ),
    "karcher": MergeMethod(
        "spherical:karcher", "Karcher mean", "", (2, None), "norms", "https://doi.org/10.1002/cpa.3160300502"
    ),
    "nearswap": MergeMethod(
        "spherical:nearswap",
        "NearSwap",
        "needed",
        (1, 1),
        "chunks",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    ),
    "model_stock": MergeMethod("norms:model_stock", "Model stock", "needed", (2, None), "norms", "2403.19522"),
    "arcee_fusion": MergeMethod("norms:arcee_fusion", "Arcee Fusion", "needed", (1, 1), "whole"),
    "magnitude": MergeMethod("sparse:magnitude", "Magnitude pruning", "needed", (1, None), "thresholds", "2306.01708"),
    "ties": MergeMethod("sparse:ties", "TIES", "needed", (1, None), "thresholds", "2306.01708"),
    "dare_linear": MergeMethod(
        "sparse:dare_linear", "DARE task arithmetic", "needed", (1, None), "chunks", "2311.03099"
    ),
    "dare_ties": MergeMethod("sparse:dare_ties", "DARE-TIES", "needed", (1, None), "thresholds", "2311.03099"),
    "della_linear": MergeMethod(
        "sparse:della_linear", "DELLA, no election", "needed", (1, None), "thresholds", "2406.11617"
    ),
    "della": MergeMethod("sparse:della", "DELLA", "needed", (1, None), "thresholds", "2406.11617"),
    "breadcrumbs": MergeMethod("sparse:breadcrumbs", "Breadcrumbs", "needed", (1, None), "thresholds", "2312.06795"),
    "breadcrumbs_ties": MergeMethod(
        "sparse:breadcrumbs_ties", "Breadcrumbs with TIES", "needed", (1, None), "thresholds", "2312.06795"
    ),
    "sce": MergeMethod("sparse:sce", "SCE", "needed", (1, None), "thresholds", "2408.07990"),
    "tsv_m": MergeMethod("spectral:tsv_m", "TSV-Merge", "needed", (1, None), "whole", "2412.00081"),
    "iso_c": MergeMethod("spectral:iso_c", "Iso-C", "needed", (1, None), "whole", "2502.04959"),
    "iso_cts": MergeMethod("spectral:iso_cts", "Iso-CTS", "needed", (1, None), "whole", "2502.04959"),
    "wudi": MergeMethod("spectral:wudi", "WUDI", "needed", (1, None), "whole", "2503.08099"),
    "emr": MergeMethod("emr:emr", "EMR", "needed", (1, None), "norms", "2405.17461"),
    "recombination": MergeMethod(
        "recombination:recombination", "Model recombination", "", (2, None), "chunks", "2406.03280"
    ),
}


def methods_table() -> str:
    """All methods with their parameters as a table in Markdown, as the README has it."""
    rows = ["| method | | base | parameters and their defaults |", "|---|---|---|---|"]
    for name, row in MERGE_METHODS.items():
        title = f"[{row.title}]({row.url})" if row.url else row.title
        known = [f"`{p.name}`" if p.required else f"`{p.name}` {p.default}".lower() for p in row.parameters.values()]
        rows.append(f"| `{name}` | {title} | {row.base} | {', '.join(known)} |")
    return "\n".join(rows)
