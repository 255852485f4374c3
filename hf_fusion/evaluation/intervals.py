"""A mean with its interval, and the mean of several; plain numbers, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval."""

    score: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return f"{100 * self.score:.1f} ({round(100 * self.ci95[0])} to {round(100 * self.ci95[1])})"


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean of independent scores; each end of its interval is as far as theirs are together, squared and added.

    That is MOVER (Zou and Donner, Statistics in Medicine 2008): for one score it gives that score's own interval, and
    it keeps a width where all rows of a task are right or wrong.
    """
    count = len(scores)
    mean = sum(s.score for s in scores) / count
    below = math.sqrt(sum((s.score - s.ci95[0]) ** 2 for s in scores)) / count
    above = math.sqrt(sum((s.ci95[1] - s.score) ** 2 for s in scores)) / count
    return Score(mean, (mean - below, mean + above))
