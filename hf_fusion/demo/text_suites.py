"""Suites of text experts: the classes and rows on which each expert is trained.

A data set is a folder with `train.parquet` and `test.parquet` (columns text, label and, for pairs,
text_pair). Its train rows are divided once: most train the experts, the rest is kept to fit the fuser.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_fusion.bench.rows import SEED, divide, stored_parts
from hf_fusion.bench.suite import load_suite

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TextExpert:
    """One expert of a suite.

    Attributes:
        name: folder name of its adapter.
        task: folder name of its data set.
        classes: the class indices it is trained on, in the order of its head; None for all classes.
        shots: number of training rows of each class not in `classes`; if above 0, its head has all classes.
    """

    name: str
    task: str
    classes: tuple[int, ...] | None = None
    shots: int = 0


@dataclass(frozen=True)
class TextSuite:
    """Experts that are fused into one model.

    Attributes:
        name: for the option `--suite`.
        mode: of the Fusion of Experts.
        experts: its experts.
        fit_share: share of the training rows that are held out from the experts, for fitting the fuser.
        fuser_hidden: widths of the fuser's hidden layers; few rows need a small fuser.
    """

    name: str
    mode: Literal["selection", "output"]
    experts: tuple[TextExpert, ...]
    fit_share: float = 0.15
    fuser_hidden: tuple[int, ...] = (512, 512)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Its data sets, without duplicates, in order."""
        return tuple(dict.fromkeys(expert.task for expert in self.experts))


def _partition(task: str, classes: int, groups: int) -> tuple[TextExpert, ...]:
    """One expert per group of a random partition of the classes into equal groups."""
    order = random.Random(SEED).sample(range(classes), classes)
    return tuple(
        TextExpert(f"{task}-group-{group}", task, tuple(sorted(order[group::groups]))) for group in range(groups)
    )


def _specialists(task: str, classes: int, shots: int) -> tuple[TextExpert, ...]:
    """One expert per class, each trained fully on two classes, so that two experts are trained on each class."""
    return tuple(
        TextExpert(f"{task}-specialist-{first}", task, (first, (first + 1) % classes), shots)
        for first in range(classes)
    )


SUITES = {
    suite.name: suite
    for suite in (
        TextSuite(
            "tasks-8",
            "selection",
            tuple(TextExpert(task, task) for task in load_suite("foe-domains").tasks),
            fuser_hidden=(512,),
        ),
        TextSuite("banking-groups", "output", _partition("banking77", classes=77, groups=7), 0.4),
        TextSuite("snips-specialists", "output", _specialists("snips", classes=7, shots=8), 0.3),
    )
}


def splits(data_dir: str | Path, task: str, fit_share: float) -> tuple[Dataset, Dataset, Dataset]:
    """Splits a task's rows for training experts, fitting the fuser, and testing.

    Args:
        data_dir: folder that holds the data sets.
        task: folder name of the data set.
        fit_share: share of its training rows for the fuser, see `TextSuite`.

    Returns:
        (train, fit, test), each with columns text, label and, for pairs, text_pair.

    Raises:
        FusionError: the data set does not exist.
    """
    return divide(stored_parts(data_dir, task), "train", fit_share)


def training_rows(rows: Dataset, expert: TextExpert) -> Dataset:
    """The rows on which an expert is trained, labelled with the class indices of its head."""
    from datasets import ClassLabel

    if expert.classes is None:
        return rows
    if expert.shots:
        counts: Counter[int] = Counter()
        selected = []
        for row, label in enumerate(rows["label"]):
            counts[label] += 1
            if label in expert.classes or counts[label] <= expert.shots:
                selected.append(row)
        return rows.select(selected)
    index = {label: row for row, label in enumerate(expert.classes)}
    names = [rows.features["label"].names[label] for label in expert.classes]
    rows = rows.select([row for row, label in enumerate(rows["label"]) if label in index])
    labels = [index[label] for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", labels)
    return rows.cast_column("label", ClassLabel(names=names))
