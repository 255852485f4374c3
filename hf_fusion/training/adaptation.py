"""What training routers reports: `Adaptation`, and the `Diagnostics` of a task's predictions that it is judged by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from hf_fusion.models.fused_html import facts_table, first_of, table


@dataclass(frozen=True)
class Diagnostics:
    """Statistics of a task's predictions on its validation rows.

    Attributes:
        confidence: mean probability of the most likely class.
        entropy: mean entropy of the predictions, in nats.
        classes: effective number of predicted classes, exp(H(mean prediction)): the number of classes if they are
            predicted equally often, 1 if every row gets the same class.
        agreement: share of the rows on which the model predicts the same class as the task's expert.
    """

    confidence: float
    entropy: float
    classes: float
    agreement: float


def diagnose(logits: torch.Tensor, expert_logits: torch.Tensor) -> Diagnostics:
    """Compares a model's logits (N, C) with those of the task's expert (N, C)."""
    log = logits.float().log_softmax(-1)
    mean = log.exp().mean(0)
    return Diagnostics(
        float(log.exp().amax(-1).mean()),
        float(-(log.exp() * log).sum(-1).mean()),
        float(torch.special.entr(mean).sum().exp()),
        float((logits.argmax(-1) == expert_logits.argmax(-1)).float().mean()),
    )


@dataclass
class Adaptation:
    """The report of a run of `adapt_routers` or `fit_routers`.

    Attributes:
        loss: "expert", "entropy" or "labels".
        diversity: weight of the diversity term of "entropy"; 0 for other losses.
        learning_rate: peak learning rate.
        batch_size: rows per task, step and process.
        steps: the step whose routers were kept; at most the number of steps that ran.
        rows: task -> number of training rows.
        stopped: why training stopped early, or None.
        before: task -> diagnostics before training.
        after: task -> diagnostics with the routers that were kept.
        history: one entry per check: "step", and task -> diagnostics as a dict.
    """

    loss: str
    diversity: float
    learning_rate: float
    batch_size: int
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


__all__ = ["Adaptation", "Diagnostics", "diagnose"]
