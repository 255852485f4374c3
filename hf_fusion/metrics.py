"""A metric module for 🤗 evaluate that travels with the package, since the Hub's cannot be fetched everywhere.

``evaluate.load("…/hf_fusion/metrics.py", "accuracy")`` or, shorter, ``load_metric("accuracy")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate


@dataclass(frozen=True)
class Score:
    """How one prediction is scored against its reference: the metric is the mean over all pairs."""

    dtype: str
    description: str
    of: Callable[[Any, Any], float]


# A new metric is one more row.
SCORES = {
    "accuracy": Score("int64", "Share of predictions that equal their reference.", lambda a, b: a == b),
    "mse": Score("float64", "Mean squared difference.", lambda a, b: (a - b) ** 2),
    "exact_match": Score(
        "string",
        "Share of texts that equal their reference but for blanks at both ends.",
        lambda a, b: a.strip() == b.strip(),
    ),
}


class MeanScore(evaluate.Metric):
    """Mean of one of `SCORES`, chosen by the configuration's name."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in SCORES:
            raise ValueError(f"unknown metric {self.config_name!r}; there are {', '.join(SCORES)}")
        score = SCORES[self.config_name]
        feature = datasets.Value(score.dtype)
        return evaluate.MetricInfo(
            description=score.description,
            citation="",
            inputs_description="predictions and references, one value each.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        total = sum(SCORES[self.config_name].of(prediction, reference) for prediction, reference in pairs)
        return {self.config_name: float(total) / len(predictions)}


def load_metric(name: str) -> evaluate.Metric:
    """One of `SCORES` through ``evaluate.load``."""
    return evaluate.load(__file__, name)
