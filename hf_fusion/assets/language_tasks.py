"""Small language tasks for SmolLM2: those its experts are trained on, and those that none has seen.

Several tasks share their content (the same lists of words or numbers, the same restaurants) and differ in the
instruction alone, which opens the prompt in one of a few wordings. So neither the content nor any single phrase
tells the tasks apart, and every token behind the instruction can know the task.

The rows come from reasoning-gym, which makes them, and from data sets (``train.parquet``, ``test.parquet``)
in one folder each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_fusion.errors import FusionError
from hf_fusion.extras import refuse_missing

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "test"]
Row = tuple[str, str]  # what the instruction speaks of, and the right answer

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""SmolLM2's chat markup around one question, without a system message."""
END_OF_TURN = "<|im_end|>\n"

TEST_ROWS = 400
"""Each task has at most so many test rows; their content is kept out of its train rows."""

# reasoning-gym draws item i from seed + i: so far apart, the splits share no draw
_SEEDS: dict[Split, int] = {"train": 0, "test": 10_000_000}


@dataclass(frozen=True)
class GeneratedRows:
    """Rows made by reasoning-gym.

    Attributes:
        generator: name of its data set.
        row: one of its items (question, answer, metadata) as content and answer, or None to leave it out.
        arguments: of its configuration.
    """

    generator: str
    row: Callable[[Mapping[str, Any]], Row | None]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Row | None]:
        """Its items, without end.

        Raises:
            FusionError: reasoning-gym is not installed.
        """
        try:
            import reasoning_gym
        except ImportError as error:
            refuse_missing(error, "the language suite", extra="demo")
            raise

        chunk, seed = 1000, _SEEDS[split]
        while True:
            items = reasoning_gym.create_dataset(self.generator, seed=seed, size=chunk, **self.arguments)
            yield from (self.row(items[index]) for index in range(chunk))
            seed += chunk


@dataclass(frozen=True)
class StoredRows:
    """Rows of a data set on disk, in an order of chance.

    Attributes:
        folder: its folder inside the data folder.
        row: one of its rows as content and answer, or None to leave it out; class labels come as their names.
    """

    folder: str
    row: Callable[[Mapping[str, Any]], Row | None]

    def draw(self, split: Split, data_dir: Path | None) -> Iterator[Row | None]:
        """Its rows, each once.

        Raises:
            FusionError: the data set is not there.
        """
        from datasets import ClassLabel, Dataset

        if data_dir is None or not (file := data_dir / self.folder / f"{split}.parquet").is_file():
            raise FusionError(
                f"the data set {self.folder!r} was not found in {data_dir or 'any folder: none was given'}",
                hint=f"--data DIR, where DIR/{self.folder} holds train.parquet and test.parquet",
            )
        data = Dataset.from_parquet(str(file))
        rows = data.to_list()
        for name, feature in data.features.items():
            if isinstance(feature, ClassLabel):
                for row in rows:
                    row[name] = feature.int2str(row[name])
        random.Random(0).shuffle(rows)
        yield from map(self.row, rows)


@dataclass(frozen=True)
class LanguageTask:
    """One task.

    Attributes:
        name: what it is called; its expert's folder too.
        instructions: wordings of the question with ``{}`` for the content, used in turn.
        source: where its rows come from.
        held_in: whether it has an expert.
        license: of the rows.
        metric: "exact": the whole answer must be right; "tokens": share of right next tokens, for free text.
        most_trained: an expert sees no more of its train rows, in `examples/train_smollm2_experts.py`.
    """

    name: str
    instructions: tuple[str, ...]
    source: GeneratedRows | StoredRows
    held_in: bool = True
    license: str = "apache-2.0"
    metric: Literal["exact", "tokens"] = "exact"
    most_trained: int = 3200

    @property
    def trained(self) -> int:
        """How many of its train rows its expert saw at most, the first ones; 0 where there is no expert."""
        return self.most_trained if self.held_in else 0


def rows(task: str | LanguageTask, split: Split, size: int, data_dir: str | Path | None = None) -> Dataset:
    """Rows of a task: always the same ones, and the first of a longer request are those of a shorter one.

    Args:
        task: a task or its name in `TASKS`.
        split: "train" or "test"; no content is in both.
        size: at most so many rows; a test split has at most `TEST_ROWS`.
        data_dir: the folder of data sets, for tasks that are not generated.

    Returns:
        Columns ``task``, ``prompt`` (literal text with chat markup) and ``target``.

    Raises:
        FusionError: the task is unknown, or its data set is not there.
    """
    from datasets import Dataset

    if isinstance(task, str):
        if task not in TASKS:
            raise FusionError(f"no task {task!r}; there are {', '.join(TASKS)}")
        task = TASKS[task]
    folder = None if data_dir is None else Path(data_dir)
    tested = list(_distinct(task.source.draw("test", folder), TEST_ROWS, taken=set()))
    if split == "test":
        chosen = tested[:size]
    else:
        chosen = list(_distinct(task.source.draw("train", folder), size, taken={content for content, _ in tested}))
    return Dataset.from_list(
        [
            {
                "task": task.name,
                "prompt": CHAT.format(task.instructions[index % len(task.instructions)].format(content)),
                "target": answer,
            }
            for index, (content, answer) in enumerate(chosen)
        ]
    )


def conversations(suite: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Every row of every task as the second question of a chat: the first is of another task of the suite.

    The first question comes with its right answer; it is of each of the other tasks in turn.

    Args:
        suite: task → its rows, as `rows` gives them; at least two tasks.

    Returns:
        Task → as many rows, with a column ``first``, the task of the first question.
    """
    from datasets import Dataset

    chats = {}
    for task, own in suite.items():
        others = [name for name in suite if name != task]
        chats[task] = Dataset.from_list([_chat(row, index, others, suite) for index, row in enumerate(own)])
    return chats


def _chat(row: dict[str, Any], index: int, others: Sequence[str], suite: Mapping[str, Dataset]) -> dict[str, Any]:
    first = others[index % len(others)]
    opening = suite[first][index // len(others) % len(suite[first])]
    return {**row, "prompt": f"{opening['prompt']}{opening['target']}{END_OF_TURN}{row['prompt']}", "first": first}


def _distinct(drawn: Iterator[Row | None], size: int, taken: set[str]) -> Iterator[Row]:
    """The first different rows whose content is not taken; stops where chance brings nothing new any more."""
    seen: set[Row] = set()
    misses = 0
    for row in drawn:
        if len(seen) >= size or misses > 5000:
            return
        if row is None or row in seen or row[0] in taken:
            misses += 1
            continue
        seen.add(row)
        misses = 0
        yield row


def _joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


_NUMBERS = {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 99}


def _words(answer: Callable[[list[str]], str]) -> GeneratedRows:
    """Three or four different words in small letters; the answer is a function of them."""

    def row(item: Mapping[str, Any]) -> Row | None:
        words = [word.lower() for word in item["metadata"]["words"]]
        usable = len(set(words)) == len(words) and min(map(len, words)) > 2
        return (_joined(words), answer(words)) if usable else None

    return GeneratedRows("word_sequence_reversal", row, {"min_words": 3, "max_words": 4})


def _numbers(answer: Callable[[list[int]], str]) -> GeneratedRows:
    """Three or four different numbers below 100; the answer is a function of them."""

    def row(item: Mapping[str, Any]) -> Row | None:
        numbers = [int(float(number)) for number in item["metadata"]["original_numbers"]]
        return (_joined(numbers), answer(numbers)) if len(set(numbers)) == len(numbers) else None

    return GeneratedRows("number_sorting", row, _NUMBERS)


def _filtering(item: Mapping[str, Any]) -> Row:
    facts = item["metadata"]
    action, bound = facts["operation"].split("_")
    question = f"{action.capitalize()} all numbers {bound} than {facts['filter_value']}: "
    return question + _joined(facts["original_numbers"]), _joined(facts["result"]) or "none"


def _bbh(item: Mapping[str, Any]) -> Row:
    return item["prompt"], item["target"]


def _attributes(item: Mapping[str, Any]) -> dict[str, str]:
    return dict(re.findall(r"(?:^|, )([a-zA-Z ]+)\[([^\]]*)\]", item["prompt"]))


def _restaurant(attribute: str) -> StoredRows:
    """A text about a restaurant, and one attribute that it tells."""

    def row(item: Mapping[str, Any]) -> Row | None:
        value = _attributes(item).get(attribute)
        return None if value is None or len(item["target"]) > 150 else (item["target"], value)

    return StoredRows("e2e_nlg", row)


def _describe(item: Mapping[str, Any]) -> Row | None:
    return None if len(item["prompt"]) + len(item["target"]) > 190 else (item["prompt"], item["target"])


_HELD_IN = (
    LanguageTask(
        "word-sorting",
        ("Sort these words alphabetically: {}", "Put in alphabetical order: {}", "Arrange from A to Z: {}"),
        _words(lambda words: _joined(sorted(words))),
    ),
    LanguageTask(
        "word-reversal",
        ("Reverse this list of words: {}", "Write from last to first: {}", "Give these words in reverse order: {}"),
        _words(lambda words: _joined(words[::-1])),
    ),
    LanguageTask(
        "word-initials",
        ("Write the first letters of these words: {}", "Give the initials: {}", "Which letters begin these words? {}"),
        _words(lambda words: " ".join(word[0].upper() for word in words)),
    ),
    LanguageTask(
        "number-sorting",
        ("Sort these numbers in ascending order: {}", "Order from smallest to largest: {}", "Sort upwards: {}"),
        _numbers(lambda numbers: _joined(sorted(numbers))),
    ),
    LanguageTask(
        "number-range",
        ("Give the smallest and the largest: {}", "Find minimum and maximum: {}", "Which numbers are the extremes? {}"),
        _numbers(lambda numbers: f"{min(numbers)} and {max(numbers)}"),
    ),
    LanguageTask(
        "chain-sum",
        ("Calculate {}.", "What is {}?", "State the result of {}."),
        GeneratedRows(
            "chain_sum",
            lambda item: (item["metadata"]["expression"], item["answer"]),
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        ),
    ),
    LanguageTask(
        "restaurant-description",
        ("Describe this restaurant: {}", "Write a sentence from this data: {}", "Put this data into words: {}"),
        StoredRows("e2e_nlg", _describe),
        license="cc-by-sa-4.0",
        metric="tokens",
    ),
    LanguageTask(
        "restaurant-rating",
        ("What rating does it have? {}", "Extract the customer rating: {}", "How do customers rate this place? {}"),
        _restaurant("customer rating"),
        license="cc-by-sa-4.0",
        most_trained=1920,
    ),
    LanguageTask(
        "banking-intent",
        ("Name the intent of this customer: {}", "Classify this question to a bank: {}", "What is this about? {}"),
        StoredRows("banking77", lambda item: (item["text"].strip(), item["label"].replace("_", " ").lower())),
        license="cc-by-4.0",
    ),
)

_HELD_OUT = (
    *(
        LanguageTask(name.replace("_", "-"), ("{}",), StoredRows(f"bbh/{name}", _bbh), held_in=False, license="mit")
        for name in (
            "boolean_expressions",
            "navigate",
            "object_counting",
            "hyperbaton",
            "sports_understanding",
            "snarks",
        )
    ),
    LanguageTask(
        "number-filtering",
        ("{}",),
        GeneratedRows("number_filtering", _filtering, _NUMBERS),
        held_in=False,
    ),
    LanguageTask(
        "last-letters",
        ("Write the last letters of these words: {}",),
        _words(lambda words: " ".join(word[-1].upper() for word in words)),
        held_in=False,
    ),
    LanguageTask(
        "three-term-sum",
        ("Calculate {}.",),
        GeneratedRows(
            "chain_sum",
            lambda item: (item["metadata"]["expression"], item["answer"]),
            {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        ),
        held_in=False,
    ),
    LanguageTask(
        "descending-numbers",
        ("Sort these numbers in descending order: {}",),
        _numbers(lambda numbers: _joined(sorted(numbers, reverse=True))),
        held_in=False,
    ),
    LanguageTask(
        "restaurant-area",
        ("In which area is it? {}", "Extract the area: {}", "Where does this place lie? {}"),
        _restaurant("area"),
        held_in=False,
        license="cc-by-sa-4.0",
    ),
)

TASKS = {task.name: task for task in (*_HELD_IN, *_HELD_OUT)}
"""All tasks by name, those with experts first."""
HELD_IN = tuple(task.name for task in _HELD_IN)
HELD_OUT = tuple(task.name for task in _HELD_OUT)
