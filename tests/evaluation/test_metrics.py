"""The package's metrics, loaded as `evaluate` loads them."""

from __future__ import annotations

import math
from pathlib import Path

import evaluate
import pytest

import hf_fusion.evaluation.metrics


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "predictions", "references", "score"),
    [
        ("accuracy", [1, 2, 3, 4], [1, 2, 0, 4], 0.75),
        ("mse", [1.0, 2.0], [0.0, 4.0], 2.5),
        ("exact_match", ["a ", "b"], ["a", "c"], 0.5),
        ("f1", [1, 1, 0, 1], [1, 0, 0, 1], 0.8),  # precision 2/3, recall 1
        ("f1", [0, 1, 2, 2], [0, 1, 2, 1], (1 + 2 / 3 + 2 / 3) / 3),
        ("matthews_correlation", [1, 1, 0, 0], [1, 0, 0, 0], 3**-0.5),  # (1·2 - 1·0) / √(2·1·3·2)
        ("matthews_correlation", [1, 1, 1], [1, 0, 1], 0.0),
        ("spearmanr", [1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 4.0, 3.0], 0.8),  # 1 - 6 · 2 / (4 · 15)
        ("spearmanr", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ("rougeL", ["the cat sat"], ["the cat ran away"], 4 / 7),  # precision 2/3, recall 2/4
        ("rouge2", ["the cat sat"], ["the cat ran away"], 0.4),
        ("mean_iou", [[1, 0, 3], [2, 0, 0]], [[2, 0, 4], [4, 0, 1]], (1 / 2 + 3 / 5) / 2),  # the second never occurs
        ("perplexity", [math.log(2.0), math.log(8.0)], [3.0, 1.0], 2.0**1.5),
    ],
)
def test_metrics_load_by_path(name, predictions, references, score):
    metric = evaluate.load(str(Path(hf_fusion.evaluation.metrics.__file__)), name)
    assert metric.compute(predictions=predictions, references=references) == {name: pytest.approx(score)}
