"""From the scores of rows to those of tasks, their means and leads, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from hf_fusion.evaluation.intervals import Z95, Score, mean_of, wilson
from hf_fusion.evaluation.results import HELD_IN, HELD_OUT, SuiteSystem, SuiteTask


def score_of(values: torch.Tensor, metric: str) -> Score:
    """The mean of rows' scores (N,) with its interval.

    Args:
        values: of the rows.
        metric: "accuracy", "exact" or "exact_match", shares, which have Wilson's interval; "tokens", a mean of shares,
            or "mse", a mean of squared errors, which have the normal one.
    """
    if metric == "mse":
        mean, half = sum(values.tolist()) / len(values), Z95 * float(values.std()) / math.sqrt(len(values))
        return Score(mean, (mean - half, mean + half))
    mean = float(values.double().mean())
    if metric != "tokens":
        return Score(mean, wilson(mean, len(values)))
    half = Z95 * float(values.double().std(correction=0)) / math.sqrt(len(values))
    return Score(mean, (max(0.0, mean - half), min(1.0, mean + half)))


def lead_of(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Score:
    """Mean over tasks of the mean difference of two systems on the same rows, each (N_task,), with its interval."""
    differences = [(a - b).double() for a, b in zip(own, other, strict=True)]
    mean = sum(float(d.mean()) for d in differences) / len(differences)
    variance = sum(float(d.var(correction=0)) / len(d) for d in differences) / len(differences) ** 2
    half = Z95 * math.sqrt(variance)
    return Score(mean, (mean - half, mean + half))


def compare(
    tasks: Sequence[SuiteTask],
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    kinds: Mapping[str, str],
    leader: str,
) -> list[SuiteSystem]:
    """Systems with their intervals, their means, and how far the leader is ahead of each.

    Args:
        tasks: the suite.
        scores: system → task → scores of its rows (N,).
        kinds: system → kind, see `SuiteSystem`; default is "oracle".
        leader: the system that the comparison is about.
    """
    systems = []
    for name, own in scores.items():
        kind = kinds.get(name, "oracle")
        system = SuiteSystem(name, kind, {t.name: score_of(own[t.name], t.metric) for t in tasks if t.name in own})
        for group in (HELD_IN, HELD_OUT):
            members = [task.name for task in tasks if task.group == group]
            if members and set(members) <= own.keys():
                system.means[group] = mean_of([system.scores[task] for task in members])
                if leader in scores and name != leader:
                    ahead = [scores[leader][task] for task in members]
                    system.lead[group] = lead_of(ahead, [own[task] for task in members])
        systems.append(system)
    return systems
