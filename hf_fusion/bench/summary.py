"""The types of a benchmark's summary: what `report.summarise` makes of cells, and tables, pictures and cards read.

They are plain JSON, as ``leaderboard.json`` holds it. Suites, tasks, corruptions, splits and rows are in the order in
which tables show them.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Group = str
"""A key of what is said by group: "held-in" or "held-out"."""


class MeanSummary(TypedDict):
    """A mean over tasks.

    Attributes:
        score: mean over seeds.
        ci95: 95 % interval over rows; None where a score has none.
        spread: half the range over seeds.
    """

    score: float
    ci95: list[float] | None
    spread: float


class TaskScore(TypedDict, total=False):
    """What a row scored on a task: score, ci95, spread and n; or status and reason.

    Attributes:
        score, ci95, spread: see `MeanSummary`.
        n: test rows.
        note: why some seeds are missing.
        status: "failed", "left out" or "not run".
        reason: why the method has no score.
    """

    score: float
    ci95: list[float] | None
    spread: float
    n: int
    note: str
    status: str
    reason: str


class TaskSummary(TypedDict):
    """A task of a suite: its name, metric, number of test rows, and group where all experts are fused."""

    name: str
    metric: str
    n: int
    group: Group


class MethodSummary(TypedDict):
    """A row of tables: a method in a variant on a split.

    Attributes:
        method: see `Cell`.
        variant: see `Cell`.
        family: see `Cell`.
        split: see `Cell`.
        title: what tables call the method.
        part: where it stands in a table.
        section: its heading there.
        seeds: those that were run.
        scores: corruption → task → its score.
        means: corruption → group → mean of its tasks, where all have a score on one scale.
        normalised: corruption → group → the mean as a share of the individual experts'.
        drop: corruption → what is lost against the clean rows, as a share.
        cost: multiplications per forward pass, as a multiple of the dense base's.
        stored: see `Cell`.
        active: see `Cell`.
        fuse_cpu_seconds: CPU time of fusing.
        seconds: wall-clock time of the evaluation of all clean rows.
        peak_bytes: see `Cell`.
        parameters: see `Cell`.
        command: see `Cell`.
        versions: see `Cell`.
        shas: see `Cell`.
        machine: see `Cell`.
    """

    method: str
    variant: str
    title: str
    family: str
    part: Literal["floor", "fused", "ceiling"]
    section: str
    split: str
    seeds: list[int]
    scores: dict[str, dict[str, TaskScore]]
    means: dict[str, dict[Group, MeanSummary]]
    normalised: dict[str, dict[Group, float]]
    drop: dict[str, float]
    cost: float
    stored: int
    active: int
    fuse_cpu_seconds: float
    seconds: float
    peak_bytes: int
    parameters: dict[str, Any]
    command: str
    versions: dict[str, str]
    shas: dict[str, str]
    machine: str


class SuiteSummary(TypedDict):
    """A suite.

    Attributes:
        name: see `Suite`.
        title: see `Suite`.
        kind: see `Suite`; empty for a suite that is not in the package.
        head: see `Suite`; empty for a suite that is not in the package.
        tasks: held-in ones first.
        conditions: corruptions, "clean" first.
        splits: "all" first.
        groups: split → group → its tasks.
        rows: of all methods.
    """

    name: str
    title: str
    kind: str
    head: str
    tasks: list[TaskSummary]
    conditions: list[str]
    splits: list[str]
    groups: dict[str, dict[Group, list[str]]]
    rows: list[MethodSummary]


class BenchSummary(TypedDict):
    """All suites, by name."""

    suites: list[SuiteSummary]
