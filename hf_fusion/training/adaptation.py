"""What training routers reports: `Adaptation`, and the `Diagnostics` of a task's predictions that it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from hf_fusion.models.fused_html import facts_table, first_of, table


@dataclass(frozen=True)
class Diagnostics:
    """A task's predictions on its validation rows, compared with those of the task's expert.

    Attributes:
        confidence: mean probability of the most likely class.
        entropy: mean entropy of the predictions, in nats.
        agreement: share of the rows on which model and expert predict the same class.
        kappa: agreement beyond chance, Cohen's κ: 1 for equal predictions, about 0 if they are unrelated or if every
            row gets the same class, however skewed the classes are. Equal to `agreement` if the expert itself predicts
            only one class.
        divergence: mean KL divergence of the model's predictions from the expert's, in nats.
    """

    confidence: float
    entropy: float
    agreement: float
    kappa: float
    divergence: float


def diagnose(logits: torch.Tensor, expert_logits: torch.Tensor) -> Diagnostics:
    """Compares a model's logits (N, C) with those of the task's expert (N, C)."""
    log, wanted = logits.float().log_softmax(-1), expert_logits.float().log_softmax(-1)
    classes, expected = log.argmax(-1), wanted.argmax(-1)
    agreement = float((classes == expected).float().mean())
    shares = [torch.bincount(found, minlength=log.shape[-1]) / len(found) for found in (classes, expected)]
    by_chance = float(shares[0] @ shares[1])
    is_constant = bool(shares[1].max() == 1)
    return Diagnostics(
        confidence=float(log.exp().amax(-1).mean()),
        entropy=float(-(log.exp() * log).sum(-1).mean()),
        agreement=agreement,
        kappa=agreement if is_constant else (agreement - by_chance) / (1 - by_chance),
        divergence=float((wanted.exp() * (wanted - log)).sum(-1).mean()),
    )


def mean_of(found: Mapping[str, Diagnostics], name: str) -> float:
    """The mean of one statistic over the tasks."""
    return float(sum(getattr(values, name) for values in found.values())) / max(1, len(found))


def likeness(found: Mapping[str, Diagnostics]) -> float:
    """How much a model predicts like the experts: κ minus divergence, on average over the tasks.

    Agreement is what is wanted, and varies much from rows to rows where they are few; divergence varies less.
    """
    return mean_of(found, "kappa") - mean_of(found, "divergence")


@dataclass
class Adaptation:
    """The report of a run of `adapt_routers` or `fit_routers`.

    Attributes:
        loss: "expert", "entropy" or "labels".
        diversity: weight of the diversity term of "entropy"; 0 for other losses.
        learning_rate: of the first step.
        batch_size: rows per task, step and process.
        merge: the merging method that was chosen to start from; None for the model's own.
        scaling: its λ.
        steps: the step whose routers were kept; at most the number of steps that ran.
        rows: task -> number of training rows.
        stopped: why training stopped early, or None.
        before: task -> diagnostics before training.
        after: task -> diagnostics with the routers that were kept.
        history: one entry per check: "step", "learning_rate", and task -> diagnostics as a dict.
    """

    loss: str
    diversity: float
    learning_rate: float
    batch_size: int
    merge: str | None = None
    scaling: float | None = None
    steps: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    before: dict[str, Diagnostics] = field(default_factory=dict)
    after: dict[str, Diagnostics] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """Tables: the settings, and each task's diagnostics before and after."""
        names = [item.name for item in fields(Diagnostics)]
        rows = [
            [task, *(f"{getattr(before, name):.2f} → {getattr(self.after[task], name):.2f}" for name in names)]
            for task, before in self.before.items()
            if task in self.after
        ]
        tasks = table(["task", *names], first_of(rows, "tasks"), "Before → after, on validation rows", right=True)
        return facts_table(self.for_config()) + (tasks if rows else "")

    def for_config(self) -> dict[str, Any]:
        """The fields that are stored in the model's config and shown on its card."""
        names = ("loss", "diversity", "learning_rate", "batch_size", "steps", "rows", "stopped")
        return {name: value for name, value in asdict(self).items() if name in names}


__all__ = ["Adaptation", "Diagnostics", "diagnose", "likeness", "mean_of"]
