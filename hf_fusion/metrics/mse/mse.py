"""Mean squared difference between predictions and references."""

from typing import Any

import datasets
import evaluate


class Mse(evaluate.Metric):
    """Mean squared difference between predictions and references."""

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references, one value each.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"mse": float(sum((a - b) ** 2 for a, b in pairs)) / len(predictions)}
