"""Reads and checks `leaderboard.json`, which `hf-fusion bench report` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

FILE = "leaderboard.json"
ALL, CLEAN = "all", "clean"
HELD_IN, HELD_OUT = "held-in", "held-out"
FLOOR, FUSED, CEILING = "floor", "fused", "ceiling"
HARNESS_LOWER = frozenset({"word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score", "mse"})
LOWER = frozenset({"perplexity", "absolute_error", "angle"}) | HARNESS_LOWER  # less is better; not a share


class EmptyError(Exception):
    """There are no results yet."""


class BrokenError(Exception):
    """The results cannot be read; the message says what is wrong and where."""


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval; with `score` None, the reason why there is no score."""

    score: float | None
    ci95: tuple[float, float] | None = None
    spread: float = 0.0
    n: int = 0
    note: str = ""
    status: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """A task of a suite; `group` is its group when all experts are fused."""

    name: str
    metric: str
    n: int
    group: str

    @property
    def is_lower(self) -> bool:
        """Whether less is better."""
        return self.metric in LOWER


@dataclass(frozen=True)
class Row:
    """One method in one variant on one split, see `MethodSummary` in hf_fusion/bench/summary.py."""

    method: str
    variant: str
    title: str
    family: str
    part: str
    section: str
    split: str
    seeds: tuple[int, ...]
    scores: dict[str, dict[str, Score]]
    means: dict[str, dict[str, Score]]
    normalised: dict[str, dict[str, float]]
    drop: dict[str, float]
    cost: float
    stored: float
    active: float
    fuse_cpu_seconds: float
    seconds: float
    peak_bytes: float
    parameters: dict[str, Any]
    command: str
    versions: dict[str, str]
    shas: dict[str, str]
    machine: str

    @property
    def key(self) -> str:
        """Its name in links."""
        return f"{self.method}.{self.variant}"

    @property
    def is_measured(self) -> bool:
        """Whether it has any score, rather than only reasons why there is none."""
        return any(score.score is not None for scores in self.scores.values() for score in scores.values())

    @property
    def full_title(self) -> str:
        """The method, and its variant where that is not the default."""
        return self.title if self.variant == "default" else f"{self.title}, {self.variant}"


@dataclass(frozen=True)
class Suite:
    """The results of one suite, in the order of its tables."""

    name: str
    title: str
    kind: str
    tasks: tuple[Task, ...]
    conditions: tuple[str, ...]
    splits: tuple[str, ...]
    groups: dict[str, dict[str, tuple[str, ...]]]
    rows: tuple[Row, ...]

    def tasks_of(self, split: str, group: str) -> list[Task]:
        """The tasks of a group in a split."""
        names = self.groups.get(split, {}).get(group, ())
        return [task for task in self.tasks if task.name in names]

    def main_group(self, split: str) -> str:
        """The group whose mean ranks the methods of a split: held-in tasks, if any were measured."""
        return HELD_IN if self.tasks_of(split, HELD_IN) else HELD_OUT

    def is_lower(self, tasks: list[Task]) -> bool:
        """Whether less is better in the mean of some tasks."""
        return any(task.is_lower for task in tasks)


# ---------------------------------------------------------------- reading


def read(path: str, dataset: str, revision: str | None) -> list[Suite]:
    """The suites of a file, or of a data set of the Hub.

    Args:
        path: of the file; if it exists, it is read rather than the data set.
        dataset: id of a data set with a `leaderboard.json`, or "".
        revision: of the data set; None for the newest commit.

    Raises:
        EmptyError: there is neither a file nor the id of a data set, or the file contains no measurements.
        BrokenError: it cannot be fetched, or read.
    """
    where = path
    if not Path(path).is_file():
        if not dataset:
            raise EmptyError(f"There is no file {Path(path).name} beside app.py, and RESULTS_DATASET is not set.")
        where = f"{FILE} of {dataset}"
        try:
            path = hf_hub_download(dataset, FILE, repo_type="dataset", revision=revision)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise BrokenError(f"{where} could not be fetched: {str(error).strip().splitlines()[0]}") from error
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenError(f"{Path(where).name if where == path else where} is not JSON: {error}") from error
    suites = parse(content)
    if not any(suite.rows for suite in suites):
        raise EmptyError(f"{Path(where).name if where == path else where} contains no measurements.")
    return suites


# ---------------------------------------------------------------- checking

NUMBER = (int, float)


def parse(content: Any) -> list[Suite]:
    """The suites with results in the content of a file.

    Raises:
        BrokenError: a value is missing or of the wrong type; the message says where.
    """
    plain = _get(_kind(content, dict, "the file"), "suites", list, "the file")
    suites = [_suite(_kind(suite, dict, f"suites[{i}]"), f"suites[{i}]") for i, suite in enumerate(plain)]
    return [suite for suite in suites if suite.rows]


def _suite(content: dict[str, Any], at: str) -> Suite:
    texts = {key: _get(content, key, str, at) for key in ("name", "title", "kind")}
    tasks, rows = (
        [_kind(item, dict, f"{at}.{key}[{i}]") for i, item in enumerate(_get(content, key, list, at))]
        for key in ("tasks", "rows")
    )
    return Suite(
        **texts,
        tasks=tuple(_task(task, f"{at}.tasks[{i}]") for i, task in enumerate(tasks)),
        conditions=_texts(content, "conditions", at),
        splits=_texts(content, "splits", at),
        rows=tuple(_row(row, f"{at}.rows[{i}]") for i, row in enumerate(rows)),
        groups={
            split: {group: _texts(groups, group, f"{at}.groups.{split}") for group in groups}
            for split, groups in _each(_get(content, "groups", dict, at), dict, f"{at}.groups").items()
        },
    )


def _task(content: dict[str, Any], at: str) -> Task:
    name, metric, group = (_get(content, key, str, at) for key in ("name", "metric", "group"))
    return Task(name, metric, _get(content, "n", int, at), group)


def _row(content: dict[str, Any], at: str) -> Row:
    texts = ("method", "variant", "title", "family", "part", "section", "split", "command", "machine")
    numbers = ("cost", "stored", "active", "fuse_cpu_seconds", "seconds", "peak_bytes")
    if (part := _get(content, "part", str, at)) not in (FLOOR, FUSED, CEILING):
        raise BrokenError(f"{at}.part is {part!r}; it must be floor, fused or ceiling")

    def table(key: str) -> dict[str, dict[str, Any]]:
        return _each(_get(content, key, dict, at), dict, f"{at}.{key}")

    return Row(
        **{key: _get(content, key, str, at) for key in texts},
        **{key: _number(_get(content, key, NUMBER, at), f"{at}.{key}") for key in numbers},
        seeds=tuple(_kind(seed, int, f"{at}.seeds") for seed in _get(content, "seeds", list, at)),
        scores=_scores(table("scores"), f"{at}.scores"),
        means=_scores(table("means"), f"{at}.means"),
        normalised={
            condition: {group: _number(share, f"{at}.normalised.{condition}") for group, share in shares.items()}
            for condition, shares in table("normalised").items()
        },
        drop={condition: _number(share, f"{at}.drop") for condition, share in _get(content, "drop", dict, at).items()},
        parameters=_get(content, "parameters", dict, at),
        versions=_each(_get(content, "versions", dict, at), str, f"{at}.versions"),
        shas=_each(_get(content, "shas", dict, at), str, f"{at}.shas"),
    )


def _scores(content: Mapping[str, Mapping[str, Any]], at: str) -> dict[str, dict[str, Score]]:
    return {
        condition: {name: _score(_kind(score, dict, at), f"{at}.{condition}.{name}") for name, score in scores.items()}
        for condition, scores in content.items()
    }


def _score(content: dict[str, Any], at: str) -> Score:
    if content.get("score") is None:
        return Score(None, status=_get(content, "status", str, at), reason=_get(content, "reason", str, at))
    ends = content.get("ci95")
    if ends is not None:
        if len(_kind(ends, list, f"{at}.ci95")) != 2:
            raise BrokenError(f"{at}.ci95 has {len(ends)} values; an interval has 2")
        ends = (_number(ends[0], f"{at}.ci95"), _number(ends[1], f"{at}.ci95"))
    n, note = _kind(content.get("n", 0), int, f"{at}.n"), _kind(content.get("note", ""), str, f"{at}.note")
    return Score(_number(content["score"], at), ends, _number(content.get("spread", 0.0), f"{at}.spread"), n, note)


def _get(content: Mapping[str, Any], key: str, kind: Any, at: str) -> Any:
    if key not in content:
        raise BrokenError(f"{at} has no {key!r}")
    return _kind(content[key], kind, f"{at}.{key}")


def _kind(value: Any, kind: Any, at: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}.get(kind, "a number")
        raise BrokenError(f"{at} is {repr(value)[:60]}, not {expected}")
    return value


def _number(value: Any, at: str) -> float:
    if not math.isfinite(_kind(value, NUMBER, at)):
        raise BrokenError(f"{at} is {value}, not a number")
    return float(value)


def _each(content: Any, kind: Any, at: str) -> dict[str, Any]:
    return {key: _kind(value, kind, f"{at}.{key}") for key, value in _kind(content, dict, at).items()}


def _texts(content: Mapping[str, Any], key: str, at: str) -> tuple[str, ...]:
    return tuple(_kind(value, str, f"{at}.{key}") for value in _get(content, key, list, at))
