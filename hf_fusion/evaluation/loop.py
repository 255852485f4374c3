"""The loop that every evaluation runs through: predictors × batches of a task → predictions for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.choices import inputs_of, reduction
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.predictors import Batch
from hf_fusion.evaluation.task_metrics import row_scores
from hf_fusion.progress import track
from hf_fusion.training.batches import Examples, batch_indices_by_length, to_model

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.evaluation.predictors import Predictor
    from hf_fusion.evaluation.results import MeasuredTask, Metric

LANGUAGE_HEADS = ("causal-lm", "seq2seq-lm")
Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task as predictors read them.

    Attributes:
        task: which, and how its rows are scored.
        rows: N of them; rows with ``input_ids`` are batched with rows of like length.
        collate: rows → inputs with their labels.
        reduced: predictions for the N rows → the scored ones, if these differ.
        keeps: whether batches are cached for predictors that are measured later.
    """

    task: MeasuredTask
    rows: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    reduced: Callable[[Predictions], Predictions] = lambda found: found
    keeps: bool = False
    _kept: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    def inputs(self, indices: list[int]) -> Any:
        """The inputs of some rows, with their labels."""
        key = tuple(indices)
        if (inputs := self._kept.get(key)) is None:
            inputs = self.collate([self.rows[index] for index in indices])
            if self.keeps:
                self._kept[key] = inputs
        return inputs

    @classmethod
    def of(
        cls, task: MeasuredTask, rows: Dataset, read: Callable[[Dataset], Examples], model: PreTrainedModel
    ) -> TaskRows:
        """Rows of a data set: inputs go to a model's device, in its dtype, once for all predictors.

        Args:
            task: which, and how its rows are scored.
            rows: of the data set; where choices are ranked, the model reads one input for each.
            read: inputs → encoded.
            model: whose device and dtype they get.
        """
        examples = read(inputs_of(rows, task.metric))
        reduced = reduction(rows, task.metric)
        return cls(task, examples.rows, lambda batch: to_model(examples.collate(batch), model), reduced)


def check_suite(suite: Mapping[str, Dataset]) -> None:
    """Checks that there is something to measure on.

    Raises:
        FusionError: the suite has no tasks, or a task has no rows.
    """
    if not suite:
        raise FusionError("the suite has no tasks")
    if empty := [task for task, rows in suite.items() if not len(rows)]:
        raise FusionError(f"the task {empty[0]} has no rows")


def check_names(names: Sequence[str]) -> None:
    """Checks that predictors have distinct names, since scores are stored by name.

    Raises:
        FusionError: naming them.
    """
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise FusionError(f"two predictors have the name {twice[0]!r}", hint="rename one of them")


def metric_of(head: str, wanted: Metric | None) -> Metric:
    """How the rows of a task are scored: what language models predict as wanted ("exact"), classes by accuracy."""
    return wanted or "exact" if head in LANGUAGE_HEADS else "accuracy"


def score_task(
    predictors: Sequence[Predictor],
    data: TaskRows,
    batch_size: int,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Scores every row of a task for every predictor, by a metric that is a mean over rows; see `predict_task`.

    Returns:
        Name → scores of the rows, (N,), on the CPU.
    """
    names = predictors[0].name if len(predictors) == 1 else f"{len(predictors)} predictors"
    title = f"Measuring {names} on {data.task.name}"
    found = predict_task(predictors, data, batch_size, before_batch=before_batch, title=title)
    return {name: row_scores(rows, data.task.metric) for name, rows in found.items()}


@torch.no_grad()
def predict_task(
    predictors: Sequence[Predictor],
    data: TaskRows,
    batch_size: int,
    *,
    before_batch: Callable[[], None] = lambda: None,
    title: str = "",
) -> dict[str, Predictions]:
    """Predictions of every predictor for every row of a task; a batch is collated once for all of them.

    Under `accelerate launch` every process must call it: they share the batches, and each gets all predictions.

    Args:
        predictors: with distinct names.
        data: the task's rows.
        batch_size: rows per step.
        before_batch: called before each batch, for what predictors share within one.
        title: of the progress bar; without one no progress is shown.

    Returns:
        Name → predictions for the rows, in their order.

    Raises:
        FusionError: two predictors have one name.
    """
    check_names([predictor.name for predictor in predictors])

    def run(indices: list[int]) -> tuple[list[int], dict[str, Predictions]]:
        inputs = data.inputs(indices)
        before_batch()
        batch = Batch(data.task, indices, inputs)
        return indices, {predictor.name: predictor.predict(batch) for predictor in predictors}

    found: dict[str, list[tuple[int, Any, Any]]] = {predictor.name: [] for predictor in predictors}
    for indices, predicted in run_batches(list(batch_indices_by_length(data.rows, batch_size)), run, title):
        for name, batch in predicted.items():
            found[name] += zip(indices, batch.predictions, batch.references, strict=True)
    return {name: data.reduced(_ordered(rows)) for name, rows in found.items()}


def _ordered(rows: list[tuple[int, Any, Any]]) -> Predictions:
    rows.sort(key=lambda row: row[0])
    return Predictions([predicted for _, predicted, _ in rows], [reference for _, _, reference in rows])


def run_batches(batches: Sequence[Given], run: Callable[[Given], Found], title: str = "") -> list[Found]:
    """Runs a function on each batch; under `accelerate launch` processes share the batches, and each gets all results.

    Args:
        batches: the same in every process.
        run: a batch → its result, on the CPU.
        title: of the progress bar; without one no progress is shown.
    """
    state = PartialState()
    indices = range(state.process_index, len(batches), state.num_processes)
    found = [(index, run(batches[index])) for index in (track(indices, title) if title else indices)]
    if state.num_processes > 1:
        found = sorted(gather_object(found), key=lambda pair: pair[0])
    return [result for _, result in found]
