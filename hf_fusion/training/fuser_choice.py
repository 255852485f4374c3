"""Chooses a fuser for a Fusion of Experts by cross-validation on the rows that fit it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_fusion.models.fuser_foe import GATED, build_fuser
from hf_fusion.models.gated_foe import GatedFuser
from hf_fusion.progress import track
from hf_fusion.training.gated_fit import Design, fit_gated
from hf_fusion.training.outputs import DEPTHS

if TYPE_CHECKING:
    from hf_fusion.models.configuration_foe import FoEConfig
    from hf_fusion.training.outputs import ExpertOutputs

logger = logging.getLogger(__name__)

FOLDS = 3
READ = DEPTHS[:2]  # depths of the embeddings that fusers other than "mlp" read
MOST_QUERIED = 3  # experts in the sets that a row is repeated for: frugal querying stops early
PENALTIES = (1e-5, 1e-4)  # on squared weights, candidates


@dataclass(frozen=True)
class Candidate:
    """One fuser that can be chosen.

    Attributes:
        kind: one of `hf_fusion.models.fuser_foe.FUSERS`.
        penalty: on the squared weights of gates, and of evidence for labels; None for the kinds that are trained by
            AdamW.
    """

    kind: str
    penalty: float | None = None

    def __str__(self) -> str:
        return self.kind if self.penalty is None else f"{self.kind}, penalty {self.penalty:g}"


@dataclass
class Scored:
    """A candidate with its scores in cross-validation.

    Attributes:
        name: of the candidate.
        loss: mean cross-entropy over all rows, each scored by a fuser that was fitted without it.
        accuracy: the share of rows that were predicted right.
    """

    name: str
    loss: float
    accuracy: float


def candidates(kinds: Sequence[str]) -> list[Candidate]:
    """Fusers to choose among, the simplest first.

    Args:
        kinds: names of fusers.
    """
    found = []
    for kind in kinds:
        found += (
            [Candidate(kind, each) for each in sorted(PENALTIES, reverse=True)] if kind in GATED else [Candidate(kind)]
        )
    return found


def configure(config: FoEConfig, kind: str, collected: ExpertOutputs) -> None:
    """Sets a config's fields for a kind of fuser."""
    reads = kind not in ("mlp", "stacking") or config.mode == "selection"
    depths = [1.0] if kind == "mlp" else list(READ)
    config.fuser = kind
    config.feature_depths = None if kind == "mlp" or not reads else depths
    for index, expert in enumerate(config.experts):
        sizes = [
            collected.embeddings[index, depth].shape[1] for depth in depths if (index, depth) in collected.embeddings
        ]
        expert["feature_size"] = (sum(sizes) or expert.get("feature_size")) if reads else None


def parts_of(config: FoEConfig, collected: ExpertOutputs) -> list[torch.Tensor]:
    """What a fuser other than "mlp" reads of each expert, for a config that says which fuser."""
    experts = range(config.num_experts) if config.features_from is None else [config.features_from]
    return collected.parts(config.feature_depths or [], experts)


class GatedFit:
    """Fits `GatedFuser`s of one kind on rows of one data set."""

    def __init__(self, config: FoEConfig, collected: ExpertOutputs, targets: torch.Tensor, seed: int) -> None:
        self.config, self.targets, self.seed = config, targets, seed
        self.parts = parts_of(config, collected)
        self.outputs = 0 if config.vocabularies else config.num_outputs

    def design(self, rows: torch.Tensor | None = None, subsets: int = 0) -> Design:
        """Features of all rows, or of some; `subsets` repeats them with experts left out at random."""
        parts = self.parts if rows is None else [part[rows] for part in self.parts]
        if not subsets:
            return Design(parts, self.outputs)
        count, experts = len(parts[0]), len(parts)
        generator = torch.Generator().manual_seed(self.seed)
        size = torch.randint(1, min(MOST_QUERIED, experts) + 1, (subsets, count, 1), generator=generator)
        rank = torch.rand(subsets, count, experts, generator=generator).argsort(2).argsort(2)
        everyone = torch.ones(1, count, experts, dtype=torch.bool)
        return Design(parts, self.outputs, torch.cat([everyone, rank < size]))

    def fit(self, penalty: float, design: Design, rows: torch.Tensor | None = None) -> GatedFuser:
        """A fuser of the config's kind."""
        fuser = build_fuser(self.config)
        assert isinstance(fuser, GatedFuser)  # of a kind in `GATED`
        parts = self.parts if rows is None else [part[rows] for part in self.parts]
        targets = self.targets if rows is None else self.targets[rows]
        fit_gated(fuser, parts, targets, penalty=penalty, design=design)
        return fuser.eval()


def folds(count: int, seed: int) -> list[torch.Tensor]:
    """Row indices of each fold."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part for part in order.chunk(min(FOLDS, count)) if len(part)]


def cross_validate(
    tried: Sequence[Candidate],
    rows: int,
    targets: torch.Tensor,
    scores_of: Callable[[Candidate, torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int,
) -> tuple[Candidate, list[Scored]]:
    """The candidate that is chosen, and what each scored.

    It is the first whose loss is within one standard error of the lowest, the error being that of the difference by
    row: simpler fusers come first.

    Args:
        tried: candidates, the simplest first.
        rows: N.
        targets: (N,), class indices.
        scores_of: (candidate, rows to fit on, rows to score) -> scores of the latter (n, C).
        seed: of the division into folds.
    """
    losses, correct = (torch.zeros(len(tried), rows) for _ in range(2))
    parts = folds(rows, seed)
    steps: Iterator[tuple[int, torch.Tensor]] = iter(
        track([(index, part) for index in range(len(tried)) for part in parts], "Cross-validating fusers")
    )
    for index, held in steps:
        rest = torch.ones(rows, dtype=torch.bool)
        rest[held] = False
        scores = scores_of(tried[index], rest.nonzero()[:, 0], held)
        losses[index, held] = nn.functional.cross_entropy(scores, targets[held], reduction="none")
        correct[index, held] = (scores.argmax(1) == targets[held]).float()
    scored = [
        Scored(str(each), float(loss.mean()), float(right.mean()))
        for each, loss, right in zip(tried, losses, correct, strict=True)
    ]
    best = int(losses.mean(1).argmin())
    differences = losses - losses[best]
    within = differences.mean(1) <= differences.std(1) / rows**0.5
    chosen = int(within.nonzero()[0])
    for each in scored:
        logger.info("%s: loss %.4f, accuracy %.1f%%", each.name, each.loss, 100 * each.accuracy)
    return tried[chosen], scored
