"""The search finds an optimum, measures few trials on all rows, and continues where it was interrupted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hf_fusion import FusionError
from hf_fusion.search.halving import ETA, row_counts, search_dimensions
from hf_fusion.search.space import Dimension
from hf_fusion.search.trials import Trial, TrialsFile, best_of

DIMENSIONS = [Dimension("x", ("x",), 0.0, 10.0, 5.0), Dimension("y", ("y",), -1.0, 1.0, 0.0)]
PEAK = (7.0, -0.4)


def height(values) -> float:
    """A quadratic in shares of the ranges, 0 at its peak."""
    return -sum(((v - p) / (d.high - d.low)) ** 2 for v, p, d in zip(values, PEAK, DIMENSIONS))


class Kept:
    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)


def searched(rows, budget: int, kept=None, dimensions=DIMENSIONS, seed: int = 0):
    """The trials, and how often a trial was measured on each number of rows."""
    kept, counts = kept or Kept(), [0] * len(rows)

    def measure(values):
        for rung in range(len(rows)):
            counts[rung] += 1
            yield height(values)

    search_dimensions(dimensions, measure, rows, kept, budget=budget, seed=seed)
    return kept.trials, counts


def test_rows_of_measurements():
    assert row_counts(30) == [30]
    assert row_counts(199) == [199]
    assert row_counts(200) == [50, 200]
    assert row_counts(3200) == [50, 200, 800, 3200]


def test_it_comes_close_to_the_peak():
    trials, counts = searched([50, 200, 800], 80)
    best = best_of(trials)
    # random points: the best of 80 is within sqrt(1 / (80 π)) of the peak in half of all cases; a search must do better
    assert height(best.parameters.values()) > -1 / (80 * math.pi) / 4
    assert len(trials) == 80 and counts[0] == 80
    assert trials[0].parameters == {"x": 5.0, "y": 0.0} and trials[0].complete
    assert all(0 <= t.parameters["x"] <= 10 and -1 <= t.parameters["y"] <= 1 for t in trials)


def test_few_trials_are_measured_on_all_rows():
    """Each is promoted that is among the best 1/ETA of those before it."""
    trials, counts = searched([50, 200, 800], 120, seed=3)
    assert counts[0] == 120
    for rung in (0, 1):
        scores = [t.scores[rung] for t in trials if len(t.scores) > rung]
        for index, trial in enumerate([t for t in trials if len(t.scores) > rung]):
            better = sum(score >= scores[index] for score in scores[:index])
            promoted = better < max(1, (index + 1) // ETA)
            assert (len(trial.scores) > rung + 1) == (promoted or trial.number == 0)
    assert counts[2] < counts[1] < counts[0]
    assert [t.rows for t in trials if not t.complete][0] in ([50], [50, 200])


def test_one_dimension_and_one_measurement():
    trials, counts = searched([10], 20, dimensions=DIMENSIONS[:1])
    assert counts == [20] and all(trial.complete for trial in trials)
    assert abs(best_of(trials).parameters["x"] - 7) < 0.5


def test_an_interrupted_search_continues(tmp_path):
    """In the middle of a generation, and with a line that was being written; with a larger budget as well."""
    whole = TrialsFile(tmp_path / "whole.jsonl", {"seed": 0})
    searched([50, 200], 40, whole)
    part = TrialsFile(tmp_path / "part.jsonl", {"seed": 0})
    searched([50, 200], 13, part)
    with (tmp_path / "part.jsonl").open("a") as file:
        file.write('{"number": 13, "parame')
    again = TrialsFile(tmp_path / "part.jsonl", {"seed": 0})
    assert len(again.trials) == 13
    trials, counts = searched([50, 200], 40, again)
    assert counts[0] == 27
    assert [replace(t, seconds=0) for t in trials] == [replace(t, seconds=0) for t in whole.trials]
    assert TrialsFile(tmp_path / "part.jsonl", {"seed": 0}).trials == again.trials
    assert searched([50, 200], 40, TrialsFile(tmp_path / "part.jsonl", {"seed": 0}))[1] == [0, 0]


def test_trials_of_another_search_are_refused(tmp_path):
    file = tmp_path / "trials.jsonl"
    searched([10], 5, TrialsFile(file, {"seed": 0}))
    with pytest.raises(FusionError, match="has the trials of another search") as raised:
        TrialsFile(file, {"seed": 1})
    assert "--overwrite" in str(raised.value.hint)
    kept = TrialsFile(file, {"seed": 0})
    kept.trials[3] = replace(kept.trials[3], parameters={"x": 1.0, "y": 1.0})
    with pytest.raises(FusionError, match="trial 3 was at x = 1, and the search would now try"):
        searched([10], 8, kept)
    assert TrialsFile(file, {"seed": 1}, overwrite=True).trials == []
    for text, message in (("", "trials of another"), ("{}\n", "trials of another")):
        file.write_text(text)
        with pytest.raises(FusionError, match=message):
            TrialsFile(file, {"seed": 1})
    TrialsFile(file, {"seed": 0}, overwrite=True)
    assert TrialsFile(file, {"seed": 1}).trials == [], "a search without a trial has nothing to lose"
    for line, message in (("nonsense", "line 2 is not JSON"), ('{"number": 4, "parameters": {}}', "is trial 4")):
        file.write_text('{"search": {"seed": 1}}\n' + line + "\n")
        with pytest.raises(FusionError, match=message):
            TrialsFile(file, {"seed": 1})


def test_trials_that_fail_are_the_worst_and_the_start_must_not():
    def measure(values):
        if values[0] > 6:
            raise FusionError("becomes NaN")
        yield height(values)

    kept = Kept()
    search_dimensions(DIMENSIONS, measure, [10], kept, budget=60)
    failed = [trial for trial in kept.trials if trial.failed]
    assert failed and all(trial.parameters["x"] > 6 and not trial.complete for trial in failed)
    assert best_of(kept.trials).parameters["x"] <= 6
    started = [replace(DIMENSIONS[0], start=8.0), DIMENSIONS[1]]
    with pytest.raises(FusionError, match="^becomes NaN"):
        search_dimensions(started, measure, [10], Kept(), budget=60)
