"""What the cards of all families share: the type of their contents, and the tables of results on suites of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.evaluation.results import Results

if TYPE_CHECKING:
    from hf_fusion.cards.card import CardFacts


@dataclass(frozen=True)
class CardContents:
    """What the card of one family's models says, beside its template, ``model_cards/NAME.md.j2``.

    Attributes:
        options: (config, folder) → the settings that the template shows.
        view: facts → further variables of the template.
    """

    options: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    view: Callable[[CardFacts], dict[str, Any]] = lambda facts: {}


def suite_view(facts: CardFacts) -> dict[str, Any]:
    """Groups of tasks, the predictors that are compared by task, and whether experts have labels."""
    results = facts.measured or Results([], [])
    groups = results.groups().items()
    return {
        "groups": [{"name": name, "tasks": tasks, "n": sum(task.n for task in tasks)} for name, tasks in groups],
        "compared": [p for p in results.predictors if p.kind in ("base", "fused", "baseline")],
        "labelled": any(expert.labels for expert in facts.experts),
    }
