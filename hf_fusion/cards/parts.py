"""What the cards of all families share: the type of their contents, usage blocks, and results on suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fusion.cards.card import CardFacts


@dataclass(frozen=True)
class CardScore:
    """One score of the model itself, as the Hub indexes it."""

    dataset: str
    kind: str  # of the data set: its id, or its name again
    split: str
    n: int
    metric: str
    system: str
    score: float


@dataclass(frozen=True)
class CardContents:
    """What the card of one family's models says, beside its template, ``model_cards/NAME.md.j2``.

    Attributes:
        options: (config, folder) → the settings that the template shows.
        lacking: results → names of the fields without which they cannot be shown.
        measured: results → the model's own scores.
        view: facts → further variables of the template.
    """

    options: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    lacking: Callable[[Mapping[str, Any]], list[str]]
    measured: Callable[[Mapping[str, Any]], list[CardScore]]
    view: Callable[[CardFacts], dict[str, Any]] = lambda facts: {}


# ---------------------------------------------------------------- results on suites of tasks


def suite_lacking(results: Mapping[str, Any]) -> list[str]:
    """The fields without which a suite's results cannot be shown."""
    lacking = [key for key in ("tasks", "systems") if results.get(key) is None]
    lacking += lacking_each(results, "tasks", ("name", "metric", "n", "owner"))
    return lacking + lacking_each(results, "systems", ("name", "kind", "scores", "means"))


# a task's metric in results → its name on the Hub
_METRICS = {"exact": "exact_match", "tokens": "token_accuracy", "accuracy": "accuracy"}


def suite_measured(results: Mapping[str, Any]) -> list[CardScore]:
    """The model's own scores among a suite's, task by task."""
    found = []
    for system in (system for system in results["systems"] if system["kind"] in ("router", "merged")):
        for task in (task for task in results["tasks"] if task["name"] in system["scores"]):
            name, metric = str(task["name"]), _METRICS[task["metric"]]
            score = system["scores"][name]["score"]
            found.append(CardScore(name, name, "test", task["n"], metric, str(system["name"]), score))
    return found


def suite_view(facts: CardFacts) -> dict[str, Any]:
    """Groups of tasks, the systems that are compared by task, and whether experts have labels."""
    results = facts.results or {"tasks": [], "systems": []}
    groups: dict[str, list[Any]] = {"held-in": [], "held-out": []}
    for task in results["tasks"]:
        groups["held-out" if task["owner"] is None else "held-in"].append(task)
    return {
        "groups": [
            {"name": name, "tasks": tasks, "n": sum(task["n"] for task in tasks)}
            for name, tasks in groups.items()
            if tasks
        ],
        "compared": [system for system in results["systems"] if system["kind"] in ("base", "router", "baseline")],
        "labelled": any(expert.labels for expert in facts.experts),
    }


def lacking_each(results: Mapping[str, Any], key: str, names: tuple[str, ...]) -> list[str]:
    """The names that some entry of a list lacks."""
    return [f"{key}[].{name}" for name in names if any(name not in entry for entry in results.get(key) or ())]
