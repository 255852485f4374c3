"""What a search measures a merged model by: the rows of tasks, divided into those that it searches on and those that it
never sees.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from hf_fusion.data import row_contents
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.loop import TaskRows, check_suite, predict_task
from hf_fusion.evaluation.merging import Outputs
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.evaluation.task_metrics import row_scores
from hf_fusion.hub.load import in_memory
from hf_fusion.training.batches import read_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.evaluation.results import Metric

Scores = dict[str, torch.Tensor]
"""Task → the score of each row (N,)."""


class Objective(Protocol):
    """What measures a model; a score is the weighted mean over the tasks, and the higher the better.

    Attributes:
        tasks: all of them, with the number of held-out rows.
        searched: the number of rows to search on.
        held_out: the number of held-out rows.
        weights: task → weight of its score in the mean.
        about: what else the scores depend on, as plain data: trials with other values cannot be compared.
    """

    @property
    def tasks(self) -> Sequence[MeasuredTask]:
        """All of them."""

    @property
    def searched(self) -> int:
        """The number of rows to search on."""

    @property
    def held_out(self) -> int:
        """The number of held-out rows."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the tasks."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What else the scores depend on."""

    def scores(self, first: int, last: int) -> Scores:
        """Scores of the model as it is, on the rows to search on from `first` to `last` (exclusive) of `searched`.

        Each task has the same share of its rows among them, at least one if `first` is 0.
        """

    def held_out_scores(self) -> Scores:
        """Scores of the model as it is, on the held-out rows."""


def mean_score(parts: Sequence[Scores], weights: Mapping[str, float] | None = None) -> float:
    """The mean over tasks of the mean over their rows, which several measurements scored.

    Args:
        parts: the measurements.
        weights: of the tasks; default: equal.
    """
    tasks = dict.fromkeys(task for part in parts for task in part)
    counts = {task: 1.0 if weights is None else weights[task] for task in tasks}
    total = 0.0
    for task in tasks:
        values = torch.cat([part[task] for part in parts if task in part]).double()
        total += counts[task] * float(values.nanmean())  # nan: a row with nothing to compare with
    return total / sum(counts.values())


@dataclass(frozen=True)
class Division:
    """The rows of a search.

    Attributes:
        search: task → the rows to search on, in random order.
        held_out: task → the rows that nothing is chosen on.
    """

    search: dict[str, Dataset]
    held_out: dict[str, Dataset]


def divide_rows(suite: Mapping[str, Dataset], held_out: float, seed: int) -> Division:
    """Divides the rows of each task at random. Rows of equal content are on the same side, in all tasks.

    Args:
        suite: task → rows.
        held_out: share of the rows that is held out.
        seed: of the division.

    Raises:
        FusionError: a task has too few rows.
    """
    check_suite(suite)
    contents = {task: _contents(rows) for task, rows in suite.items()}
    order, chosen = random.Random(seed), set[Hashable]()
    for found in contents.values():
        counts = Counter(found)
        unique = list(counts)
        order.shuffle(unique)
        count = sum(counts[content] for content in unique if content in chosen)  # chosen among the rows of another task
        for content in unique:
            if content not in chosen and count < held_out * len(found):
                chosen.add(content)
                count += counts[content]
    search: dict[str, Dataset] = {}
    rest: dict[str, Dataset] = {}
    for task, rows in suite.items():
        indices = list(range(len(rows)))
        order.shuffle(indices)
        search[task] = rows.select([index for index in indices if contents[task][index] not in chosen])
        rest[task] = rows.select([index for index in indices if contents[task][index] in chosen])
        if not len(search[task]) or not len(rest[task]):
            raise FusionError(
                f"the {len(rows)} rows of {task} cannot be divided into rows to search on and rows to hold out",
                "give more rows of different content",
            )
    return Division(search, rest)


def content_digest(suite: Mapping[str, Dataset]) -> str:
    """SHA-256 of the rows of tasks, all columns of them."""
    from datasets import Image

    found = hashlib.sha256()
    for task, rows in suite.items():
        found.update(task.encode())
        for row in rows.cast_column("image", Image(decode=False)) if "image" in rows.column_names else rows:
            found.update(repr(row).encode())
    return found.hexdigest()


def _contents(rows: Dataset) -> list[Hashable]:
    """The content of each row; rows without any that is known are all different."""
    return row_contents(rows) or list(range(len(rows)))


class RowsObjective:
    """Scores of a merged model on labelled rows, by the head that it has: see `hf_fusion.evaluate`.

    Args:
        model: with its tokenizer or image processor as ``processor``. It is measured as it is at each call.
        division: of the rows.
        metrics: task → "exact" (default), "tokens" or "ranked", for language models.
        batch_size: rows per step, taken in order of length.
        max_length: the longest sequence, in tokens.

    Attributes:
        tasks: see `Objective`.
        searched: see `Objective`.
        held_out: see `Objective`.
        weights: see `Objective`.
        about: see `Objective`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        division: Division,
        *,
        metrics: Mapping[str, str] | None = None,
        batch_size: int = 32,
        max_length: int = 512,
    ) -> None:
        self._expert = replace(in_memory(model, 0), name="the merged model")
        self._batch_size, self._read = batch_size, partial(read_examples, self._expert, max_length=max_length)
        outputs, wanted = Outputs.of(self._expert), metrics or {}
        self._division = division
        self.tasks = [
            MeasuredTask(task, outputs.metric(cast("Metric | None", wanted.get(task))), len(rows))
            for task, rows in division.held_out.items()
        ]
        self.weights = {task.name: 1.0 for task in self.tasks}
        self.searched = sum(map(len, division.search.values()))
        self.held_out = sum(map(len, division.held_out.values()))
        self.about = {"content": content_digest(division.search), "max_length": max_length}
        self._encoded: dict[tuple[str, int, int], TaskRows] = {}

    def scores(self, first: int, last: int) -> Scores:
        """See `Objective`."""
        found = {}
        for task in self.tasks:
            count = len(self._division.search[task.name])
            begin, end = (-(-number * count // self.searched) for number in (first, last))
            if begin < end:
                found[task.name] = self._scored(task, self._division.search[task.name], begin, end)
        return found

    def held_out_scores(self) -> Scores:
        """See `Objective`."""
        return {task.name: self._scored(task, self._division.held_out[task.name], 0, task.n) for task in self.tasks}

    def _scored(self, task: MeasuredTask, rows: Dataset, begin: int, end: int) -> torch.Tensor:
        key = (task.name, begin, end) if rows is self._division.search[task.name] else (task.name, -1, end)
        if key not in self._encoded:  # once for all trials
            part = rows.select(range(begin, end))
            self._encoded[key] = TaskRows.of(task, part, self._read, self._expert.model)
        predictor = ModelPredictor("merged", "fused", self._expert.model)
        found = predict_task([predictor], self._encoded[key], self._batch_size)
        return row_scores(found["merged"], task.metric)


__all__ = ["Division", "Objective", "RowsObjective", "Scores", "divide_rows", "mean_score"]
