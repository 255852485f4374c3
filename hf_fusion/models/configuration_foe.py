"""Configuration of a Fusion of Experts (Wang et al., 2023, arXiv 2310.01542)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .fused_checks import (
    FLAG,
    MAPPING,
    MODEL,
    NAME,
    Row,
    Table,
    each,
    inner_config,
    number,
    one_of,
    optional,
    row,
    values,
    whole,
)
from .fused_config import EXPERT, GENERATING, FusedConfig
from .fused_custom_code import without_code
from .fuser_foe import FUSERS

MODES = ("output", "selection")
HEADS = ("sequence-classification", "image-classification", "causal-lm", "seq2seq-lm")
MEMBER: Table = {
    **EXPERT,
    "label_map": optional(each(whole(-1))),
    "backbone": whole(),
    "feature_size": optional(whole(1)),
    "cost": number(above=0),
    "generation": optional(MAPPING),
}
BACKBONE: Table = {
    "config": MODEL,
    "head": one_of(*HEADS),
    "inputs": whole(),
    "ranks": values(each(whole())),
    "saved": each(NAME),
    "num_labels": each(whole(1), least=1),
}
FRUGAL: Table = {"neighbors": whole(1), "cost_weight": number(least=0), "rows": whole(1), "subsets": whole(1)}
FIELDS: Table = {
    "mode": one_of(*MODES),
    "head": one_of(*HEADS),
    "experts": each(row(MEMBER), least=1),
    "backbones": each(row(BACKBONE), least=1),
    "fuser": optional(one_of(*FUSERS)),
    "fuser_hidden": each(whole(1)),
    "fuser_dropout": number(least=0, most=1),
    "features_from": optional(whole()),
    "feature_depths": optional(each(number(least=0, most=1), least=1)),
    "frugal": optional(row(FRUGAL)),
    "budget": optional(number(above=0, most=1)),
    "vocabularies": optional(each(whole(1), least=1)),
    "rule": optional(NAME),
    "over": optional(NAME),
    "weights": optional(each(number(least=0))),
    "fitted": optional(FLAG),
}


class FoEConfig(FusedConfig):
    """Configuration of a Fusion of Experts.

    Attributes:
        mode: "output" fuses the experts' outputs over one label space; "selection" picks one expert per example
            from the experts' embeddings.
        head: kind of the experts' head, one of `HEADS`.
        experts: one dict per expert: name, revision, license, task, labels (its own class names), label_map (fused
            class index of each of its classes, -1 for none), backbone (index into `backbones`), feature_size
            (width of its embedding; None if the fuser reads none) and cost (any positive unit; parameters by default).
            Language models have generation too: the expert's generation config, which may be edited here.
        backbones: one dict per transformer: config (of the inner model), inputs (index of the processor that feeds
            it), ranks (module path -> LoRA rank of each of its experts) and saved (module path -> head width of
            each of its experts). Full models have neither ranks nor saved.
        fuser: kind of the fuser, one of `FUSERS`; "mlp" is the paper's.
        fuser_hidden: widths of the hidden layers of the fuser "mlp".
        fuser_dropout: dropout after each of them.
        features_from: in selection, the index of the one expert whose embedding feeds the fuser; None for all.
        feature_depths: where an embedding is taken from, as shares of the layers: [0.5, 1.0] puts the states of the
            middle layer and of the last one side by side. None is the last.
        frugal: None, or what the frugal variant needs: neighbors (kappa), cost_weight (lambda), rows (validation
            points kept) and subsets (sets of experts whose loss is kept).
        budget: default budget of a forward, a share of the cost of all experts in (0, 1]; None queries all.
        vocabularies: in selection among language models, the vocabulary size of each processor.
        rule: an ensemble's rule, "mean" or "max_model", in place of a trained fuser; None for a FoE.
        over: input of the rule, "logits" or "probabilities".
        weights: weight of each expert under the rule "mean"; None for equal weights.
        fitted: whether the fuser was trained; an ensemble's rule needs no training.
        recipe: the content of the ``fusion.yaml`` that this model was fused by, see `FusedConfig`.
        format_version: of this config, see `FusedConfig`.
    """

    model_type = "foe"
    FIELDS = FIELDS
    CHECKED = ("mode", "head", "budget")

    mode: str = "output"
    head: str = "sequence-classification"
    # None stands for an empty list: a config's defaults may not be mutable.
    backbones: list[dict[str, Any]] = None  # type: ignore[assignment]
    fuser: str = "mlp"
    fuser_hidden: list[int] = None  # type: ignore[assignment]
    fuser_dropout: float = 0.0
    features_from: int | None = None
    feature_depths: list[float] | None = None
    frugal: dict[str, Any] | None = None
    budget: float | None = None
    vocabularies: list[int] | None = None
    rule: str | None = None
    over: str = "logits"
    weights: list[float] | None = None
    fitted: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbones = self.backbones or []
        self.fuser_hidden = [512, 512] if self.fuser_hidden is None else list(self.fuser_hidden)
        super().__post_init__(**kwargs)

    def _relations(self) -> Iterator[Row]:
        """Constraints between fields, see `fused_checks.Row`."""
        generates = self.head in GENERATING
        groups = 1 + max(plan["inputs"] for plan in self.backbones)
        members = [[e for e in self.experts if e["backbone"] == index] for index in range(len(self.backbones))]
        for index, expert in enumerate(self.experts):
            where, labels, label_map = f"experts[{index}]", expert["labels"], expert.get("label_map")
            yield f"{where}.backbone", expert["backbone"], expert["backbone"] < len(members), "one of the backbones"
            if self.mode == "selection":
                yield f"{where}.feature_size", expert.get("feature_size"), bool(expert.get("feature_size")), "a width"
            if not generates:
                is_whole = len(label_map or []) == max(1, len(labels))
                yield f"{where}.label_map", label_map, is_whole, "a fused class for each label"
                fused = max(label_map or [-1])
                yield f"{where}.label_map", label_map, fused < self.num_outputs, f"numbers below {self.num_outputs}"
        for index, plan in enumerate(self.backbones):
            where, count = f"backbones[{index}]", len(members[index])
            counts = [max(1, len(expert["labels"])) for expert in members[index]]
            yield f"{where}.num_labels", plan["num_labels"], plan["num_labels"] == counts, f"{counts}, as the experts"
            is_kind = (plan["head"] == self.head) if generates else plan["head"] not in GENERATING
            yield f"{where}.head", plan["head"], is_kind, f"what goes with {self.head}"
            for path, ranks in plan["ranks"].items():
                yield f"{where}.ranks.{path}", ranks, len(ranks) == count and any(ranks), f"{count} ranks"
        chosen = self.features_from
        if chosen is not None:
            is_one = self.mode == "selection" and chosen < self.num_experts
            yield "features_from", chosen, is_one, "the index of an expert, in mode 'selection'"
        if generates:
            sizes = self.vocabularies
            yield "vocabularies", sizes, sizes is not None and len(sizes) == groups, f"the sizes of {groups}"
            yield "mode", self.mode, self.mode == "selection" and not self.rule, "selection, without a rule"
        elif self.vocabularies:
            yield "head", self.head, False, "causal-lm or seq2seq-lm: there are vocabularies"

    @property
    def num_outputs(self) -> int:
        """C, the width of an expert's output in the fused label space."""
        return len(self.id2label or {})

    @property
    def cost_shares(self) -> list[float]:
        """Each expert's share of the cost of querying all of them; sums to 1."""
        costs = [expert["cost"] for expert in self.experts]
        return [cost / sum(costs) for cost in costs]

    @property
    def reads_embeddings(self) -> bool:
        """Whether the fuser reads hidden states of the experts."""
        return any(expert.get("feature_size") for expert in self.experts)

    def backbone_config(self, index: int) -> PreTrainedConfig:
        """The config of a backbone's model, rebuilt from the stored dict.

        Args:
            index: of the backbone in `backbones`.

        Returns:
            The config, of the inner model's own class.

        Raises:
            ValueError: the stored dict is not a valid config; the message names the field.
        """
        return inner_config(
            AutoConfig.for_model, without_code(self.backbones[index]["config"]), f"backbones[{index}].config"
        )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config that `generate()` reads.

        Args:
            decoder: as in transformers.
            encoder: as in transformers.

        Returns:
            For language models, the first backbone's text config with the size of the fused vocabulary; otherwise this
            config.
        """
        if self.head in GENERATING and self.backbones:
            config = self.backbone_config(0).get_text_config(decoder=decoder, encoder=encoder)
            config.vocab_size = sum(self.vocabularies or [config.vocab_size])
            return config
        return self

    def _recipe_method(self) -> str:
        return "ensemble" if self.rule is not None else "foe"

    def _recipe_experts(self) -> list[Any]:
        names = super()._recipe_experts()
        if self.rule is None or not self.weights:
            return names
        return [{"model": name, "weight": weight} for name, weight in zip(names, self.weights, strict=True)]

    def _recipe_parameters(self) -> dict[str, Any]:
        learned = ("mode", "features_from", "fuser_hidden", "fuser_dropout")
        names = learned if self.rule is None else ("rule", "over")
        parameters = {name: getattr(self, name) for name in names}
        if self.problem_type != "single_label_classification" or self.mode != "output":
            return parameters
        labels = list((self.id2label or {}).values())
        fused = {-1: None, **dict(enumerate(labels))}
        maps = {
            expert["name"]: {
                label: fused[index] for label, index in zip(expert["labels"], expert["label_map"], strict=True)
            }
            for expert in self.experts
        }
        return {**parameters, "labels": labels, "label_maps": maps}


__all__ = ["HEADS", "FoEConfig"]
