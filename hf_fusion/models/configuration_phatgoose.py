"""Configuration of PHATGOOSE: post-hoc adaptive routing among LoRA experts (Muqeeth et al., 2024, arXiv 2402.05859)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .fused_checks import FLAG, NAME, Row, Table, each, number, one_of, optional, row, values, whole
from .fused_config import BACKBONE, EXPERT, BackboneConfig

HEADS = (
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "features",
)
ROUTINGS = ("phatgoose", "arrow", "uniform")
MEMBER: Table = {**EXPERT, "gates": NAME, "profile": whole()}
FIELDS: Table = {
    **BACKBONE,
    "head": one_of(*HEADS),
    "base_by_reference": optional(FLAG),
    "experts": each(row(MEMBER), least=1),
    "profiles": each(row({"ranks": values(whole(1)), "saved": values(whole(1))}), least=1),
    "replaced": optional(each(NAME)),
    "num_experts_per_tok": whole(1),
    "router_temperature": number(above=0),
    "routing": one_of(*ROUTINGS),
    "gate_points": optional(each(NAME)),
    "gate_rank": optional(whole()),
    "gate_decay": optional(number(least=0, most=1)),
}


class PhatgooseConfig(BackboneConfig):
    """Configuration of a PHATGOOSE router.

    Attributes:
        head: kind of the base's head, one of `HEADS`.
        backbone: the config of the base, as a plain dict.
        base: id and revision of the base, if known.
        base_by_reference: the repo holds experts and gates only; the base is fetched at its pinned revision.
        experts: one dict per expert: name, revision, license, task, gates ("gaussian", "trained", "average" or
            "arrow", or "whitened" and one of the last three), labels (class names of its own
            head, if it has one) and profile (index into `profiles`).
        profiles: what an expert adapts, each distinct profile once: "ranks" (module path -> LoRA rank) and "saved"
            (module path of a head -> its number of outputs).
        replaced: parameters of the base that an expert's saved ones stand in for.
        num_experts_per_tok: top-k, the number of experts per token at each linear.
        router_temperature: divides the scores before the softmax; the paper has 1.
        gate_points: paths of the linears at whose inputs Gaussian gates choose experts for all linears; empty if every
            linear has gates.
        gate_rank: directions of each Gaussian gate, at most.
        gate_decay: share of a token's evidence that the next token keeps, for Gaussian gates of language models; 0 if
            each token decides alone.
        routing: "phatgoose" scores by standardised gates and inputs, "arrow" by |x·v|, "uniform" draws experts at
            random; the latter two are baselines.
        recipe: the content of the ``fusion.yaml`` that this model was fused by, see `FusedConfig`.
        format_version: of this config, see `FusedConfig`.
    """

    model_type = "phatgoose"
    FIELDS = FIELDS
    CHECKED = ("head", "routing", "num_experts_per_tok", "router_temperature")

    head: str = "causal-lm"
    base_by_reference: bool = False
    # None stands for an empty container: a config's defaults may not be mutable.
    profiles: list[dict[str, Any]] = None  # type: ignore[assignment]
    replaced: list[str] = None  # type: ignore[assignment]
    num_experts_per_tok: int = 2  # not top_k and temperature: generate() would read those as sampling options
    router_temperature: float = 1.0
    routing: str = "phatgoose"
    gate_points: list[str] = None  # type: ignore[assignment]
    gate_rank: int = 0
    gate_decay: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.profiles = self.profiles or []
        self.replaced = self.replaced or []
        self.gate_points = self.gate_points or []
        super().__post_init__(**kwargs)

    def _relations(self) -> Iterator[Row]:
        """Constraints between fields, see `fused_checks.Row`."""
        yield from super()._relations()
        for index, expert in enumerate(self.experts):
            where, profile = f"experts[{index}].profile", expert["profile"]
            yield where, profile, profile < len(self.profiles), "one of the profiles"
        used = {expert["profile"] for expert in self.experts}
        yield "profiles", self.profiles, used == set(range(len(self.profiles))), "those of the experts"
        if self.base_by_reference:
            for name in ("id", "revision"):
                yield f"base.{name}", self.base.get(name), bool(self.base.get(name)), "where the base is fetched from"

    def profile(self, expert: int) -> dict[str, Any]:
        """What an expert adapts.

        Args:
            expert: its index in `experts`.

        Returns:
            Its profile, with "ranks" and "saved", see `profiles`.
        """
        return self.profiles[self.experts[expert]["profile"]]

    def _recipe_parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "top_k": self.num_experts_per_tok,
            "temperature": self.router_temperature,
            "routing": self.routing,
            "base_by_reference": self.base_by_reference,
        }
        arrow = [expert["name"] for expert in self.experts if expert.get("gates") == "arrow"]
        if arrow and self.routing != "arrow":
            parameters["missing_gates"] = dict.fromkeys(arrow, "arrow")
        return parameters


__all__ = ["HEADS", "PhatgooseConfig"]
