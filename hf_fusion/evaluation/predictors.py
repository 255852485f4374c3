"""What can be measured: fused models, experts and baselines behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hf_fusion.evaluation.predictions import Predictions, predict_batch
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.evaluation.task_metrics import METRICS, Reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_fusion.types import ForwardModel


@dataclass(frozen=True)
class Batch:
    """Rows of one task.

    Attributes:
        task: which, and how its rows are scored.
        indices: indices of the rows in the task's data, B of them.
        inputs: of the B rows, with ``labels``, on the models' device.
    """

    task: MeasuredTask
    indices: list[int]
    inputs: Mapping[str, Any]


class Predictor(Protocol):
    """What scores rows: one line of a comparison.

    Attributes:
        name: what tables call it; unique within a comparison.
        kind: see `hf_fusion.evaluation.results.PredictorScores`.
        cost: mean share of the cost of querying every expert; None where it is not counted.
    """

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def kind(self) -> str:
        """What it is in the comparison."""
        ...

    @property
    def cost(self) -> float | None:
        """Its mean cost."""
        ...

    def predict(self, batch: Batch) -> Predictions:
        """A prediction for each row of a batch, and what it is compared with."""
        ...


@dataclass(frozen=True)
class ModelPredictor:
    """A model that predicts by one forward.

    Attributes:
        name: see `Predictor`.
        kind: see `Predictor`.
        model: called with the inputs; gives ``logits``.
        prepare: batch → the model's inputs with labels; by default those of the batch.
        within: batch → the context that the forward runs in.
        cost: see `Predictor`.
        reads: what is read of the outputs; by default what the task's metric needs.
        tokenizer: of texts that the model writes.
    """

    name: str
    kind: str
    model: ForwardModel
    prepare: Callable[[Batch], Mapping[str, Any]] = lambda batch: batch.inputs
    within: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext()
    cost: float | None = None
    reads: Reads | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def predict(self, batch: Batch) -> Predictions:
        """See `Predictor`."""
        inputs, reads = self.prepare(batch), self.reads or METRICS[batch.task.metric].reads
        with self.within(batch):
            return predict_batch(self.model, inputs, reads, self.tokenizer)


@dataclass(frozen=True)
class OutputPredictor:
    """Predictions that were made before, such as from the outputs of experts (`training.outputs`).

    Attributes:
        name: see `Predictor`.
        kind: see `Predictor`.
        cost: mean share of the cost of querying every expert.
        found: for all N rows.
    """

    name: str
    kind: str
    cost: float
    found: Predictions

    def predict(self, batch: Batch) -> Predictions:
        """See `Predictor`."""
        return self.found.of_rows(batch.indices)


@dataclass(frozen=True)
class TextPredictor:
    """A model that writes texts.

    Attributes:
        name: see `Predictor`.
        kind: see `Predictor`.
        cost: mean share of the cost of querying every expert.
        generate: prompts → texts.
    """

    name: str
    kind: str
    cost: float
    generate: Callable[[Sequence[str]], list[str]]

    def predict(self, batch: Batch) -> Predictions:
        """See `Predictor`."""
        return Predictions(self.generate(batch.inputs["prompts"]), batch.inputs["targets"])
