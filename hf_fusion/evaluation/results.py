"""What an evaluation found: the score of every predictor on every task, with intervals, as data and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.harness_results import HarnessRun, add_run
from hf_fusion.evaluation.intervals import Score
from hf_fusion.io.json_files import read_json
from hf_fusion.io.saving import write_file
from hf_fusion.models.fused_html import first_of, table_of_rows
from hf_fusion.schema import KeyPath, fields_of, read_class

Metric = Literal["accuracy", "exact", "tokens", "ranked"]
HELD_IN, HELD_OUT = "held-in", "held-out"
FUSED, FRUGAL = "fused", "frugal"  # kinds of predictors: the model that is measured, and it with fewer experts
RESULTS_FILE = "results.json"  # its name beside a model


@dataclass
class MeasuredTask:
    """The test rows of one task, or of several experts' domains together.

    Attributes:
        name: what tables call it.
        metric: "accuracy" of classes, "mse" of numbers, "exact" match of the greedy prediction with the target's
            tokens, "exact_match" of generated texts, share of right next "tokens", or share of rows whose likeliest
            choice is right ("ranked").
        n: rows.
        owner: the expert that was trained on it; None for a held-out task.
        split: of the data set.
        pooled: the rows are of several experts' domains, so that the task is neither held-in nor held-out.
    """

    name: str
    metric: str
    n: int
    owner: str | None = None
    split: str = "test"
    pooled: bool = False

    @property
    def group(self) -> str | None:
        """Whether an expert was trained on it: "held-in" or "held-out"; None where rows are pooled."""
        if self.pooled:
            return None
        return HELD_OUT if self.owner is None else HELD_IN


@dataclass
class PredictorScores:
    """What one predictor scored.

    Attributes:
        name: what tables call it.
        kind: "fused" or "frugal" for the model that is measured, "expert", "base", "baseline" or "oracle" for what it
            is compared with.
        scores: task → its score, for the tasks it was run on.
        means: "held-in" and "held-out" → mean of the scores of these tasks, equally weighted; only where it was run on
            all of them.
        lead: the same groups → by how much the fused model's mean is above this one's, from the same rows.
        cost: mean share of the cost of querying every expert; None where it is not counted.
    """

    name: str
    kind: str
    scores: dict[str, Score]
    means: dict[str, Score] = field(default_factory=dict)
    lead: dict[str, Score] = field(default_factory=dict)
    cost: float | None = None

    @property
    def only_score(self) -> Score:
        """The score where a single task was measured.

        Raises:
            ValueError: it was run on several tasks.
        """
        [score] = self.scores.values()
        return score


@dataclass
class Results:
    """A comparison of predictors; `results.json` beside a model, and its card's tables.

    Intervals hold 95 %: Wilson's for a share, the normal one for other means (metrics "tokens" and "mse"). The interval
    of a mean over tasks adds the tasks' intervals, squared (`intervals.mean_of`); a lead is the mean difference on the
    same rows with the normal interval stratified by task (`scoring.lead_of`). Tasks are taken as given, rows as drawn.

    Attributes:
        tasks: what was measured on; a single one with pooled rows for a Fusion of Experts.
        predictors: what was compared.
        selection_accuracy: share of rows for which a Fusion of Experts chose the expert of their domain; None where it
            does not choose, or the domains are not known.
        curve: the frugal variant's accuracy-cost curve; points of cost_weight, score, ci95, and cost as in
            `PredictorScores`.
        settings: top_k, temperature, seed and whatever else determines the scores.
        command: the command that repeats the measurement.
        machine: what it ran on.
        harness: runs of lm-evaluation-harness, whose tasks have their own rows and metrics; without them, tasks and
            predictors, all of the above are of labelled rows.
    """

    tasks: list[MeasuredTask]
    predictors: list[PredictorScores]
    selection_accuracy: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    machine: str = ""
    harness: list[HarnessRun] = field(default_factory=list)

    def __getitem__(self, name: str) -> PredictorScores:
        """The predictor of that name."""
        return next(predictor for predictor in self.predictors if predictor.name == name)

    @property
    def pooled(self) -> bool:
        """Whether it is one data set with rows of several experts' domains."""
        return bool(self.tasks) and all(task.pooled for task in self.tasks)

    def groups(self) -> dict[str, list[MeasuredTask]]:
        """ "held-in" and "held-out" → the tasks of the group, where there are any."""
        members = {group: [task for task in self.tasks if task.group == group] for group in (HELD_IN, HELD_OUT)}
        return {group: tasks for group, tasks in members.items() if tasks}

    def best(self, kind: str, group: str = HELD_IN) -> PredictorScores:
        """The predictor of a kind with the best score on pooled rows, or with the best mean over a group of tasks.

        Raises:
            ValueError: none of this kind was measured.
        """
        if self.pooled:
            sign = -1 if self.tasks[0].metric == "mse" else 1
            return max((p for p in self.predictors if p.kind == kind), key=lambda p: sign * p.only_score.score)
        return max(
            (p for p in self.predictors if p.kind == kind and group in p.means), key=lambda p: p.means[group].score
        )

    def with_earlier(self, earlier: Results) -> Results:
        """These results, and of earlier ones what was not measured again: labelled rows, or tasks of the harness."""
        runs = earlier.harness
        for run in self.harness:
            runs = add_run(runs, run)
        return replace(self if self.tasks else earlier, harness=runs)

    def save(self, path: str | Path) -> None:
        """Writes JSON, all of it or nothing."""
        write_file(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Reads a file that `save` wrote, in the current or an earlier format.

        Raises:
            FusionError: it is not such a file.
        """
        return cls.from_dict(read_json(Path(path), str(Path(path).parent)), str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str = RESULTS_FILE) -> Results:
        """Makes results from the content of such a file, which may have further keys.

        Raises:
            FusionError: a key is missing, or a value is of another type.
        """
        upgraded = _upgraded(content, file)
        return read_class(cls, {key: upgraded[key] for key in fields_of(cls) if key in upgraded}, KeyPath(file))

    def table(self, experts: bool = False) -> list[dict[str, str]]:
        """For printing: one row per predictor where rows are pooled, else one per task and mean.

        Args:
            experts: show the single experts, without intervals, instead of the other predictors. The other table shows
                only the best of them on held-in tasks, or on held-out tasks if there are no held-in ones.
        """
        return self._by_predictor() if self.pooled else self._by_task(experts)

    def _by_predictor(self) -> list[dict[str, str]]:
        """Score and interval as shares (or plain numbers), cost as a share."""
        metric = self.tasks[0].metric
        form = "{:.4g}" if metric == "mse" else "{:.1%}"
        return [
            {
                "predictor": predictor.name,
                metric: form.format(predictor.only_score.score).rjust(5),
                "95 % interval": " – ".join(form.format(end) for end in predictor.only_score.ci95),
                "cost": "" if predictor.cost is None else f"{predictor.cost:.0%}".rjust(4),
            }
            for predictor in self.predictors
        ]

    def _by_task(self, experts: bool) -> list[dict[str, str]]:
        shown = [predictor for predictor in self.predictors if (predictor.kind == "expert") == experts]
        singles = [predictor for predictor in self.predictors if predictor.kind == "expert" and predictor.means]
        if singles and not experts:
            group = HELD_IN if any(HELD_IN in single.means for single in singles) else HELD_OUT
            best = self.best("expert", group)
            shown.append(replace(best, name=f"best single: {best.name}"))
        rows: list[dict[str, str]] = []
        for group, tasks in self.groups().items():
            for task in tasks:
                first = {"task": task.name, "n": str(task.n)}
                rows.append(first | {p.name: _cell(p.scores.get(task.name), experts) for p in shown})
            first = {"task": f"mean, {group}", "n": str(sum(task.n for task in tasks))}
            rows.append(first | {p.name: _cell(p.means.get(group), experts) for p in shown})
        return rows

    def text(self) -> str:
        """All tables as text: the predictors, the fused model's lead over each, the single experts; the harness's."""
        tables = [*self._tables(), *(run.table() for run in self.harness)]
        return "\n\n".join(aligned(rows) for rows in tables if rows)

    def _repr_html_(self) -> str:
        captions = (
            ", ".join(f"{task.name}: {task.n:,} rows" for task in self.tasks) if self.pooled else "",
            "",
            "Single experts",
        )
        tables = [*zip(self._tables(), captions, strict=True)]
        tables += [(run.table(), "lm-evaluation-harness, ± standard error") for run in self.harness]
        return "".join(table_of_rows(first_of(rows, "rows"), caption, right=True) for rows, caption in tables if rows)

    def _tables(self) -> tuple[list[dict[str, str]], ...]:
        """The predictors, the fused model's lead over each, the single experts; empty where there are none."""
        leads = [
            {"lead over": predictor.name, **{group: str(score) for group, score in predictor.lead.items()}}
            for predictor in self.predictors
            if predictor.lead
        ]
        has_singles = not self.pooled and any(predictor.kind == "expert" for predictor in self.predictors)
        return self.table(), leads, self.table(experts=True) if has_singles else []


# ---------------------------------------------------------------- reading

_EARLIER_KINDS = {"foe": FUSED, "router": FUSED, "merged": FUSED}  # the model that is measured, in earlier forms


def _upgraded(content: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """The content of a file of any form in the form that `Results.save` writes."""
    if "systems" not in content:
        return content
    try:
        return _from_suite(content) if "tasks" in content else _from_pooled(content)
    except (AttributeError, TypeError) as error:
        raise FusionError(f"{file} cannot be read ({error})", hint="hf-fusion eval writes it") from error


def _from_suite(content: Mapping[str, Any]) -> dict[str, Any]:
    """Until all results had one form: of models that are measured task by task."""
    rows = [{**row, "kind": _EARLIER_KINDS.get(row.get("kind"), row.get("kind"))} for row in content["systems"]]
    return {**content, "predictors": rows}


def _from_pooled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Until all results had one form: of a Fusion of Experts."""
    data = content.get("dataset") or {}
    task = {"name": data.get("name"), "split": data.get("split"), "pooled": True}
    task |= {key: content.get(key) for key in ("metric", "n")}
    systems = []
    for row in content["systems"]:
        score = {key: row.get(key) for key in ("score", "ci95")}
        systems.append({key: row.get(key) for key in ("name", "kind", "cost")} | {"scores": {task["name"]: score}})
    return _from_suite({**content, "tasks": [task], "systems": systems})


# ---------------------------------------------------------------- tables


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
