"""Configuration of WEMoE: a weight-ensembling mixture of experts (Tang et al., 2024, arXiv 2402.00433)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .fused_checks import FLAG, MAPPING, NAME, Row, Table, each, kind, number, one_of, optional, row, whole
from .fused_config import BACKBONE, EXPERT, BackboneConfig

HEADS = (
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "semantic-segmentation",
    "features",
)
LOW_RANK = ("low-rank", "low-rank-bfloat16")
TASK_VECTORS = ("exact", "bfloat16", "sparse", *LOW_RANK)
ROUTINGS = ("wemoe", "smile")
ARITHMETIC = "task_arithmetic"
UNIT: Table = {
    "name": NAME,
    "paths": each(NAME, least=1),
    "sizes": each(optional(kind(lambda value: not isinstance(value, (str, bool, dict)), "numbers")), least=1),
    "energy": optional(each(number())),
}
FIELDS: Table = {
    **BACKBONE,
    "head": one_of(*HEADS),
    "experts": each(row(EXPERT), least=1),
    "units": each(row(UNIT), least=1),
    "task_heads": each(NAME),
    "default_task": optional(NAME),
    "task_vectors": one_of(*TASK_VECTORS),
    "density": number(above=0, most=1),
    "routing": one_of(*ROUTINGS),
    "router_layers": one_of(0, 1, 2),
    "shared_router": FLAG,
    "batch_reduce": FLAG,
    "scaling": number(),
    "merge": NAME,
    "num_experts_per_tok": whole(1),
    "gate_rank": whole(1),
    "adaptation": optional(MAPPING),
    "samples": optional(each(optional(number(least=0)))),
}
# size of a linear's task vectors: see `UpscaledLinear`
SIZES = {
    "exact": (lambda size, experts: size is None, "null"),
    "low-rank": (
        lambda size, experts: (
            isinstance(size, list) and len(size) == experts and not list(each(whole()).find(size, ""))
        ),
        "a rank for each expert",
    ),
    "rows": (lambda size, experts: not list(whole(1).find(size, "")), "a whole number of at least 1"),
}


class WEMoEConfig(BackboneConfig):
    """Configuration of a WEMoE.

    Attributes:
        head: kind of the model's head, one of `HEADS`.
        backbone: the config of the dense model, as a plain dict.
        base: id and revision of the base, if known.
        experts: one dict per expert: name, revision, license, task and labels (class names of its own head).
        units: groups of linears with one router, in order: "name", "paths" (of its linears; the first one reads what
            the router reads) and "sizes" (the `size` of each `UpscaledLinear`).
        task_heads: module paths with one copy per expert.
        default_task: the expert whose head predicts without ``task=``.
        task_vectors: how they are stored, one of `TASK_VECTORS`: in the model's dtype, in bfloat16 beside a base of the
            model's dtype, pruned by magnitude to `density`, or as products of low rank, their factors in the model's
            dtype or in bfloat16.
        density: share of the entries that "sparse" keeps.
        routing: "wemoe" has routers, one coefficient per sample; "smile" has none and chooses among low-rank experts
            token by token.
        router_layers: 0 (a vector), 1 or 2 linear layers.
        shared_router: one router for all units (E-WEMoE), rather than one each.
        batch_reduce: one merge per batch; outputs then depend on the other samples of the batch.
        scaling: λ of `merge`.
        merge: the static merge that the model starts from. With task arithmetic, `scaling` is the initial value of all
            coefficients. With another method, the merged model takes the place of the base: task vectors are relative
            to it, and coefficients start from 0.
        num_experts_per_tok: top-k of SMILE.
        gate_rank: leading singular vectors that SMILE's gates read.
        adaptation: how routers were adapted: "loss" ("entropy" of unlabelled rows, or "labels"), "diversity" (weight
            of the entropy of the mean prediction), "steps", "rows" (task -> number of rows), "stopped" (why before the
            last step, or None), "learning_rate" and "batch_size" (rows of each task and step). None: not adapted; every
            router still returns λ, which is task arithmetic.
        samples: a fingerprint of the saved weights, see `fingerprint_of`.
        recipe: the content of the ``fusion.yaml`` that this model was fused by, see `FusedConfig`.
        format_version: of this config, see `FusedConfig`.
    """

    model_type = "wemoe"
    FIELDS = FIELDS
    CHECKED = ("head", "task_vectors", "routing", "router_layers", "density")

    # None stands for an empty container: a config's defaults may not be mutable.
    units: list[dict[str, Any]] = None  # type: ignore[assignment]
    task_heads: list[str] = None  # type: ignore[assignment]
    default_task: str | None = None
    task_vectors: str = "exact"
    density: float = 0.1
    routing: str = "wemoe"
    router_layers: int = 2
    shared_router: bool = False
    batch_reduce: bool = False
    scaling: float = 0.3
    merge: str = ARITHMETIC
    num_experts_per_tok: int = 1
    gate_rank: int = 16
    adaptation: dict[str, Any] | None = None
    samples: list[float | None] = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs: Any) -> None:
        self.units = self.units or []
        self.task_heads = self.task_heads or []
        self.samples = self.samples or []
        super().__post_init__(**kwargs)
        if self.routing == "smile" and self.task_vectors not in LOW_RANK:
            raise ValueError("routing='smile' reads singular vectors: it needs task_vectors='low-rank'")

    @property
    def start(self) -> float:
        """The coefficient of every expert at first: the model is then the static merge that it starts from."""
        return self.scaling if self.merge == ARITHMETIC else 0.0

    def _relations(self) -> Iterator[Row]:
        """Constraints between fields, see `fused_checks.Row`."""
        yield from super()._relations()
        names = [expert["name"] for expert in self.experts]
        for index, expert in enumerate(self.experts if self.task_heads else []):
            yield f"experts[{index}].labels", expert["labels"], bool(expert["labels"]), "the classes of its head"
        task = self.default_task
        yield "default_task", task, task in names if self.task_heads else task is None or task in names, "an expert"
        kind = "low-rank" if self.task_vectors in LOW_RANK else "exact" if self.task_vectors == "exact" else "rows"
        is_size, expected = SIZES[kind]
        taken: set[str] = set()
        for index, unit in enumerate(self.units):
            where, paths, sizes = f"units[{index}]", unit["paths"], unit["sizes"]
            yield f"{where}.paths", paths, len({*paths} - taken) == len(paths), "linears of no other unit"
            taken.update(paths)
            yield f"{where}.sizes", sizes, len(sizes) == len(paths), "one for each path"
            for number_, size in enumerate(sizes):
                yield f"{where}.sizes[{number_}]", size, is_size(size, len(names)), expected

    def _recipe_parameters(self) -> dict[str, Any]:
        names = ("scaling", "router_layers", "task_vectors", "density", "routing", "gate_rank", "shared_router")
        parameters = {name: getattr(self, name) for name in (*names, "batch_reduce", "merge", "default_task")}
        parameters["top_k"] = self.num_experts_per_tok
        if self.task_vectors in LOW_RANK:
            ranks = [rank for unit in self.units for size in unit["sizes"] for rank in size]
            parameters["rank"] = max(ranks, default=1)
        return parameters


__all__ = ["HEADS", "WEMoEConfig"]
