"""What the suites of every kind have in common: rows of tasks, clean or corrupted, for testing or for fitting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_fusion.bench.candidates import FIT, TEST, Prepared
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.corruptions import corrupted
from hf_fusion.bench.rows import Rows, task_rows
from hf_fusion.bench.suite import Suite
from hf_fusion.evaluation.choices import inputs_of, reduction
from hf_fusion.evaluation.loop import TaskRows, predict_task
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.predictors import OutputPredictor
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.evaluation.task_metrics import METRICS, Reads

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.training.batches import Examples

MAX_LENGTH = 512  # of texts, in tokens
ROWS_COUNTED = 8  # whose multiplications are counted
Shape = Sequence[int]


class TaskSetup:
    """What the methods of a suite share: its loaded experts, which a subclass adds, and the rows of its tasks.

    Args:
        suite: of any kind.
        data_dir: where ``data:`` sources lie.
        limit: test rows of each task.
        tuned_on: rows of each task that parameters are tuned on: from `Rows.fit`.
        batch_size: rows per batch.
        device: where models run.
        allow_pickle: also read experts that have no safetensors.

    Attributes:
        given: all of these, to make the setup of another kind.
        kind: of the suites whose rows and experts it loads; a subclass names it.
        kinds: kind → the class of its setups, once it is imported.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[TaskSetup]]] = {}

    def __init_subclass__(cls, kind: str) -> None:
        super().__init_subclass__()
        cls.kind = kind
        TaskSetup.kinds[kind] = cls

    def __init__(
        self, suite: Suite, data_dir: Path | None, limit: int, tuned_on: int, batch_size: int = 16, device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        self.suite, self.batch_size, self.device = suite, batch_size, device
        self._others: dict[str, TaskSetup] = {}
        self.given = (suite, data_dir, limit, tuned_on, batch_size, device, allow_pickle)
        self._limits = {TEST: limit, FIT: tuned_on}
        self.rows: Callable[[str], Rows] = cache(partial(task_rows, suite, data_dir=data_dir))

    def of_kind(self, kind: str) -> TaskSetup:
        """The same experts and rows as the methods for suites of another kind take them; made once.

        Args:
            kind: see `Suite`.
        """
        if kind == self.kind:
            return self
        if kind not in self._others:
            self._others[kind] = TaskSetup.kinds[kind](*self.given)
        return self._others[kind]

    def sample(self, task: str, corruption: str = CLEAN, split: str = TEST) -> Dataset:
        """A random sample of a task's rows, at most as many as the run allows; always the same one."""
        rows = getattr(self.rows(task), split)
        rows = rows.shuffle(seed=0).select(range(min(self._limits[split], len(rows))))
        return corrupted(rows, corruption)

    def inputs_of(self, task: str, rows: Dataset) -> Dataset:
        """The inputs that rows become: one for each choice where choices are ranked, else the rows themselves."""
        return inputs_of(rows, self.suite.tasks[task].metric)

    def predict(self, prepared: Prepared) -> Predictions:
        """Predictions for rows, through the loop of every evaluation."""
        with prepared.within():
            [found] = predict_task([prepared.predictor], prepared.rows, self.batch_size).values()
        return found

    def encoded(self, task: str, rows: Dataset, read: Examples) -> TaskRows:
        """Rows of a task as a predictor reads them: batches where models are, kept for the next predictor.

        Args:
            task: one of the suite's.
            rows: of the task.
            read: what `inputs_of` makes of them, encoded.
        """
        reduced = reduction(rows, self.suite.tasks[task].metric)
        return TaskRows(self._measured(task, rows), read.rows, self.collate(read), reduced, keeps=True)

    def collate(self, read: Examples) -> Callable[[list[Any]], dict[str, Any]]:
        """Encoded rows → inputs where the models are."""
        return lambda rows: on_device(read.collate(rows), self.device)

    def known(self, task: str, found: Predictions) -> Prepared:
        """Predictions that are known already, as those of a predictor."""
        count = len(found.predictions)
        rows = TaskRows(self._measured(task, [None] * count), [{}] * count, lambda rows: {})
        return Prepared(OutputPredictor("known", "baseline", 1.0, found), rows)

    def _measured(self, task: str, rows: Sized) -> MeasuredTask:
        return MeasuredTask(task, self.suite.tasks[task].metric, len(rows), self.suite.owner(task))

    def prepared_expert(self, expert: int, task: str, corruption: str, split: str) -> Prepared:
        """One expert, and the rows that it predicts, of any task."""
        raise NotImplementedError

    def expert_predictions(self, expert: int, task: str, corruption: str, split: str) -> Predictions:
        """Predictions of an expert for rows of any task."""
        return self.predict(self.prepared_expert(expert, task, corruption, split))

    def reads(self, task: str) -> Reads:
        """What a task's metric needs of a model's output."""
        return METRICS[self.suite.tasks[task].metric].reads


def on_device(inputs: Mapping[str, Any], device: str | torch.device) -> dict[str, Any]:
    """A batch where a model is."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def _attention(query: Shape, key: Shape, value: Shape, /, *_: object, **__: object) -> int:
    """Operations of attention on shapes (B, H, T, d): QKᵀ, and its product with V."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _added(into: Shape, left: Shape, right: Shape, /, *_: object, **__: object) -> int:
    """Operations of a product of shapes (…, m, k) and (…, k, n)."""
    return 2 * math.prod(left) * right[-1]


# products that the counter does not know by itself
_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.addmm_: _added,
    _ATEN.baddbmm_: _added,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def multiplications(call: Callable[[], Any]) -> int:
    """The operations of a call's products: each multiplication counts twice, with its addition, as is usual."""
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        call()
    return int(counter.get_total_flops())
