"""How rows of the suite `smollm-general` are made: of data sets, and of lists. See `general_tasks`."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hf_fusion.assets.general_forms import DrawnRows, Example, Source
from hf_fusion.assets.language_tasks import Split, StoredRows

TEXT = 110
"""Characters of a text at most; longer ones are left out, or cut after a sentence."""


# names of labels: one expert learns all of them, so that it reads the names instead of knowing them
SENTIMENTS = (
    ("negative", "positive"),
    ("bad", "good"),
    ("unfavourable", "favourable"),
    ("thumbs down", "thumbs up"),
    ("terrible", "great"),
    ("critical", "approving"),
    ("boring", "exciting"),
    ("weak", "strong"),
    ("hate", "love"),
    ("disappointed", "satisfied"),
    ("angry", "delighted"),
    ("poor", "excellent"),
    ("against", "for"),
    ("dislike", "like"),
    ("awful", "wonderful"),
    ("one star", "five stars"),
    ("unhappy", "happy"),
    ("sad", "cheerful"),
    ("annoyed", "amused"),
    ("a warning", "a recommendation"),
    ("disgust", "enjoyment"),
    ("worst", "best"),
)
QUESTIONS = (
    ("description", "entity", "abbreviation", "human", "location", "numeric"),
    ("explanation", "thing", "short form", "person", "place", "number"),
    ("a definition or reason", "an object", "an acronym", "somebody", "somewhere", "a quantity or date"),
    ("definition", "animal, work or product", "letters", "name of a person", "name of a place", "figure"),
    ("meaning", "item", "initials", "people", "region", "amount"),
    (
        "an account",
        "a kind of thing",
        "what it stands for",
        "an individual or group",
        "a spot on the map",
        "a count, date or sum",
    ),
)


def named(item: Mapping[str, Any], labels: Sequence[str], names: Sequence[tuple[str, ...]]) -> Example | None:
    """A text with its class under one of several lists of names, which the text itself chooses."""
    text = item["text"].strip()
    if len(text) > TEXT:
        return None
    chosen = random.Random(text).choice(names)
    return Example(text, chosen[labels.index(item["label"])], chosen)


def labelled(folder: str, labels: Sequence[str], *names: tuple[str, ...]) -> StoredRows[Example]:
    """A classified data set: its labels, and lists of names for them in the same order."""
    return StoredRows(folder, lambda item: named(item, labels, names))


_TOPICS = ("world", "sports", "business", "science")
_TOPIC_NAMES = (
    ("world", "sports", "business", "science"),
    ("international affairs", "sport", "economy", "technology"),
    ("politics abroad", "athletics", "finance", "science and computers"),
    ("foreign news", "games and matches", "companies and markets", "research"),
    ("global events", "competition", "money", "computing"),
    ("countries and conflicts", "teams and players", "trade", "inventions"),
    ("diplomacy", "athletes", "shares and jobs", "software and space"),
    ("around the globe", "on the pitch", "at the stock exchange", "in the laboratory"),
)


def topic(item: Mapping[str, Any]) -> Example | None:
    """The beginning of a news item, and two to four topics."""
    text = item["text"].strip()
    while len(text) > TEXT and ". " in text:
        text = text.rpartition(". ")[0]
    if len(text) > TEXT:
        return None
    rng = random.Random(text)
    names = rng.choice(_TOPIC_NAMES)
    right = names[_TOPICS.index(item["label"])]
    others = rng.sample([name for name in names if name != right], rng.randint(1, 3))
    return Example(text, right, (right, *others))


@dataclass(frozen=True)
class IntentRows:
    """Messages of users with their intent and some of the others.

    Attributes:
        folder: of the data set.
        others: number of wrong choices.
        names: label → what it is called; by default itself, in words.
    """

    folder: str
    others: int = 3
    names: Mapping[str, str] = field(default_factory=dict)

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An iterator over the messages."""
        stored = StoredRows(self.folder, lambda item: (item["text"].strip(), item["label"]))
        drawn = [row for row in stored.draw(split, data_dir) if row]
        named = {label: self.names.get(label) or _in_words(label) for _, label in drawn}
        for text, label in drawn:
            others = sorted(set(named.values()) - {named[label]})
            wrong = random.Random(text).sample(others, min(self.others, len(others)))
            yield None if len(text) > TEXT else Example(text, named[label], (named[label], *wrong))


def _in_words(label: str) -> str:
    return label.replace("_", " ").replace("?", "").lower()


# ---------------------------------------------------------------- generated lists


@cache
def pool() -> list[str]:
    """Common English words of 3 to 7 letters, from a text that comes with reasoning-gym."""
    from reasoning_gym.data import read_data_file

    text = read_data_file("in_the_year_2889.txt")
    return sorted(set(re.findall(r"(?<=\s)[a-z]{3,7}(?=\s)", text)))


def words(rng: random.Random, least: int = 3, most: int = 5) -> list[str]:
    """Different words."""
    return rng.sample(pool(), rng.randint(least, most))


def numbers(rng: random.Random, least: int = 3, most: int = 5, top: int = 99) -> list[str]:
    """Different numbers."""
    return list(map(str, rng.sample(range(top + 1), rng.randint(least, most))))


def joined(values: Sequence[object]) -> str:
    """Values with commas."""
    return ", ".join(map(str, values))


def of_list(
    draw: Callable[[random.Random], list[str]],
    answer: Callable[[list[str]], str],
    *,
    separators: Sequence[str] = (", ",),
) -> DrawnRows:
    """A list and what is to be made of it; the list's separator changes, that of the answer is a comma."""

    def make(rng: random.Random) -> Example:
        values = draw(rng)
        return Example(rng.choice(separators).join(values), answer(values))

    return DrawnRows(make)


def lookup(rng: random.Random) -> Example:
    """One item of a list, named by its position or its neighbour."""
    values = words(rng, 3, 6) if rng.random() < 0.6 else numbers(rng, 3, 6)
    place = rng.randrange(len(values) - 1)
    kind, right = rng.choice(
        [
            (f"after {values[place]}", values[place + 1]),
            (f"right before {values[place + 1]}", values[place]),
            ("first", values[0]),
            ("last", values[-1]),
            ("second", values[1]),
        ]
    )
    return Example(f"{kind}: {joined(values)}", right)


def membership(names: Sequence[tuple[str, str]]) -> DrawnRows:
    """Whether a list has an item; names for yes and no."""

    def make(rng: random.Random) -> Example:
        values = words(rng, 3, 6) if rng.random() < 0.6 else numbers(rng, 3, 6)
        is_in = rng.random() < 0.5
        others = pool() if values[0].isalpha() else list(map(str, range(100)))
        sought = rng.choice(values if is_in else [value for value in others if value not in values])
        yes_no = rng.choice(names)
        return Example(f"{sought} in {joined(values)}", yes_no[0 if is_in else 1], yes_no)

    return DrawnRows(make)


def summed(rng: random.Random) -> Example:
    """Two or three numbers, added or subtracted; the result is not negative."""
    terms = [rng.randint(1, 60) for _ in range(2 if rng.random() < 0.75 else 3)]
    text, total = str(terms[0]), terms[0]
    for term in terms[1:]:
        if rng.random() < 0.4 and term <= total:
            text, total = f"{text} - {term}", total - term
        else:
            text, total = f"{text} + {term}", total + term
    return Example(text, str(total))


def count(rng: random.Random) -> Example:
    """The length of a list."""
    values = words(rng, 2, 9) if rng.random() < 0.6 else numbers(rng, 2, 9)
    return Example(rng.choice((", ", " ", "; ")).join(values), str(len(values)))


def occurrences(rng: random.Random) -> Example:
    """How often a list has a word."""
    values = words(rng, 2, 3)
    listed = [rng.choice(values) for _ in range(rng.randint(3, 7))]
    return Example(f"{values[0]}: {joined(listed)}", str(listed.count(values[0])))


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


# what the lists of held-out tasks are of
NAMES = split_words(
    "Anna Boris Clara Dmitri Elena Farid Greta Hugo Irene Jonas Karim Laura Miguel Nadia Oscar Paula Quentin "
    "Rosa Stefan Tamara Ursula Victor Wanda Xavier Yusuf Zoe Albert Bianca Carlos Denise Emil Fiona Gustav "
    "Helga Ivan Julia"
)
CITIES = split_words(
    "Athens Berlin Cairo Dublin Edinburgh Florence Geneva Havana Istanbul Jakarta Kyoto Lisbon Madrid Nairobi "
    "Oslo Paris Quito Rome Seoul Tokyo Utrecht Vienna Warsaw Zagreb Amman Bogota Casablanca Delhi Lima Manila"
)
GOODS = split_words(
    "apples bread butter candles carrots cheese coffee cups eggs flour forks grapes honey jam juice lamps "
    "lemons milk mugs nuts olives onions paper pears pens plates rice salt soap socks spoons sugar tea towels "
    "water"
)
NUMBER_WORDS = split_words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


# ---------------------------------------------------------------- restaurants


def attributes(item: Mapping[str, Any]) -> dict[str, str]:
    """The attributes of a restaurant."""
    return dict(re.findall(r"(?:^|, )([a-zA-Z ]+)\[([^\]]*)\]", item["prompt"]))


def restaurant(attribute: str) -> StoredRows[Example]:
    """A text about a restaurant, and one attribute that it mentions literally."""

    def row(item: Mapping[str, Any]) -> Example | None:
        value = attributes(item).get(attribute)
        text = item["target"]
        return None if value is None or value not in text or len(text) > 140 else Example(text, value)

    return StoredRows("e2e_nlg", row)


def described(item: Mapping[str, Any]) -> Example | None:
    """A restaurant's data and a sentence about it."""
    return None if len(item["prompt"]) + len(item["target"]) > 190 else Example(item["prompt"], item["target"])


# ---------------------------------------------------------------- other orders and mixtures


@dataclass(frozen=True)
class BalancedRows:
    """Rows of all answers in turn, as many of each.

    Attributes:
        source: of the rows; it must end.
    """

    source: Source

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An iterator over the rows."""
        by_answer: dict[str, list[Example]] = {}
        for row in self.source.draw(split, data_dir):
            if row:
                by_answer.setdefault(row.answer, []).append(row)
        for turn in zip(*by_answer.values(), strict=False):
            yield from turn


@dataclass(frozen=True)
class HalvedRows:
    """Rows of a test split alone, since an expert has seen the train split: half of the contents for either.

    Attributes:
        stored: the data set.
    """

    stored: StoredRows[Example]

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An iterator over the rows."""
        for row in self.stored.draw("test", data_dir):
            if row and (random.Random(row.content).random() < 0.5) == (split == "test"):
                yield row


@dataclass(frozen=True)
class KindRows:
    """Texts of several data sets in turn, from their test splits; the answer is which of them a text is from.

    Attributes:
        kinds: answer → folder and column.
        others: number of wrong choices.
        longest: characters of a text.
    """

    kinds: Mapping[str, tuple[str, str]]
    others: int = 3
    longest: int = TEXT

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Example | None]:
        """An iterator over the texts."""
        drawn = {kind: self._of(*source).draw(split, data_dir) for kind, source in self.kinds.items()}
        while True:
            for kind, texts in drawn.items():
                if (text := next(texts, None)) is None:
                    return
                others = sorted(self.kinds.keys() - {kind})
                wrong = random.Random(text.content).sample(others, min(self.others, len(others)))
                yield Example(text.content, kind, (kind, *wrong))

    def _of(self, folder: str, column: str) -> HalvedRows:
        def row(item: Mapping[str, Any]) -> Example | None:
            text = item[column].strip()
            return Example(text, "") if len(text) <= self.longest else None

        return HalvedRows(StoredRows(folder, row))
