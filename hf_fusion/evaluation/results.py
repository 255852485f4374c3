"""What a comparison on a suite of tasks found: per task and system, with intervals, as data and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_fusion.evaluation.intervals import Score
from hf_fusion.io.files import read_given
from hf_fusion.io.saving import write_file

Metric = Literal["accuracy", "exact", "tokens"]
HELD_IN, HELD_OUT = "held-in", "held-out"


@dataclass
class SuiteTask:
    """One task of a suite.

    Attributes:
        name: what tables call it.
        metric: "accuracy" of classes, "exact" match of the greedy answer, or share of right next "tokens".
        n: rows.
        owner: the expert that was trained on it; None for a held-out task.
    """

    name: str
    metric: Metric
    n: int
    owner: str | None = None

    @property
    def group(self) -> str:
        """Whether an expert was trained on it."""
        return HELD_OUT if self.owner is None else HELD_IN


@dataclass
class SuiteSystem:
    """One system of a comparison.

    Attributes:
        name: what tables call it.
        kind: "base", "router", "merged", "expert", "baseline" or "oracle".
        scores: task → its score, for the tasks it was run on.
        means: "held-in" and "held-out" → mean of the scores of these tasks, each task counting alike; only where it was
            run on all of them.
        lead: the same groups → by how much the router's mean is above this one's, from the same rows.
    """

    name: str
    kind: str
    scores: dict[str, Score]
    means: dict[str, Score] = field(default_factory=dict)
    lead: dict[str, Score] = field(default_factory=dict)


@dataclass
class SuiteResults:
    """A comparison of systems on a suite of tasks.

    Intervals hold 95 %: Wilson's for a share, the normal one for a mean of shares (metric "tokens"). The interval of a
    mean over tasks adds the tasks' own, squared (`intervals.mean_of`); a lead is the mean difference on the same rows
    with the normal interval stratified by task (`scoring.lead_of`). Tasks are taken as given, rows as drawn from them.

    Attributes:
        tasks: the suite.
        systems: what was compared.
        settings: top_k, temperature, seed and what else decides the numbers.
        command: what to type to measure it again.
        machine: what it ran on.
    """

    tasks: list[SuiteTask]
    systems: list[SuiteSystem]
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    machine: str = ""

    def __getitem__(self, name: str) -> SuiteSystem:
        """The system of that name."""
        return next(system for system in self.systems if system.name == name)

    def save(self, path: str | Path) -> None:
        """Writes JSON, all of it or nothing."""
        write_file(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SuiteResults:
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(read_given(Path(path))))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SuiteResults:
        """From the content of such a file."""
        values = dict(given)
        tasks = [SuiteTask(**row) for row in values.pop("tasks")]
        systems = []
        for row in (dict(own) for own in values.pop("systems")):
            scores, means, lead = (_scores(row.pop(name)) for name in ("scores", "means", "lead"))
            systems.append(SuiteSystem(**row, scores=scores, means=means, lead=lead))
        return cls(tasks, systems, **values)

    def table(self, experts: bool = False) -> list[dict[str, str]]:
        """One row per task and one per mean, one column per system; of the experts the best one on held-in tasks, or on
        held-out ones where there are no others.

        Args:
            experts: the single experts, without intervals, instead of the other systems.
        """
        shown = [system for system in self.systems if (system.kind == "expert") == experts]
        singles = [system for system in self.systems if system.kind == "expert" and system.means]
        if singles and not experts:
            group = HELD_IN if any(HELD_IN in system.means for system in singles) else HELD_OUT  # no task is anyone's
            best = max((system for system in singles if group in system.means), key=lambda s: s.means[group].score)
            shown.append(replace(best, name=f"best single: {best.name}"))
        rows: list[dict[str, str]] = []
        for group in (HELD_IN, HELD_OUT):
            tasks = [task for task in self.tasks if task.group == group]
            for task in tasks:
                first = {"task": task.name, "n": str(task.n)}
                rows.append(first | {s.name: _cell(s.scores.get(task.name), experts) for s in shown})
            if tasks:
                first = {"task": f"mean, {group}", "n": str(sum(task.n for task in tasks))}
                rows.append(first | {s.name: _cell(s.means.get(group), experts) for s in shown})
        return rows

    def text(self) -> str:
        """All tables as text: the systems, the router's lead over each, the single experts."""
        leads = [
            {"lead over": system.name, **{group: str(score) for group, score in system.lead.items()}}
            for system in self.systems
            if system.lead
        ]
        singles = self.table(experts=True) if any(system.kind == "expert" for system in self.systems) else []
        return "\n\n".join(aligned(rows) for rows in (self.table(), leads, singles) if rows)


def _scores(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    return {name: Score(value["score"], tuple(value["ci95"])) for name, value in values.items()}


def _cell(score: Score | None, short: bool) -> str:
    if score is None:
        return "–"
    return f"{100 * score.score:.0f}" if short else str(score)


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table in plain text: the first column to the left, the others to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([row.get(name, "–") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
