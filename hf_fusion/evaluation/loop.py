"""The loop that every evaluation runs through: predictors × batches of a task → a score for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.evaluation.predictors import Batch
from hf_fusion.progress import track
from hf_fusion.training.batches import Examples, like_lengths

if TYPE_CHECKING:
    from hf_fusion.evaluation.predictors import Predictor


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task as predictors read them.

    Attributes:
        task: its name.
        metric: how rows are scored, see `hf_fusion.evaluation.scoring`.
        rows: N of them; rows with ``input_ids`` are batched with rows of like length.
        collate: rows → inputs with their labels.
    """

    task: str
    metric: str
    rows: Any
    collate: Callable[[list[Any]], Any]

    @classmethod
    def of(cls, task: str, metric: str, examples: Examples, device: Any = None) -> TaskRows:
        """Rows that were encoded for an expert.

        Args:
            device: where inputs go, once for all predictors; by default they stay on the CPU.
        """

        def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
            return {name: value.to(device) for name, value in examples.collate(rows).items()}

        return cls(task, metric, examples.rows, examples.collate if device is None else collate)


@torch.no_grad()
def score_task(
    predictors: Sequence[Predictor],
    data: TaskRows,
    batch_size: int,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Scores every row of a task for every predictor; a batch is collated once for all of them.

    Args:
        predictors: with names of their own.
        data: the task's rows.
        batch_size: rows a step.
        before_batch: called before each batch, for what predictors share within one.

    Returns:
        Name → scores of the rows, (N,), on the CPU.
    """
    count = len(data.rows)
    names = predictors[0].name if len(predictors) == 1 else f"{len(predictors)} predictors"
    found: dict[str, torch.Tensor] = {}
    for indices in track(list(like_lengths(data.rows, batch_size)), f"Measuring {names} on {data.task}"):
        inputs = data.collate([data.rows[index] for index in indices])
        before_batch()
        for predictor in predictors:
            scores = predictor.score(Batch(data.task, data.metric, indices, inputs)).cpu()
            scores = scores if scores.dtype == torch.float64 else scores.float()
            found.setdefault(predictor.name, torch.zeros(count, dtype=scores.dtype))[indices] = scores
    return found
