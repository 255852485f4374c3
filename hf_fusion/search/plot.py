"""The picture of a search: what each trial scored, and the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.evaluation.plots import BLUE, GREEN, GREY, ORANGE, blank_figure, plain_axes, save_figure

if TYPE_CHECKING:
    from hf_fusion.search.trials import Trial

LATER = [(GREY, "o", 4), (GREEN, "s", 5), (ORANGE, "^", 5)]
"""Colour, marker and size of trials that were not measured on all rows, from the fewest rows on."""
COMPLETE = (BLUE, "D", 6)


def plot_trials(trials: Sequence[Trial], path: str | Path) -> Path:
    """Draws the last score of each trial, marked by the rows that it was measured on, and the best on all rows so far.

    Args:
        trials: in order; those that failed are left out.
        path: the picture; the ending decides the format.

    Raises:
        FusionError: matplotlib is not installed.
    """
    figure = blank_figure(8, 4.2)
    axes = figure.add_subplot()
    counts = sorted({trial.rows[-1] for trial in trials if trial.rows})
    for index, count in enumerate(counts):
        shown = [trial for trial in trials if trial.rows and trial.rows[-1] == count]
        is_all = any(trial.complete for trial in shown)
        colour, marker, size = COMPLETE if is_all else LATER[min(index, len(LATER) - 1)]
        points = [trial.number for trial in shown], [trial.scores[-1] for trial in shown]
        label = f"on {count:,} rows" if not is_all else f"on all {count:,} rows"
        axes.plot(*points, marker, color=colour, markersize=size, label=label, zorder=3 + index)
    best: list[tuple[int, float]] = []
    for trial in trials:
        if trial.complete and (not best or trial.scores[-1] > best[-1][1]):
            best.append((trial.number, trial.scores[-1]))
    if best:
        steps = [*best, (trials[-1].number, best[-1][1])]
        axes.step(*zip(*steps, strict=True), where="post", color=BLUE, linewidth=1.2, alpha=0.7, label="best so far")
    axes.set_xlabel("trial", loc="left")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Score of each trial on the rows that were searched on", loc="left", fontsize=11, pad=12)
    axes.legend(frameon=False, fontsize=9)
    plain_axes(axes)
    return save_figure(figure, path)


__all__ = ["plot_trials"]
