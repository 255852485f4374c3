"""Share of texts that equal their reference once blanks at both ends are gone."""

from typing import Any

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Share of texts that equal their reference once blanks at both ends are gone."""

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references, one value each.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(sum(a.strip() == b.strip() for a, b in pairs)) / len(predictions)}
