"""Configuration of a Fusion of Experts (Wang et al., 2023, arXiv 2310.01542)."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .own_code_foe import without_code

MODES = ("output", "selection")
HEADS = ("sequence-classification", "image-classification", "causal-lm", "seq2seq-lm")


class FoEConfig(PreTrainedConfig):
    """What a published FoE is made of; everything but the weights.

    Args:
        mode: "output" fuses the experts' outputs over one label space; "selection" picks one expert per example
            from the experts' embeddings.
        head: what the experts are, one of `HEADS`.
        experts: one dict per expert: name, revision, license, task, labels (its own class names), label_map (fused
            class index of each of its classes, -1 for none), backbone (index into `backbones`), feature_size
            (width of its embedding; None in "output") and cost (any positive unit; parameters by default). Language
            models have generation too: the expert's generation config, which may be edited here.
        backbones: one dict per transformer: config (of the inner model), inputs (index of the processor that feeds
            it), ranks (module path -> LoRA rank of each of its experts) and saved (module path -> head width of
            each of its experts). Full models have neither ranks nor saved.
        fuser_hidden: widths of the fuser's hidden layers.
        fuser_dropout: dropout after each hidden layer.
        features_from: in selection, the index of the one expert whose embedding feeds the fuser; None for all.
        frugal: None, or what the frugal variant needs: neighbors (kappa), cost_weight (lambda), rows (validation
            points kept) and subsets (sets of experts whose loss is kept).
        budget: default budget of a forward, a share of the cost of all experts in (0, 1]; None queries all.
        vocabularies: in selection among language models, the vocabulary size of each processor.
        rule: of an ensemble, "mean" or "max_model", instead of a fuser that is learned; None for a FoE.
        over: what the rule is applied to, "logits" or "probabilities".
        weights: of the rule "mean", one for each expert; None: alike.
        fitted: whether the fuser was trained; an ensemble's rule needs no training.
        recipe: what `hf_fusion.fuse` made it of, as ``fusion.yaml`` has it, without the paths of folders; None: see
            `recipe_foe.recipe_of`.
    """

    model_type = "foe"

    mode: str = "output"
    head: str = "sequence-classification"
    # None stands for an empty list: a config's defaults may not be mutable.
    experts: list[dict[str, Any]] = None  # type: ignore[assignment]
    backbones: list[dict[str, Any]] = None  # type: ignore[assignment]
    fuser_hidden: list[int] = None  # type: ignore[assignment]
    fuser_dropout: float = 0.0
    features_from: int | None = None
    frugal: dict[str, Any] | None = None
    budget: float | None = None
    vocabularies: list[int] | None = None
    rule: str | None = None
    over: str = "logits"
    weights: list[float] | None = None
    is_encoder_decoder: bool = False
    fitted: bool = False
    recipe: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.experts = self.experts or []
        self.backbones = self.backbones or []
        self.fuser_hidden = [512, 512] if self.fuser_hidden is None else list(self.fuser_hidden)
        super().__post_init__(**kwargs)
        for name, value, allowed in (("mode", self.mode, MODES), ("head", self.head, HEADS)):
            if value not in allowed:
                raise ValueError(f"FoEConfig.{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"FoEConfig.budget is {self.budget}; it is a share of the experts' cost in (0, 1]")

    @property
    def num_experts(self) -> int:
        """K, the number of experts."""
        return len(self.experts)

    @property
    def num_outputs(self) -> int:
        """C, the width of an expert's output in the fused label space."""
        return len(self.id2label or {})

    @property
    def cost_shares(self) -> list[float]:
        """Each expert's share of the cost of querying all of them; sums to 1."""
        costs = [expert["cost"] for expert in self.experts]
        return [cost / sum(costs) for cost in costs]

    def backbone_config(self, index: int) -> PreTrainedConfig:
        """The inner model's config, rebuilt from the plain dict that is stored."""
        return AutoConfig.for_model(**without_code(self.backbones[index]["config"]))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The first language model's, with the fused vocabulary: `generate()` reads it; else this config."""
        if self.head in ("causal-lm", "seq2seq-lm") and self.backbones:
            config = self.backbone_config(0).get_text_config(decoder=decoder, encoder=encoder)
            config.vocab_size = sum(self.vocabularies or [config.vocab_size])
            return config
        return self


__all__ = ["FoEConfig"]
