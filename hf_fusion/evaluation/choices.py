"""Rank classification: a language model predicts the most likely of the choices, however it would continue."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.task_metrics import METRICS

if TYPE_CHECKING:
    from datasets import Dataset


def right_choice(target: str, choices: Sequence[str]) -> int:
    """The choice that a target means: that with which it begins alike for longest, and of several the shortest."""
    alike = [len(os.path.commonprefix([target, choice])) for choice in choices]
    return max(range(len(choices)), key=lambda number: (alike[number], -len(choices[number])))


def spread(rows: Dataset) -> Dataset:
    """A row for each choice of each row: prompt, target."""
    return rows.map(
        lambda batch: {
            "prompt": [
                prompt for prompt, choices in zip(batch["prompt"], batch["choices"], strict=True) for _ in choices
            ],
            "target": [choice for choices in batch["choices"] for choice in choices],
        },
        batched=True,
        remove_columns=rows.column_names,
    )


def right_choices(target: str, choices: Sequence[str], worth: Sequence[float] | None) -> list[int]:
    """Which choices are correct: those with the highest worth, or else the one that the target means."""
    if worth is not None and len(worth) == len(choices) and max(worth) > 0:
        return [number for number, value in enumerate(worth) if value == max(worth)]
    return [right_choice(target, choices)]


def likeliest(rows: Dataset, found: Predictions) -> Predictions:
    """For each row the index of the choice with the least loss, and that of a right one: the same where it is right.

    Args:
        rows: with choices, and the indices of the right ones.
        found: the mean loss of each choice's tokens, in the order of `spread`.
    """
    predicted, start = [], 0
    for choices in rows["choices"]:
        losses = found.predictions[start : start + len(choices)]
        predicted.append(min(range(len(losses)), key=losses.__getitem__))
        start += len(choices)
    pairs = zip(predicted, rows["right"], strict=True)
    return Predictions(predicted, [index if index in right else right[0] for index, right in pairs])


def ranks(metric: str) -> bool:
    """Whether a metric ranks choices."""
    return METRICS[metric].reads == "ranks"


def inputs_of(rows: Dataset, metric: str) -> Dataset:
    """The inputs that rows become: one for each choice where choices are ranked, else the rows themselves."""
    return spread(rows) if ranks(metric) else rows


def reduction(rows: Dataset, metric: str) -> Callable[[Predictions], Predictions]:
    """Predictions for `inputs_of` the rows → those for the rows."""
    return partial(likeliest, rows) if ranks(metric) else unchanged


def unchanged(found: Predictions) -> Predictions:
    """Predictions as they are: one for each row that is scored."""
    return found
