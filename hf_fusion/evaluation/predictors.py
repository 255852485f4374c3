"""What can be measured: fused models, experts and baselines behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.training.batches import score_rows, to_model


@dataclass(frozen=True)
class Batch:
    """Rows of one task.

    Attributes:
        task: which, and how its rows are scored.
        indices: indices of the rows in the task's data, B of them.
        inputs: of the B rows, with ``labels``.
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

    def score(self, batch: Batch) -> torch.Tensor:
        """The score of each row of a batch, (B,)."""
        ...


@dataclass(frozen=True)
class ModelPredictor:
    """A model that predicts by one forward.

    Attributes:
        name, kind: see `Predictor`.
        model: gives ``logits``.
        prepare: batch → the model's inputs with labels; by default those of the batch where the model is.
        within: batch → the context that the forward runs in.
        cost: see `Predictor`.
    """

    name: str
    kind: str
    model: Any
    prepare: Callable[[Batch], Mapping[str, Any]] | None = None
    within: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext()
    cost: float | None = None

    def score(self, batch: Batch) -> torch.Tensor:
        """See `Predictor`."""
        inputs = self.prepare(batch) if self.prepare else to_model(batch.inputs, self.model)
        with self.within(batch):
            return score_rows(self.model, inputs, batch.task.metric)


@dataclass(frozen=True)
class OutputPredictor:
    """Predictions from expert outputs that were collected before, see `training.outputs`.

    Attributes:
        name, kind: see `Predictor`.
        cost: mean share of the cost of querying every expert.
        scores: of all N rows, (N,).
    """

    name: str
    kind: str
    cost: float
    scores: torch.Tensor

    def score(self, batch: Batch) -> torch.Tensor:
        """See `Predictor`."""
        return self.scores[batch.indices]


@dataclass(frozen=True)
class TextPredictor:
    """A model that writes texts, which are compared with their targets but for blanks at both ends.

    Attributes:
        name, kind: see `Predictor`.
        cost: mean share of the cost of querying every expert.
        generate: prompts → texts.
    """

    name: str
    kind: str
    cost: float
    generate: Callable[[Sequence[str]], list[str]]

    def score(self, batch: Batch) -> torch.Tensor:
        """See `Predictor`."""
        texts = self.generate(batch.inputs["prompts"])
        targets = batch.inputs["targets"]
        return torch.tensor([text.strip() == target.strip() for text, target in zip(texts, targets, strict=True)])
