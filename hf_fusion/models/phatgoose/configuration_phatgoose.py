"""Configuration of PHATGOOSE: post-hoc adaptive routing among LoRA experts (Muqeeth et al., 2024, arXiv 2402.05859)."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

HEADS = (
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "features",
)
ROUTINGS = ("phatgoose", "arrow", "uniform")


class PhatgooseConfig(PreTrainedConfig):
    """What a published router is made of; everything but the weights.

    Args:
        head: what kind of model the base is, one of `HEADS`.
        backbone: the config of the base, as a plain dict.
        base: id and revision of the base, where they are known.
        base_by_reference: the repo holds experts and gates only; the base is fetched at its pinned revision.
        experts: one dict per expert: name, revision, license, task, gates ("trained", "average" or "arrow", or
            "whitened" and one of these), labels (class names of its own head, if it has one) and profile (index
            into `profiles`).
        profiles: what an expert adapts, each distinct profile once: "ranks" (module path -> LoRA rank) and "saved"
            (module path of a head -> its number of outputs).
        replaced: parameters of the base that an expert's saved ones stand in for.
        num_experts_per_tok: top-k, the experts that each token meets at each linear.
        router_temperature: divides the scores before the softmax; the paper has 1.
        routing: "phatgoose" scores by standardised gates and inputs, "arrow" by |x·v|, "uniform" draws experts at
            random; the latter two are baselines.
        recipe: what `hf_fusion.fuse` made it of, as ``fusion.yaml`` has it, without the paths of folders; None: see
            `recipe_phatgoose.recipe_of`.
    """

    model_type = "phatgoose"

    head: str = "causal-lm"
    # None stands for an empty container: a config's defaults may not be mutable.
    backbone: dict[str, Any] = None  # type: ignore[assignment]
    base: dict[str, Any] = None  # type: ignore[assignment]
    base_by_reference: bool = False
    experts: list[dict[str, Any]] = None  # type: ignore[assignment]
    profiles: list[dict[str, Any]] = None  # type: ignore[assignment]
    replaced: list[str] = None  # type: ignore[assignment]
    num_experts_per_tok: int = 2  # not top_k and temperature: generate() takes those for its own
    router_temperature: float = 1.0
    routing: str = "phatgoose"
    is_encoder_decoder: bool = False
    recipe: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone = self.backbone or {}
        self.base = self.base or {}
        self.experts = self.experts or []
        self.profiles = self.profiles or []
        self.replaced = self.replaced or []
        super().__post_init__(**kwargs)
        for name, value, allowed in (("head", self.head, HEADS), ("routing", self.routing, ROUTINGS)):
            if value not in allowed:
                raise ValueError(f"PhatgooseConfig.{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.num_experts_per_tok < 1:
            raise ValueError(f"top_k is {self.num_experts_per_tok}; each token needs at least one expert")
        if not self.router_temperature > 0:
            raise ValueError(f"the router's temperature is {self.router_temperature}; it must be above 0")

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return len(self.experts)

    def profile(self, expert: int) -> dict[str, Any]:
        """What an expert adapts: "ranks" and "saved", see `profiles`."""
        return self.profiles[self.experts[expert]["profile"]]

    def backbone_config(self) -> PreTrainedConfig:
        """The base's config, rebuilt from the plain dict that is stored."""
        return AutoConfig.for_model(**self.backbone)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base's text config for language models, which `generate()` asks for; else this config."""
        if self.head in ("causal-lm", "seq2seq-lm") and self.backbone:
            return self.backbone_config().get_text_config(decoder=decoder, encoder=encoder)
        return self


__all__ = ["PhatgooseConfig"]
