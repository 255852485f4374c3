"""Configuration of WEMoE: a weight-ensembling mixture of experts (Tang et al., 2024, arXiv 2402.00433)."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

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


class WEMoEConfig(PreTrainedConfig):
    """What a published model is made of; everything but the weights.

    Args:
        head: what kind of model this is, one of `HEADS`.
        backbone: the config of the dense model, as a plain dict.
        base: id and revision of the base, where they are known.
        experts: one dict per expert: name, revision, license, task and labels (class names of its own head).
        units: what shares a router, in order: "name", "paths" (module paths of its linears, the first one reads what
            the router reads) and "sizes" (what `UpscaledLinear` has to know of each linear's task vectors).
        task_heads: module paths that every expert has its own copy of.
        default_task: the expert whose head answers where no ``task=`` is given.
        task_vectors: how they are stored, one of `TASK_VECTORS`: in the model's dtype, in bfloat16 beside a base of the
            model's dtype, pruned by magnitude to `density`, or as products of low rank, their factors in the model's
            dtype or in bfloat16.
        density: share of the entries that "sparse" keeps.
        routing: "wemoe" has routers, one coefficient per sample; "smile" has none and chooses among low-rank experts
            token by token.
        router_layers: 0 (a vector), 1 or 2 linear layers.
        shared_router: one router for all units (E-WEMoE), rather than one each.
        batch_reduce: one merge for a whole batch: an output then depends on its neighbours.
        scaling: λ, by which the rest was merged, and every router's first coefficient.
        merge: the rule by which the rest was merged.
        num_experts_per_tok: top-k of SMILE.
        gate_rank: leading singular vectors that SMILE's gates read.
        adaptation: how routers were adapted: "loss" ("entropy" of unlabelled rows, or "labels"), "diversity" (weight
            of the term that spreads the answers), "steps", "rows" (task -> number of rows), "stopped" (why before the
            last step, or None), "learning_rate" and "batch_size" (rows of each task and step). None: not adapted; every
            router still gives λ, so the model answers as task arithmetic does.
        samples: a number from every tensor as it was saved, see `samples_of`.
        recipe: what `hf_fusion.fuse` made it of, as ``fusion.yaml`` has it, without the paths of folders; None: see
            `recipe_wemoe.recipe_of`.
    """

    model_type = "wemoe"

    head: str = "features"
    # None stands for an empty container: a config's defaults may not be mutable.
    backbone: dict[str, Any] = None  # type: ignore[assignment]
    base: dict[str, Any] = None  # type: ignore[assignment]
    experts: list[dict[str, Any]] = None  # type: ignore[assignment]
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
    merge: str = "task_arithmetic"
    num_experts_per_tok: int = 1
    gate_rank: int = 16
    adaptation: dict[str, Any] | None = None
    is_encoder_decoder: bool = False
    recipe: dict[str, Any] | None = None
    samples: list[float | None] = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone = self.backbone or {}
        self.base = self.base or {}
        self.experts = self.experts or []
        self.units = self.units or []
        self.task_heads = self.task_heads or []
        self.samples = self.samples or []
        super().__post_init__(**kwargs)
        for name, value, allowed in (
            ("head", self.head, HEADS),
            ("task_vectors", self.task_vectors, TASK_VECTORS),
            ("routing", self.routing, ROUTINGS),
            ("router_layers", self.router_layers, (0, 1, 2)),
        ):
            if value not in allowed or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be above 0 and at most 1")
        if self.routing == "smile" and self.task_vectors not in LOW_RANK:
            raise ValueError("routing='smile' reads singular vectors: it needs task_vectors='low-rank'")

    @property
    def num_experts(self) -> int:
        """K, the number of experts."""
        return len(self.experts)

    def backbone_config(self) -> PreTrainedConfig:
        """The dense model's config, rebuilt from the plain dict that is stored."""
        return AutoConfig.for_model(**self.backbone)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The dense model's text config for language models, which `generate()` asks for; else this config."""
        if self.head in ("causal-lm", "seq2seq-lm") and self.backbone:
            return self.backbone_config().get_text_config(decoder=decoder, encoder=encoder)
        return self


__all__ = ["WEMoEConfig"]
