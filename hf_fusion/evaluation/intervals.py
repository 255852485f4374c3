"""A mean with its interval, and the mean of several; plain numbers, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # the normal distribution's quantile of 97.5 %


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval."""

    score: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return f"{100 * self.score:.1f} ({round(100 * self.ci95[0])} to {round(100 * self.ci95[1])})"


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share measured on n examples (Wilson, 1927)."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean of independent scores, with their distances to the ends of the intervals added in quadrature.

    That is MOVER (Zou and Donner, Statistics in Medicine 2008): for one score it gives that score's own interval, and
    it keeps a width where all rows of a task are right or wrong.
    """
    count = len(scores)
    mean = sum(s.score for s in scores) / count
    below = math.sqrt(sum((s.score - s.ci95[0]) ** 2 for s in scores)) / count
    above = math.sqrt(sum((s.ci95[1] - s.score) ** 2 for s in scores)) / count
    return Score(mean, (mean - below, mean + above))
