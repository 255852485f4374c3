"""Compares predictors by the scores of rows: their scores on tasks, means and leads, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_fusion.evaluation.intervals import Z95, Score, mean_of
from hf_fusion.evaluation.machine import machine
from hf_fusion.evaluation.results import FUSED, MeasuredTask, PredictorScores, Results
from hf_fusion.evaluation.task_metrics import score_of


def lead_of(ahead: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Score:
    """Mean over tasks of the mean difference of two predictors on the same rows, each (N_task,), with its interval."""
    differences = [(a - b).double() for a, b in zip(ahead, other, strict=True)]
    mean = sum(float(d.mean()) for d in differences) / len(differences)
    variance = sum(float(d.var(correction=0)) / len(d) for d in differences) / len(differences) ** 2
    half = Z95 * math.sqrt(variance)
    return Score(mean, (mean - half, mean + half))


def compare(
    tasks: Sequence[MeasuredTask],
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    kinds: Mapping[str, str],
    costs: Mapping[str, float] | None = None,
    **about: Any,
) -> Results:
    """Scores with their intervals, the predictors' means, and how far the fused model is ahead of each.

    Args:
        tasks: what was measured on.
        scores: predictor → task → scores of its rows (N,).
        kinds: predictor → kind, see `PredictorScores`; default is "oracle". The first "fused" one leads.
        costs: predictor → its mean cost, where it is counted.
        about: further fields of `Results`.
    """
    leader = next((name for name in scores if kinds.get(name) == FUSED), None)
    results = Results(list(tasks), [], machine=machine(), **about)
    for name, rows in scores.items():
        scored = {task.name: score_of(rows[task.name], task.metric) for task in tasks if task.name in rows}
        predictor = PredictorScores(name, kinds.get(name, "oracle"), scored, cost=(costs or {}).get(name))
        for group, members in results.groups().items():
            names = [task.name for task in members]
            if set(names) <= rows.keys():
                predictor.means[group] = mean_of([scored[task] for task in names])
                if leader is not None and name != leader:
                    ahead = [scores[leader][task] for task in names]
                    predictor.lead[group] = lead_of(ahead, [rows[task] for task in names])
        results.predictors.append(predictor)
    return results
