"""The metrics that the package carries, through evaluate's own loader."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest

import hf_fusion.metrics


@pytest.mark.parametrize(
    ("name", "predictions", "references", "score"),
    [
        ("accuracy", [1, 2, 3, 4], [1, 2, 0, 4], 0.75),
        ("mse", [1.0, 2.0], [0.0, 4.0], 2.5),
        ("exact_match", ["a ", "b"], ["a", "c"], 0.5),
    ],
)
def test_metrics_load_by_path(name, predictions, references, score):
    metric = evaluate.load(str(Path(hf_fusion.metrics.__file__)), name)
    assert metric.compute(predictions=predictions, references=references) == {name: score}
