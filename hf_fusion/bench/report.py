"""From cells to what is read: one summary (see `bench.summary`) that tables, pictures and the leaderboard show."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hf_fusion.bench.cells import ALL, CLEAN, Cell
from hf_fusion.bench.suite import LOWER
from hf_fusion.bench.summary import BenchSummary, MeanSummary, MethodSummary, SuiteSummary, TaskScore, TaskSummary
from hf_fusion.evaluation.intervals import Score, mean_of

HELD_IN, HELD_OUT = "held-in", "held-out"
INDIVIDUAL = "individual"
"""The method whose model of a task is the task's own expert: what scores are normalised to."""
EXPERT, SINGLE = "expert:", "expert"
"""How the method of a single expert begins, and its family."""
FLOOR, FUSED, CEILING = PARTS = ("floor", "fused", "ceiling")
"""Families of methods without fusion, at both ends of a table, and those between them."""
HEADINGS = {FLOOR: "Floors", CEILING: "Ceilings"}


def summarise(cells: Iterable[Cell]) -> BenchSummary:
    """All that was measured, as tables show it.

    A score is the mean over seeds, its interval has the mean of the seeds' ends (95 %, over rows), its spread is half
    the range over seeds. A mean over tasks is taken seed by seed (`mean_of`), of the seeds that have all its tasks;
    where a task has no score there is none, nor where metrics cannot be averaged. What a method scores normalised
    is its mean as a share of the individual experts' on the same tasks and condition, or the mean of such shares where
    metrics cannot be averaged. A drop is relative to the clean rows of the same held-in tasks. For metrics for
    which lower is better both are inverted, so that 1 is as good as the experts and a drop is a loss.

    Args:
        cells: of any suites, in any order; of two for the same place the later counts.
    """
    suites: dict[str, list[Cell]] = {}
    for cell in {cell.path: cell for cell in cells}.values():
        suites.setdefault(cell.suite, []).append(cell)
    return {"suites": [_SuiteCells(name, cells).summary() for name, cells in sorted(suites.items())]}


@dataclass(frozen=True)
class _SuiteCells:
    """The cells of one suite."""

    name: str
    cells: list[Cell]

    @cached_property
    def declared(self) -> Any:
        """The suite's own file; None for one that is not ours."""
        try:
            from hf_fusion.bench.suite import load_suite, suite_names
        except ImportError:
            return None
        return load_suite(self.name) if self.name in suite_names() else None  # a stranger's name is no path

    @cached_property
    def tasks(self) -> dict[str, TaskSummary]:
        """Task -> what a table says of it; held-in tasks first, then as declared."""
        declared = {name: index for index, name in enumerate(self.declared.tasks if self.declared else ())}
        found: dict[str, TaskSummary] = {}
        # A failed cell may not know its metric and rows; in a split, groups are others.
        for cell in sorted(self.cells, key=lambda cell: (cell.split != ALL, not _is_good(cell), cell.condition)):
            found.setdefault(cell.task, {"name": cell.task, "metric": cell.metric, "n": cell.n, "group": cell.group})
        order = sorted(
            found, key=lambda name: (found[name]["group"] != HELD_IN, declared.get(name, len(declared)), name)
        )
        return {name: found[name] for name in order}

    @cached_property
    def groups(self) -> dict[tuple[str, str], dict[str, list[str]]]:
        """(split, condition) -> group -> the tasks that anything was run on."""
        places: dict[tuple[str, str], dict[str, str]] = {}
        for cell in self.cells:
            places.setdefault((cell.split, cell.condition), {})[cell.task] = cell.group
        found: dict[tuple[str, str], dict[str, list[str]]] = {}
        for place, groups in places.items():
            for task in self.tasks:
                if task in groups:
                    found.setdefault(place, {}).setdefault(groups[task], []).append(task)
        return found

    @cached_property
    def individual(self) -> dict[tuple[str, str], float]:
        """(condition, task) -> score of the task's own expert, which is the same in every split."""
        scores: dict[tuple[str, str, str], list[float]] = {}
        for cell in self.cells:
            if cell.method == INDIVIDUAL and _is_good(cell):
                scores.setdefault((cell.condition, cell.task, cell.split), []).append(_score(cell))
        ordered = sorted(scores.items(), key=lambda item: item[0][2] == ALL)  # that of "all" last: it counts
        return {(condition, task): sum(scores) / len(scores) for (condition, task, _), scores in ordered}

    def tasks_of(self, split: str) -> dict[str, list[str]]:
        """Group -> its tasks in a split, whatever the condition."""
        run = [groups for (where, _), groups in self.groups.items() if where == split]
        return {
            group: [task for task in self.tasks if any(task in groups.get(group, ()) for groups in run)]
            for group in (HELD_IN, HELD_OUT)
            if any(group in groups for groups in run)
        }

    def is_lower(self, tasks: Sequence[str]) -> bool | None:
        """Whether less is better on all of some tasks; None where their scores cannot be averaged."""
        metrics = {self.tasks[task]["metric"] for task in tasks}
        return metrics <= LOWER if len(metrics) == 1 or not metrics & LOWER else None

    def summary(self) -> SuiteSummary:
        """The suite's part of the summary."""
        rows: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells:
            rows.setdefault((cell.method, cell.variant, cell.split), []).append(cell)
        splits = sorted({cell.split for cell in self.cells}, key=lambda split: (split != ALL, split))
        known = _Known()
        found = [
            self.row(known, sorted(cells, key=lambda cell: (cell.condition, cell.seed))) for cells in rows.values()
        ]
        tasks = list(self.tasks)
        found.sort(key=lambda row: (known.place(row, tasks), row["variant"] != "default", row["variant"], row["split"]))
        return {
            "name": self.name,
            "title": self.declared.title if self.declared else self.name,
            "kind": self.declared.kind if self.declared else "",
            "head": self.declared.head if self.declared else "",
            "tasks": list(self.tasks.values()),
            "conditions": sorted({cell.condition for cell in self.cells}, key=_condition_place),
            "splits": splits,
            "groups": {split: self.tasks_of(split) for split in splits},
            "rows": found,
        }

    def row(self, known: _Known, cells: list[Cell]) -> MethodSummary:
        """One method in one variant on one split; its cells sorted by condition and seed."""
        first = next((cell for cell in cells if cell.condition == CLEAN and _is_good(cell)), cells[0])
        by_task: dict[str, dict[str, list[Cell]]] = {}
        for cell in cells:
            by_task.setdefault(cell.condition, {}).setdefault(cell.task, []).append(cell)
        scores: dict[str, dict[str, TaskScore]] = {}
        means: dict[str, dict[str, MeanSummary]] = {}
        normalised: dict[str, dict[str, float]] = {}
        drop: dict[str, float] = {}
        for condition in sorted(by_task, key=_condition_place):
            groups, own = self.groups[first.split, condition], by_task[condition]
            here = {task for tasks in groups.values() for task in tasks}
            scores[condition] = {task: _entry(own.get(task, [])) for task in self.tasks if task in here}
            for group, tasks in groups.items():
                if mean := self.mean(own, tasks):
                    means.setdefault(condition, {})[group] = mean
                share = self.normalised(mean, scores[condition], tasks, condition)
                if share is not None:
                    normalised.setdefault(condition, {})[group] = share
            clean = self.mean(by_task.get(CLEAN, {}), groups.get(HELD_IN, ())) if condition != CLEAN else None
            if clean and clean["score"] and HELD_IN in means.get(condition, {}):
                left = means[condition][HELD_IN]["score"] / clean["score"]
                drop[condition] = left - 1 if self.is_lower(groups[HELD_IN]) else 1 - left
        good = [cell for cell in cells if _is_good(cell)] or cells
        clean_seconds: dict[int, float] = {}
        for cell in good:
            if cell.condition == CLEAN:
                clean_seconds[cell.seed] = clean_seconds.get(cell.seed, 0.0) + cell.seconds
        seeds = sorted({cell.seed for cell in cells})
        fused = [max((c.fuse_cpu_seconds for c in good if c.seed == seed), default=None) for seed in seeds]
        return {
            "method": first.method,
            "variant": first.variant,
            "title": known.title(first.method),
            "family": first.family,
            "part": known.part(first.method, first.family),
            "section": known.section(first.method, first.family),
            "split": first.split,
            "seeds": seeds,
            "scores": scores,
            "means": means,
            "normalised": normalised,
            "drop": drop,
            "cost": _plain_mean([c.cost for c in good if c.condition == CLEAN] or [c.cost for c in good]),
            "stored": max(cell.stored for cell in good),
            "active": max(cell.active for cell in good),
            "fuse_cpu_seconds": _plain_mean([seconds for seconds in fused if seconds is not None]),
            "seconds": _plain_mean(list(clean_seconds.values())),
            "peak_bytes": max(cell.peak_bytes for cell in good),
            "parameters": first.parameters,
            "command": first.command,
            "versions": first.versions,
            "shas": {name: sha for cell in reversed(good) for name, sha in cell.shas.items()},
            "machine": first.machine,
        }

    def normalised(
        self, mean: MeanSummary | None, scores: Mapping[str, TaskScore], tasks: Sequence[str], condition: str
    ) -> float | None:
        """A mean as a share of the individual experts'; where there can be none, the mean of the tasks' shares."""
        wanted = [self.individual.get((condition, task)) for task in tasks]
        experts = [score for score in wanted if score is not None]
        if len(experts) < len(tasks):
            return None
        if mean is not None:
            pairs = [(mean["score"], _plain_mean(experts), self.is_lower(tasks))]
        elif self.is_lower(tasks) is None and all("score" in scores[task] for task in tasks):
            found = [(scores[task]["score"], self.is_lower([task])) for task in tasks]
            pairs = [(score, expert, lower) for (score, lower), expert in zip(found, experts, strict=True)]
        else:
            return None
        ratios = [(expert, score) if lower else (score, expert) for score, expert, lower in pairs]
        return _plain_mean([better / worse for better, worse in ratios]) if all(worse for _, worse in ratios) else None

    def mean(self, by_task: Mapping[str, Sequence[Cell]], tasks: Collection[str]) -> MeanSummary | None:
        """The mean over some tasks; None where one is missing."""
        tasks = list(tasks)
        if not tasks or self.is_lower(tasks) is None:
            return None
        by_seed = {task: {cell.seed: cell for cell in by_task.get(task, ()) if _is_good(cell)} for task in tasks}
        seeds = sorted(set.intersection(*(set(cells) for cells in by_seed.values())))
        return _over_seeds([_over_tasks([by_seed[task][seed] for task in tasks]) for seed in seeds]) if seeds else None


class _Known:
    """What the table of methods tells: titles and order. Methods of other people are not in it."""

    def __init__(self) -> None:
        self.methods: Mapping[str, Any] = {}
        self.families: Mapping[str, str] = {}
        try:
            from hf_fusion.bench.methods import FAMILIES, METHODS
        except ImportError:
            return
        self.methods, self.families = METHODS, FAMILIES

    def title(self, method: str) -> str:
        """What tables call a method."""
        if method.startswith(EXPERT):
            return f"expert {method.removeprefix(EXPERT)}"
        return str(getattr(self.methods.get(method), "title", method))

    @staticmethod
    def part(method: str, family: str) -> Literal["floor", "fused", "ceiling"]:
        """Whether a method is a floor, a ceiling or fuses."""
        if method.startswith(EXPERT) or family in (FLOOR, SINGLE):
            return "floor"
        return "ceiling" if family == CEILING else "fused"

    def section(self, method: str, family: str) -> str:
        """The heading of a method's section."""
        return str(self.families.get(family) or HEADINGS.get(self.part(method, family)) or family)

    def place(self, row: MethodSummary, tasks: list[str]) -> tuple[Any, ...]:
        """What rows are sorted by: floors with experts last, families and methods in the order of their tables."""
        method, expert = row["method"], row["method"].removeprefix(EXPERT)
        families, methods = list(self.families), list(self.methods)
        return (
            PARTS.index(row["part"]),
            method != expert,
            families.index(row["family"]) if row["family"] in families else len(families),
            "" if row["family"] in families else row["family"],
            methods.index(method) if method in methods else len(methods),
            tasks.index(expert) if expert in tasks else len(tasks),
            method,
        )


def _is_good(cell: Cell) -> bool:
    return cell.status == "measured" and cell.score is not None and math.isfinite(cell.score)


def _score(cell: Cell) -> float:
    assert cell.score is not None  # `_is_good`
    return float(cell.score)


def _ends(cell: Cell) -> tuple[float, float] | None:
    """Its interval, if it has one that is made of numbers."""
    return cell.ci95 if cell.ci95 is not None and all(map(math.isfinite, cell.ci95)) else None


def _entry(cells: Sequence[Cell]) -> TaskScore:
    """A score over seeds, or why there is none."""
    if not cells:
        return {"status": "not run", "reason": "not run"}
    good = [cell for cell in cells if _is_good(cell)]
    bad = {cell.seed: _reason(cell) for cell in cells if not _is_good(cell)}
    if not good:
        status = "failed" if cells[0].status == "measured" else cells[0].status
        return {"status": status, "reason": "; ".join(dict.fromkeys(bad.values()))}
    over_seeds = _over_seeds([(_score(cell), _ends(cell)) for cell in good])
    entry: TaskScore = {**over_seeds, "n": max(cell.n for cell in good)}
    if bad:
        entry["note"] = "; ".join(f"without seed {seed}: {reason}" for seed, reason in bad.items())
    return entry


def _reason(cell: Cell) -> str:
    if cell.status == "measured":
        return f"the score is {cell.score}"
    return cell.reason or cell.status


def _over_tasks(cells: Sequence[Cell]) -> tuple[float, tuple[float, float] | None]:
    """The mean of one seed's scores with its interval, None where one of them has none."""
    known = [Score(_score(cell), ends) for cell in cells if (ends := _ends(cell)) is not None]
    if len(known) < len(cells):
        return _plain_mean([_score(cell) for cell in cells]), None
    mean = mean_of(known)
    return mean.score, mean.ci95


def _over_seeds(seeds: Sequence[tuple[float, tuple[float, float] | None]]) -> MeanSummary:
    """The mean of seeds' scores and ends, and half of the scores' range."""
    scores, ends = [score for score, _ in seeds], [ci95 for _, ci95 in seeds if ci95 is not None]
    ci95 = [_plain_mean(side) for side in zip(*ends, strict=True)] if len(ends) == len(scores) else None
    return {"score": _plain_mean(scores), "ci95": ci95, "spread": (max(scores) - min(scores)) / 2}


def _plain_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _condition_place(condition: str) -> tuple[bool, str, int]:
    """Clean first, then by corruption, then by severity."""
    name, _, severity = condition.partition(":")
    return condition != CLEAN, name, int(severity) if severity.isdecimal() else 0
