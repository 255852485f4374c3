"""What a search found, and what that gained on rows that it did not see."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.evaluation.intervals import Z95, Score, mean_of, wilson
from hf_fusion.evaluation.scoring import lead_of
from hf_fusion.io.saving import write_file
from hf_fusion.models.fused_html import table_of_rows
from hf_fusion.search.trials import Trial

if TYPE_CHECKING:
    import torch

    from hf_fusion.evaluation.results import MeasuredTask
    from hf_fusion.recipe import Recipe

BEST_FILE = "best.yaml"
REPORT_FILE = "search.json"
MEAN = "mean"


@dataclass(frozen=True)
class Gain:
    """What the best recipe gains on the held-out rows of a task, or in the mean of all tasks.

    Attributes:
        task: its name, or "mean".
        n: held-out rows.
        metric: what the scores are; "" for the mean.
        start: score of the first trial's recipe.
        best: score of the best recipe.
        gain: mean difference on the same rows, with its 95 % interval.
    """

    task: str
    n: int
    metric: str
    start: Score
    best: Score
    gain: Score

    def row(self) -> dict[str, str]:
        """For tables, in %."""
        low, high = self.gain.ci95
        gain = f"{100 * self.gain.score:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        return {"task": self.task, "n": str(self.n), "start": str(self.start), "best": str(self.best), "gain": gain}


@dataclass(frozen=True)
class SearchReport:
    """The result of a search.

    Attributes:
        folder: of ``best.yaml``, ``trials.jsonl``, ``search.json`` and ``trials.png``.
        recipe: the best recipe, with pinned models.
        trials: all of them, in order.
        best: the trial with the highest score on all rows that were searched on.
        searched: number of rows that were searched on.
        held_out: number of rows that were held out.
        gains: on the held-out rows: of each task, then the mean of the tasks.
    """

    folder: Path
    recipe: Recipe
    trials: list[Trial]
    best: Trial
    searched: int
    held_out: int
    gains: list[Gain]

    @property
    def gain(self) -> Score:
        """The mean gain over the tasks on the held-out rows, with its 95 % interval."""
        return self.gains[-1].gain

    def table(self) -> list[dict[str, str]]:
        """The gains as rows, in %."""
        return [gain.row() for gain in self.gains]

    def save(self) -> None:
        """Writes the best recipe and the report into the folder."""
        self.recipe.save(self.folder / BEST_FILE)
        content = {
            "trials": len(self.trials),
            "searched_rows": self.searched,
            "held_out_rows": self.held_out,
            "start": asdict(self.trials[0]),
            "best": asdict(self.best),
            "held_out": [asdict(gain) for gain in self.gains],
        }
        write_file(self.folder / REPORT_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _repr_html_(self) -> str:
        caption = f"% on {self.held_out:,} held-out rows, after a search on {self.searched:,} others"
        return f"<pre>{escape(self.recipe.to_yaml())}</pre>{table_of_rows(self.table(), caption, right=True)}"


def gains_of(
    tasks: Sequence[MeasuredTask], start: Mapping[str, torch.Tensor], best: Mapping[str, torch.Tensor]
) -> list[Gain]:
    """The gains of one model over another on the same rows.

    Args:
        tasks: what was measured.
        start: task → scores of the rows (N,) of the first model; nan where a row has nothing to compare with.
        best: the same of the other.

    Returns:
        A gain for each task, then that of the mean.
    """
    pairs = {}
    for task in tasks:
        first, other = start[task.name], best[task.name]
        counted = ~(first.isnan() | other.isnan())
        pairs[task.name] = (first[counted], other[counted])
    found = []
    for task in tasks:
        first, other = pairs[task.name]
        scores = (_score(first), _score(other), lead_of([other], [first]))
        found.append(Gain(task.name, len(first), task.metric, *scores))
    lead = lead_of([pair[1] for pair in pairs.values()], [pair[0] for pair in pairs.values()])
    means = (mean_of([gain.start for gain in found]), mean_of([gain.best for gain in found]), lead)
    return [*found, Gain(MEAN, sum(gain.n for gain in found), "", *means)]


def _score(values: torch.Tensor) -> Score:
    """The mean of rows' scores (N,): of shares with Wilson's interval, else with the normal one."""
    numbers = values.double()
    mean = float(numbers.mean())
    if bool(((numbers == 0) | (numbers == 1)).all()):
        return Score(mean, wilson(mean, len(numbers)))
    half = Z95 * float(numbers.std(correction=0)) / math.sqrt(len(numbers))
    return Score(mean, (mean - half, mean + half))


__all__ = ["BEST_FILE", "REPORT_FILE", "Gain", "SearchReport", "gains_of"]
