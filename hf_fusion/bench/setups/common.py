"""What the suites of every kind have in common: rows of tasks, clean or corrupted, for testing or for fitting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_fusion.bench.choices import likeliest, spread
from hf_fusion.bench.corruptions import corrupted
from hf_fusion.bench.rows import Rows, task_rows
from hf_fusion.bench.suite import Suite
from hf_fusion.bench.systems import CLEAN, FIT, TEST
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.task_metrics import METRICS
from hf_fusion.training.batches import Examples, batch_indices_by_length

if TYPE_CHECKING:
    from datasets import Dataset

MAX_LENGTH = 512  # of texts, in tokens
ROWS_COUNTED = 8  # whose multiplications are counted
Batch = tuple[list[int], dict[str, Any]]
Shape = Sequence[int]


class TaskSetup:
    """What the methods of a suite share: its loaded experts, which a subclass adds, and the rows of its tasks.

    Args:
        suite: of any kind.
        data_dir: where ``data:`` sources lie.
        limit: test rows of each task.
        tuned_on: rows of each task that parameters are tuned on: from `Rows.fit`.
        batch_size: rows at once.
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
        return spread(rows) if self._ranks(task) else rows

    def reduced(self, predictions: Predictions, task: str, rows: Dataset) -> Predictions:
        """Predictions for `inputs_of` rows, reduced to one for each row."""
        return likeliest(rows, predictions.predictions) if self._ranks(task) else predictions

    def _ranks(self, task: str) -> bool:
        return METRICS[self.suite.tasks[task].metric].reads == "ranks"

    def collated(self, read: Examples) -> list[Batch]:
        """(row indices, inputs with labels) each, rows of similar length together, on the device of the models."""
        return [
            (indices, on_device(read.collate([read.rows[index] for index in indices]), self.device))
            for indices in batch_indices_by_length(read.rows, self.batch_size)
        ]


def on_device(inputs: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """A batch where a model is."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def _attention(query: Shape, key: Shape, value: Shape, /, *_: object, **__: object) -> int:
    """Of the shapes (B, H, T, d): QKᵀ and its product with V."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _added(into: Shape, left: Shape, right: Shape, /, *_: object, **__: object) -> int:
    """Of the shapes (…, m, k) and (…, k, n)."""
    return 2 * math.prod(left) * right[-1]


# products that the counter does not know by itself
_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.addmm_: _added,
    _ATEN.baddbmm_: _added,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def multiplications(call: Callable[[], Any]) -> int:
    """What a call multiplies, counted twice, as is the custom: once with the addition."""
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        call()
    return int(counter.get_total_flops())
