"""Share of predictions that equal their reference."""

from typing import Any

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references, one value each.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"accuracy": float(sum(a == b for a, b in pairs)) / len(predictions)}
