"""The search itself: CMA-ES proposes recipes, and successive halving measures most of them on few rows.

CMA-ES (Hansen, arXiv 1604.00772) reads nothing but the order of its proposals. A trial is therefore measured on a few
rows first, and on `ETA` times as many only while it is among the best 1/`ETA` of the trials that were measured on as
many before it: asynchronous successive halving (Li et al., 2018, arXiv 1810.05934), whose trials need not wait for each
other, so that each is merged once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from hf_fusion.errors import FusionError
from hf_fusion.search.space import Dimension
from hf_fusion.search.trials import Trial

ETA = 4
"""Each measurement is on that many times the rows of the one before, of one in that many trials."""
FEWEST_ROWS = 50
"""The first measurement is on at least that many rows, if there are as many."""
FIRST_STEP = 0.25
"""CMA-ES's first standard deviation, as a share of each range."""
SAME = 1e-3
"""Trials that differ by less, as a share of each range, are the same."""

Measure = Callable[[Sequence[float]], Iterator[float]]
"""Values of the dimensions → the score on the first rows, on more of them, … on all; the higher the better."""


class Trials(Protocol):
    """Where trials are kept: `hf_fusion.search.trials.TrialsFile`, or a list that is not written."""

    trials: list[Trial]

    def add(self, trial: Trial) -> None:
        """Keeps a further trial."""


def row_counts(total: int) -> list[int]:
    """The numbers of rows of the measurements of a trial, from the first to all.

    Args:
        total: the rows that are searched on.
    """
    counts = [total]
    while counts[0] // ETA >= FEWEST_ROWS:
        counts.insert(0, counts[0] // ETA)
    return counts


def search_dimensions(
    dimensions: Sequence[Dimension],
    measure: Measure,
    rows: Sequence[int],
    kept: Trials,
    *,
    budget: int,
    seed: int = 0,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Searches for the values with the highest score.

    Trials that are kept already are not measured again: CMA-ES is told what they scored, and proposes what it would
    have proposed.

    Args:
        dimensions: what is searched for; the first trial is at their starts.
        measure: values → scores. It is not asked for more scores than the trial needs.
        rows: the number of rows of each score, see `row_counts`.
        kept: earlier trials of this search; new ones are added.
        budget: number of trials, with those that are kept.
        seed: of CMA-ES.
        progress: called after each new trial.

    Raises:
        FusionError: cma is not installed, or the first trial cannot be merged or measured.
    """
    import cma

    done: list[Trial] = []

    def run(values: list[float]) -> Trial:
        number = len(done)
        names = {dimension.name: value for dimension, value in zip(dimensions, values, strict=True)}
        if number < len(kept.trials):
            trial = kept.trials[number]
            _check_same(trial, names, dimensions)
        else:
            trial = _measured(number, names, measure(values), rows, done)
            kept.add(trial)
            progress(trial)
        done.append(trial)
        return trial

    run([dimension.start for dimension in dimensions])
    options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9}  # 0 would be a seed from the clock
    start = [dimension.share(dimension.start) for dimension in dimensions]
    if len(start) == 1:
        start.append(0.5)  # cma searches in at least two dimensions; this one changes nothing
    strategy = cma.CMAEvolutionStrategy(start, FIRST_STEP, options)
    while len(done) < budget:
        proposed = strategy.ask()
        trials = []
        for point in proposed[: budget - len(done)]:
            trials.append(run([dimension.value(float(x)) for dimension, x in zip(dimensions, point)]))
        if len(trials) < len(proposed):
            return
        order = sorted(trials, key=lambda trial: trial.rank, reverse=True)
        strategy.tell(proposed, [float(order.index(trial)) for trial in trials])


def _measured(
    number: int, names: dict[str, float], scores: Iterator[float], rows: Sequence[int], earlier: Sequence[Trial]
) -> Trial:
    """A trial, measured as far as it is among the best."""
    began = time.perf_counter()
    found: list[float] = []
    try:
        for rung, score in enumerate(scores):
            found.append(score)
            # the start is what all others are compared with
            if number and rung < len(rows) - 1 and not _is_promoted(score, rung, earlier):
                break
    except FusionError as error:  # such as weights with which the merge has NaN or Inf
        if not number:  # what is wrong at the start, in the recipe or in the rows, is wrong everywhere
            raise
        return Trial(number, names, failed=error.message, seconds=round(time.perf_counter() - began, 3))
    seconds = round(time.perf_counter() - began, 3)
    return Trial(number, names, found, list(rows[: len(found)]), len(found) == len(rows), seconds)


def _check_same(trial: Trial, names: dict[str, float], dimensions: Sequence[Dimension]) -> None:
    """Raises if a trial that was kept is not the one that is proposed now; rounding may differ between machines."""
    for dimension in dimensions:
        value = trial.parameters.get(dimension.name, float("inf"))
        if abs(value - names[dimension.name]) > SAME * (dimension.high - dimension.low):
            raise FusionError(
                f"trial {trial.number} was at {dimension.name} = {value:g}, and the search would now try "
                f"{names[dimension.name]:g}: another version of cma made it",
                "install that version again, or begin a new search: --overwrite (overwrite=True in Python)",
            )


def _is_promoted(score: float, rung: int, earlier: Sequence[Trial]) -> bool:
    """Whether a score is among the best 1/`ETA` of the trials with one on as many rows, and of equal ones the first."""
    others = [trial.scores[rung] for trial in earlier if len(trial.scores) > rung]
    return sum(other >= score for other in others) < max(1, (len(others) + 1) // ETA)


__all__ = ["Trials", "row_counts", "search_dimensions"]
