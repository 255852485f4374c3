"""Scores of lm-evaluation-harness as data and as a table; plain numbers, without torch and without the harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

URL = "https://github.com/EleutherAI/lm-evaluation-harness"


@dataclass(frozen=True)
class HarnessScore:
    """What one model scored on one task by one metric.

    Attributes:
        predictor: what tables call the model.
        kind: see `hf_fusion.evaluation.results.PredictorScores`.
        task: name of the task or group.
        metric: the harness's name, such as "acc_norm"; after a comma the filter of the outputs, where there is one.
        score: as the harness computes it: for most metrics a share.
        stderr: its standard error; None where the harness has none.
        n: documents.
        shots: examples before each document.
        version: of the task.
        higher_is_better: None where the task does not say so.
        dataset: its id on the Hub; "" for local files and groups.
        part_of: the group whose scores contain this one; None for tasks that stand alone.
    """

    predictor: str
    kind: str
    task: str
    metric: str
    score: float
    stderr: float | None = None
    n: int = 0
    shots: int = 0
    version: str = ""
    higher_is_better: bool | None = None
    dataset: str = ""
    part_of: str | None = None

    def __str__(self) -> str:
        return f"{self.score:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


@dataclass
class HarnessRun:
    """One run of the harness.

    Attributes:
        scores: of every model, task and metric.
        settings: limit, few-shot examples, batch size and the harness's version.
        command: the command that repeats it.
        machine: what it ran on.
    """

    scores: list[HarnessScore]
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    machine: str = ""

    def shown(self) -> list[HarnessScore]:
        """The scores of what was asked for: of a group with a score its mean, without its tasks."""
        return [score for score in self.scores if score.part_of is None]

    def table(self) -> list[dict[str, str]]:
        """For printing: one row per task and metric, one column per model; scores with their standard errors."""
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for score in self.shown():
            first = {"task": score.task, "metric": score.metric, "shots": str(score.shots), "n": str(score.n)}
            rows.setdefault((score.task, score.metric), first)[score.predictor] = str(score)
        columns = dict.fromkeys(name for row in rows.values() for name in row)
        return [{name: row.get(name, "–") for name in columns} for row in rows.values()]


def add_run(runs: Sequence[HarnessRun], new: HarnessRun) -> list[HarnessRun]:
    """Runs with a new one, which replaces earlier scores on its tasks."""
    again = {score.task for score in new.scores}
    kept = [replace(run, scores=[score for score in run.scores if score.task not in again]) for run in runs]
    return [*(run for run in kept if run.scores), new]


__all__ = ["URL", "HarnessRun", "HarnessScore", "add_run"]
