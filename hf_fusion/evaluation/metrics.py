"""A metric module for 🤗 evaluate that travels with the package, since the Hub's cannot be fetched everywhere.

``evaluate.load("…/hf_fusion/evaluation/metrics.py", "accuracy")`` or, shorter, ``load_metric("accuracy")``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import evaluate

from hf_fusion.extras import refuse_missing


@dataclass(frozen=True)
class MetricSpec:
    """How predictions are scored against their references.

    Attributes:
        dtype: of both.
        description: of the metric.
        of: predictions, references → the metric.
        is_list: each prediction and each reference is a list.
    """

    dtype: str
    description: str
    of: Callable[[Sequence[Any], Sequence[Any]], float]
    is_list: bool = False


def _mean(pair: Callable[[Any, Any], float], predictions: Sequence[Any], references: Sequence[Any]) -> float:
    total = sum(pair(prediction, reference) for prediction, reference in zip(predictions, references, strict=True))
    return float(total) / len(predictions)


def _f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    average = "binary" if {*predictions, *references} <= {0, 1} else "macro"
    return float(f1_score(references, predictions, average=average, zero_division=0))


def _matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def _spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return 0.0  # one answer to everything has no ranks, and no merit
    return float(spearmanr(predictions, references).statistic)


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)  # as Google's and evaluate's own
    return _mean(lambda a, b: scorer.score(b, a)[kind].fmeasure, predictions, references)


def _mean_iou(shared: Sequence[Sequence[int]], covered: Sequence[Sequence[int]]) -> float:
    import numpy as np

    both, either = np.asarray(shared).sum(0), np.asarray(covered).sum(0)  # (C,)
    occurs = either > 0
    return float((both[occurs] / either[occurs]).mean())


def _equal(a: object, b: object) -> bool:
    return a == b


# A new metric is one more row.
METRIC_SPECS = {
    "accuracy": MetricSpec("int64", "Share of predictions that equal their reference.", partial(_mean, _equal)),
    "mse": MetricSpec("float64", "Mean squared difference.", partial(_mean, lambda a, b: (a - b) ** 2)),
    "exact_match": MetricSpec(
        "string",
        "Share of texts that equal their reference, ignoring whitespace at both ends.",
        partial(_mean, lambda a, b: a.strip() == b.strip()),
    ),
    "f1": MetricSpec("int64", "F1 of class 1; with more than two classes, the unweighted mean over the classes.", _f1),
    "matthews_correlation": MetricSpec("int64", "Matthews' correlation of classes.", _matthews),
    "spearmanr": MetricSpec("float64", "Spearman's rank correlation.", _spearman),
    "rouge1": MetricSpec("string", "ROUGE-1, F-measure, stemmed.", partial(_rouge, "rouge1")),
    "rouge2": MetricSpec("string", "ROUGE-2, F-measure, stemmed.", partial(_rouge, "rouge2")),
    "rougeL": MetricSpec("string", "ROUGE-L, F-measure, stemmed.", partial(_rouge, "rougeL")),
    "perplexity": MetricSpec(
        "float64",
        "exp of the mean of predictions, which are losses in nats per token; references are their tokens.",
        lambda losses, tokens: math.exp(sum(a * n for a, n in zip(losses, tokens, strict=True)) / sum(tokens)),
    ),
    "mean_iou": MetricSpec(
        "int64",
        "Mean over the classes that occur of intersection / union; predictions are each row's intersections, a number "
        "of pixels for each class, references its unions.",
        _mean_iou,
        is_list=True,
    ),
}


class PackagedMetric(evaluate.Metric):
    """One of `METRIC_SPECS`, chosen by the configuration's name."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRIC_SPECS:
            raise ValueError(f"unknown metric {self.config_name!r}; use one of {', '.join(METRIC_SPECS)}")
        spec = METRIC_SPECS[self.config_name]
        value = datasets.Value(spec.dtype)
        feature = datasets.Sequence(value) if spec.is_list else value
        return evaluate.MetricInfo(
            description=spec.description,
            citation="",
            inputs_description="predictions and references, one value or list each.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        try:
            return {self.config_name: METRIC_SPECS[self.config_name].of(predictions, references)}
        except ImportError as error:
            refuse_missing(error, f"the metric {self.config_name}", extra="bench")
            raise


def load_metric(name: str) -> evaluate.Metric:
    """One of `METRIC_SPECS` through ``evaluate.load``."""
    return evaluate.load(__file__, name)
