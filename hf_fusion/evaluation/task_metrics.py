"""How a task is scored: `METRICS`, and from predictions for its rows to a score with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.intervals import Z95, Score, wilson

if TYPE_CHECKING:
    from hf_fusion.evaluation.predictions import Predictions

RESAMPLES = 500  # of the bootstrap, for metrics that are not means over rows
Reads = Literal["classes", "numbers", "logits", "targets", "tokens", "losses", "ranks", "texts", "embeddings", "maps"]
"""What a metric needs of a model's output for a row: the likeliest class, a regressor's number, all logits; whether all
of the target's tokens are the likeliest ("targets"), the share of them that are ("tokens"), their mean loss ("losses"),
that of every choice ("ranks"), a written text, the embedding of the whole row, or statistics of its pixels ("maps")."""


@dataclass(frozen=True)
class TaskMetric:
    """How a task is scored.

    Attributes:
        reads: what it needs of a model's output.
        of_row: (prediction, reference) → the score of a row, of which the metric is the mean; None where it is none.
        of_all: a key of `hf_fusion.evaluation.metrics.METRIC_SPECS`, for metrics that are not means over rows.
        is_share: every row is right or wrong, so that the interval is Wilson's; of other means it is the normal one.
        bounds: of the metric, which the interval does not leave.
        correction: of the variance over rows: 1 for the unbiased one.
        read: text → what is compared.
    """

    reads: Reads
    of_row: Callable[[Any, Any], float] | None = None
    of_all: str = ""
    is_share: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    correction: int = 0
    read: Callable[[Any], Any] | None = None


def _equal(prediction: object, reference: object) -> float:
    return float(prediction == reference)


def _equal_texts(prediction: str, reference: str) -> float:
    return float(prediction.strip() == reference.strip())


def _squared_error(prediction: float, reference: float) -> float:
    return (prediction - reference) * (prediction - reference)


def _prediction(prediction: float, reference: float) -> float:
    """A score that was computed with the prediction; nan where the row has nothing to compare with."""
    return prediction if reference > 0 else math.nan


def _number(text: str) -> float:
    """A written number; 0 for a text that is not one."""
    try:
        number = float(text.strip())
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


# What a task may be scored by; a new metric is one more row. "exact" and "tokens" need no text to be written: greedy
# decoding gives exactly the target if and only if each of its tokens is the likeliest after those before it.
METRICS = {
    "accuracy": TaskMetric("classes", _equal, is_share=True),
    "mse": TaskMetric("numbers", _squared_error, bounds=(-math.inf, math.inf), correction=1),
    "f1": TaskMetric("classes", of_all="f1"),
    "matthews": TaskMetric("classes", of_all="matthews_correlation"),
    "spearman": TaskMetric("numbers", of_all="spearmanr"),
    "exact": TaskMetric("targets", _equal, is_share=True),
    "ranked": TaskMetric("ranks", _equal, is_share=True),
    "tokens": TaskMetric("tokens", _prediction),
    "perplexity": TaskMetric("losses", of_all="perplexity"),
    "rouge1": TaskMetric("texts", of_all="rouge1"),
    "rouge2": TaskMetric("texts", of_all="rouge2"),
    "rougeL": TaskMetric("texts", of_all="rougeL"),
    "exact_match": TaskMetric("texts", _equal_texts, is_share=True),
    "spearman_text": TaskMetric("texts", of_all="spearmanr", read=_number),
    "agreement": TaskMetric("embeddings", _prediction),  # cosine with the embedding by the task's own expert
    "mean_iou": TaskMetric("maps", of_all="mean_iou"),
    "absolute_error": TaskMetric("maps", _prediction, bounds=(0.0, math.inf)),
    "angle": TaskMetric("maps", _prediction, bounds=(0.0, math.inf)),
}


@dataclass(frozen=True)
class RowsScore(Score):
    """A score with its 95 % interval, and the rows that it is of.

    Attributes:
        n: their number.
        rows: the score of each row, of which the score is the mean; None for a metric that is no such mean.
    """

    n: int
    rows: list[float] | None = None


def row_scores(found: Predictions, metric: str) -> torch.Tensor:
    """The score of each row (N,), of which the metric is the mean; nan where a row has nothing to compare with."""
    of_row = METRICS[metric].of_row
    assert of_row is not None, f"{metric} is not a mean over rows"
    values = [of_row(*pair) for pair in zip(found.predictions, found.references, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def score_of(values: torch.Tensor, metric: str) -> Score:
    """The mean of rows' scores (N,) with its interval.

    Args:
        values: of the rows.
        metric: a key of `METRICS` that is a mean over rows: of shares the interval is Wilson's, else the normal one.
    """

    row, count, numbers = METRICS[metric], len(values), values.double().numpy()
    mean = sum(numbers.tolist()) / count
    if row.is_share:
        return Score(mean, wilson(mean, count))
    half = Z95 * float(numbers.std(ddof=min(row.correction, count - 1))) / math.sqrt(count)
    return Score(mean, (max(row.bounds[0], mean - half), min(row.bounds[1], mean + half)))


def score(found: Predictions, metric: str) -> RowsScore:
    """The score of predictions, of the rows that have something to compare with.

    Shares have Wilson's interval, other means over rows the normal one; of metrics that are not means it is the
    percentile bootstrap's (`RESAMPLES` draws, seed 0).

    Args:
        found: predictions and references.
        metric: a key of `METRICS`.

    Raises:
        FusionError: no row has anything to compare with.
    """
    row, given, right = METRICS[metric], found.predictions, found.references
    if not row.of_all:
        values = row_scores(found, metric)
        values = values[~values.isnan()]
        if not len(values):
            raise FusionError("no row has a reference to compare with")
        mean = score_of(values, metric)
        return RowsScore(mean.score, mean.ci95, len(values), values.tolist())
    from hf_fusion.evaluation.metrics import METRIC_SPECS

    if row.read:
        given, right = [row.read(text) for text in given], [row.read(text) for text in right]
    computed = float(_loaded(row.of_all).compute(predictions=given, references=right)[row.of_all])
    return RowsScore(computed, _bootstrap(METRIC_SPECS[row.of_all].of, given, right), len(given))


@cache
def _loaded(name: str) -> Any:
    from hf_fusion.evaluation.metrics import load_metric

    return load_metric(name)


def _bootstrap(
    of: Callable[[Sequence[Any], Sequence[Any]], float], given: Sequence[Any], right: Sequence[Any]
) -> tuple[float, float]:
    import numpy as np

    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(given), len(given))
        found.append(of([given[row] for row in rows], [right[row] for row in rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
