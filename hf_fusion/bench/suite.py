"""Suites: what is fused, on which tasks it is measured, and where all of it comes from. Each is a file in `suites/`.

What a source of models or rows may be, see `bench.sources`.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from hf_fusion.bench.sources import is_hub_id
from hf_fusion.errors import FusionError, one_line, path_suggestion, shown, suggestion
from hf_fusion.io.files import read_text
from hf_fusion.io.yaml_files import read_yaml
from hf_fusion.schema import Before, Expected, KeyPath, OneOf, Text, fields_of, is_text, read, read_class, read_fields

SUITES = Path(__file__).with_name("suites")

KINDS = ("merging", "routing", "fusion", "regression")
HEADS = (
    "sequence-classification",
    "image-classification",
    "zero-shot-image",
    "causal-lm",
    "seq2seq-lm",
    "feature-extraction",
    "dense-prediction",
)
METRICS = {
    "accuracy": "share of correct classes",
    "f1": "harmonic mean of precision and recall",
    "matthews": "Matthews correlation",
    "spearman": "rank correlation",
    "exact": "share of targets that greedy decoding reproduces exactly",
    "ranked": "share of rows whose most likely choice is correct",
    "tokens": "share of correct next tokens",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "share of generated texts that equal the target",
    "spearman_text": "rank correlation of the numbers in generated texts",
    "perplexity": "of the targets",
    "agreement": "cosine similarity with the embedding by the task's own expert",
    "mean_iou": "mean intersection over union of predicted and true segments",
    "absolute_error": "mean absolute error of the depth",
    "angle": "mean angle to the true surface normals, in degrees",
}
HARNESS_LOWER = frozenset({"word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score", "mse"})
"""Those of lm-evaluation-harness for which lower is better."""
LOWER = frozenset({"perplexity", "absolute_error", "angle"}) | HARNESS_LOWER
"""Metrics for which lower is better; unlike all others they are not shares from 0 to 1."""
OUR_COLUMNS = ("text", "text_pair", "image", "label")


def _beside(path: Path, name: str) -> Path:
    """A file beside a suite's, or among the package's suites."""
    beside = path.parent / name
    return beside if os.path.isfile(beside) else SUITES / name  # noqa: PTH113 - pathlib raises for names that are too long


def _class_names(value: object, where: KeyPath) -> Any:
    """The lines of the file that a string names; a list is returned unchanged."""
    if not isinstance(value, str):
        return value
    file = _beside(Path(where.file), value)
    if not os.path.isfile(file):  # noqa: PTH113
        raise FusionError(f"{where}: {one_line(file)} is missing", "give a list of names, or a file beside the suite's")
    return read_text(file).splitlines()


Texts = Annotated[
    tuple[Text, ...],
    Before(lambda value, where: [value] if isinstance(value, str) else value),
    Expected("a list of strings", bool),
]
Classes = Annotated[
    tuple[Text, ...], Before(_class_names), Expected("a list of names, or a file with one name per line", bool)
]
GivenText = Annotated[str | None, Expected("a string", is_text)]
"""A string that may be omitted, but not null."""


def same_scale(metrics: Iterable[str]) -> bool:
    """Whether scores can be averaged: all have the same metric, or all are shares for which higher is better."""
    names = set(metrics)
    return len(names) == 1 or not names & LOWER


@dataclass(frozen=True)
class Fitting:
    """Which rows may be learned from: they trained no expert and are not tested.

    Attributes:
        split: "train" or "test", from which a share is taken; or another split of the data set, used whole.
        share: of the split's rows.
    """

    split: Text = "train"
    share: Annotated[int | float, Expected("a number above 0, at most 1", lambda share: 0 < share <= 1)] = 0.15


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        name: its key in the file.
        data: source of its rows.
        metric: a key of `METRICS`.
        expert: source of the expert that was trained on it; None for a held-out task.
        config: configuration of a data set on the Hub.
        train: its training split, None where it has none.
        test: its test split.
        columns: ours (text, text_pair, image, label) → the data set's, where they differ.
        classes: names of the classes in the order of the labels; () takes the data set's own.
        templates: of zero-shot heads: sentences with ``{}`` for the class.
        prompt: of language models: wordings, used in turn, with the data set's columns in braces.
        words: of language models: the answer for each class, with columns in braces where it differs by row.
        target: of language models: the answer, with the data set's columns in braces.
        choices: of language models whose answers are ranked: the data set's column that lists them; default: the words.
        worth: the column that says what each is worth, where several may be right.
        fitting: which rows may be learned from.
    """

    name: str
    data: Text
    metric: Annotated[str, OneOf(tuple(METRICS))] = "accuracy"
    expert: Text | None = None
    config: Text | None = None
    train: Text | None = "train"
    test: Text = "test"
    columns: dict[Annotated[str, OneOf(OUR_COLUMNS)], Text] = field(default_factory=dict)
    classes: Classes = ()
    templates: Texts = ()
    prompt: Texts = ()
    words: Texts = ()
    target: Text | None = None
    choices: Text | None = None
    worth: Text | None = None
    fitting: Fitting = Fitting()


@dataclass(frozen=True)
class Question:
    """How a language model scores a row.

    Attributes:
        prompt: with our columns in braces.
        target: the text, with our columns in braces, whose mean log-likelihood of a token is the score (BARTScore).
        words: or two answers: the score is the probability of the first where only these are possible (UniEval).
    """

    prompt: Text
    target: GivenText = None
    words: Annotated[tuple[Text, ...], Expected("two texts", lambda words: len(words) == 2)] = ()


@dataclass(frozen=True)
class Holdout:
    """Which experts are fused, and which held-out tasks they are tested on, with the heads of these tasks' own experts.

    Attributes:
        name: its key in the file.
        fuse: tasks whose experts are fused.
        test: tasks that none of them was trained on.
    """

    name: str
    fuse: Texts
    test: Texts


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """The fields that a suite takes from its file unchanged; see `Suite`."""

    title: Text
    kind: Annotated[str, OneOf(KINDS)]
    head: Annotated[str, OneOf(HEADS)]
    base: Text | None = None
    multitask: Text | None = None
    build: Text | None = None
    about: Text = ""


@dataclass(frozen=True, kw_only=True)
class Suite(_Facts):
    """What is fused and measured.

    Attributes:
        name: of its file.
        title: what reports call it.
        kind: "merging": full models or adapters of one base with a head for each task; the task of a row is known.
            "routing": adapters of one base; the task is unknown. "fusion": the tasks' rows are pooled; the task is
            unknown. "regression": models that score texts, compared with people's scores.
        head: kind of its models' head, one of `HEADS`.
        tasks: by name, in order.
        experts: name → source: those of the tasks, under their names, and those that belong to none.
        base: source of what the experts were made from; None where they differ.
        multitask: source of one model that was trained on all tasks at once; None where there is none.
        build: the command that makes the experts here; None where they are downloaded.
        unseen: which experts are fused, and which held-out tasks are tested.
        ask: of the kind "regression": expert → how it is asked for a score.
        about: further notes for readers.
        path: its file.
    """

    name: str
    tasks: dict[str, Task]
    experts: dict[str, str]
    unseen: tuple[Holdout, ...] = ()
    ask: Mapping[str, Question] = field(default_factory=dict)
    path: Path = SUITES

    @property
    def is_local(self) -> bool:
        """Whether nothing comes from the Hub: models and rows are on this machine, or can be made here."""
        models = filter(None, (self.base, self.multitask, *self.experts.values()))
        return not any(map(is_hub_id, [*models, *(task.data for task in self.tasks.values())]))

    @property
    def is_of_images(self) -> bool:
        """Whether its rows are pictures."""
        return self.head.endswith(("image", "image-classification", "dense-prediction"))

    def is_fused(self, task: str, holdout: Holdout) -> bool:
        """Whether a task's own expert is fused; a holdout names it by the task or by the expert."""
        return task in holdout.fuse and self.tasks[task].expert is not None or self.owner(task) in holdout.fuse

    def owner(self, task: str) -> str | None:
        """The name of the expert that was trained on a task; None for a held-out one."""
        source = self.tasks[task].expert
        return next((name for name, other in self.experts.items() if other == source), None)


SUITES_LISTING = "hf-fusion bench suites"
"""The command that lists the suites, for hints."""


def suite_names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str | Path) -> Suite:
    """A suite by name, or from a file.

    Args:
        name: one of `suite_names()`, or the path of a ``.yaml`` file.

    Raises:
        FusionError: there is no such suite, or its file is invalid; the message names the key.
    """
    path = Path(name) if str(name).endswith(".yaml") else SUITES / f"{name}.yaml"
    if not path.is_file():
        if str(name).endswith(".yaml"):
            raise FusionError(
                f"{one_line(path)} does not exist", path_suggestion(path, f"{SUITES_LISTING} lists suites")
            )
        hint = f"{suggestion(name, suite_names(), SUITES_LISTING)} (or the path of a .yaml file)"
        raise FusionError(f"there is no suite {str(name)!r}", hint=hint)
    return _suite(path.stem, _content(path), path)


def holdouts_named(suite: Suite, words: Sequence[str]) -> list[Holdout]:
    """A suite's holdouts by name; "all" are all of them.

    Raises:
        FusionError: it has none of that name.
    """
    known = {holdout.name: holdout for holdout in suite.unseen}
    for name in words:
        if name != "all" and name not in known:
            raise FusionError(f"{suite.name} has no unseen split {name!r}", hint=suggestion(name, ["all", *known]))
    return list(suite.unseen) if "all" in words else [known[name] for name in words]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class _File(_Facts):
    """The content of a suite's file; see `Suite`."""

    tasks: Annotated[dict[Text, Any], Expected("names of tasks, each with its keys", bool)]
    experts: Annotated[Text | dict[Text, Text], Expected("a source with {task} in it, or names and sources")] = field(
        default_factory=dict
    )
    defaults: Annotated[dict[Any, Any], Expected("keys of a task and values")] = field(default_factory=dict)
    unseen: Annotated[dict[Text, Any], Expected("names of splits, each with fuse and test", bool)] = field(
        default_factory=dict
    )
    ask: Annotated[
        dict[Text, Any], Expected("names of experts, each with a prompt, and a target or two words", bool)
    ] = field(default_factory=dict)


def _content(path: Path) -> dict[Any, Any]:
    """The keys of a file, and of the suite that it extends."""
    keys = Annotated[dict[Any, Any], Expected("{title: …, kind: …, head: …, tasks: …}")]
    content: dict[Any, Any] = read(keys, read_yaml(path), KeyPath(str(path)))
    if (parent := content.pop("extends", None)) is None:
        return content
    other = _beside(path, f"{parent}.yaml")
    if not os.path.isfile(other):  # noqa: PTH113
        raise FusionError(
            f"{path}: extends {shown(parent)}, which was not found", suggestion(parent, suite_names(), SUITES_LISTING)
        )
    inherited: dict[Any, Any] = read(keys, read_yaml(other), KeyPath(str(other)))
    if "extends" in inherited:
        raise FusionError(
            f"{path}: extends {parent}, which itself extends another suite", hint=f"extends: {inherited['extends']}"
        )
    return {**inherited, **content}


def _suite(name: str, content: dict[Any, Any], path: Path) -> Suite:
    where = KeyPath(str(path))
    file = read_class(_File, content, where)
    known = {key: each for key, each in fields_of(Task).items() if key != "name"}
    defaults, pool = read_fields(known, file.defaults, where.inner("defaults")), _numbered(file.experts, where)
    tasks = {}
    for key, keys in file.tasks.items():
        at, given = where.inner("tasks", key), {} if keys is None else keys
        task = read_class(Task, given, at, defaults, name=key)
        if "expert" not in {**defaults, **given}:
            task = replace(task, expert=pool if isinstance(pool, str) else pool.get(key))
        elif isinstance(pool, Mapping) and task.expert in pool:
            task = replace(task, expert=pool[task.expert])
        tasks[key] = _checked(task, at)
    experts = {} if isinstance(pool, str) else dict(pool)
    named = set(experts.values())
    experts |= {task.name: task.expert for task in tasks.values() if task.expert and task.expert not in named}
    if not experts:
        raise FusionError(f"{path} names no expert", hint="experts: owner/name-{task}")
    unseen = tuple(_unseen(key, split, tasks, where.inner("unseen", key)) for key, split in file.unseen.items())
    ask = {key: _question(question, where.inner("ask", key)) for key, question in file.ask.items()}
    facts = {key: getattr(file, key) for key in fields_of(_Facts)}
    suite = Suite(name=name, tasks=tasks, experts=experts, unseen=unseen, ask=ask, path=path, **facts)
    _check_questions(suite)
    return suite


def _check_questions(suite: Suite) -> None:
    """Checks what the kind "regression" requires, and that no other kind has questions."""
    is_regression = suite.kind == "regression"
    odd = next((task.name for task in suite.tasks.values() if task.metric != "spearman"), None)
    wrong = {  # what is wrong, and how to mend it -> whether it is so
        ("ask is only for the kind regression", "remove ask"): not is_regression and bool(suite.ask),
        ("ask needs a question for each expert, and for no other", f"experts: {', '.join(suite.experts)}"): (
            is_regression and suite.ask.keys() != suite.experts.keys()
        ),
        ("the kind regression needs encoder-decoders", "head: seq2seq-lm"): is_regression
        and suite.head != "seq2seq-lm",
        (f"task {odd}: the kind regression measures rank correlation", "metric: spearman"): (
            is_regression and odd is not None
        ),
        ("the kind regression fits weights for each task, so no task can be unseen", "remove unseen"): (
            is_regression and bool(suite.unseen)
        ),
    }
    for (what, hint), is_so in wrong.items():
        if is_so:
            raise FusionError(f"{suite.path}: {what}", hint=hint)


def _question(content: object, where: KeyPath) -> Question:
    found = read_class(Question, content, where)
    if (found.target is None) == (not found.words):
        raise FusionError(f"{where}: a prompt needs either a target or two words", hint="words: [Yes, No]")
    names = _names(found.prompt, where) + _names(found.target or "", where)
    if unknown := set(names) - {"text", "text_pair"}:
        raise FusionError(
            f"{where} has the unknown placeholder {{{sorted(unknown)[0]}}}", hint="use {text} and {text_pair}"
        )
    return found


def _numbered(pool: str | dict[str, str], where: KeyPath) -> str | dict[str, str]:
    """Experts by name and source, where ranges of numbers were written: each number by itself."""
    if not isinstance(pool, Mapping):
        return pool
    found: dict[str, str] = {}
    for name, source in pool.items():
        if match := re.fullmatch(r"(.+)\{(\d+)-(\d+)\}(.*)", source):
            if max(len(match[2]), len(match[3])) > 4:
                at = where.inner("experts", name)
                raise FusionError(
                    f"{at}: {shown(source)} has numbers of more than four digits", hint="use smaller numbers"
                )
            numbers = range(int(match[2]), int(match[3]) + 1)
            found |= {f"{name}-{number}": f"{match[1]}{number}{match[4]}" for number in numbers}
        else:
            found[name] = source
    return found


def _checked(task: Task, where: KeyPath) -> Task:
    """A task whose keys are consistent, with its name in place of ``{task}``."""
    if bool(task.words) + bool(task.target) != bool(task.prompt):
        raise FusionError(
            f"{where}: a prompt needs either words or a target, and they need a prompt",
            hint="words: one for each class",
        )
    if task.metric == "ranked" and not (task.words or task.choices):
        raise FusionError(
            f"{where}: there are no choices to rank",
            hint="words: one for each class, or choices: the column that lists them",
        )
    if task.train is None and task.fitting.split == "train":
        raise FusionError(f"{where}: there is no train split to fit on", hint="fitting: {split: test}")
    filled: dict[str, Any] = {}
    for key in ("expert", "data", "config"):
        if template := getattr(task, key):
            filled[key] = _filled(template, task.name, where.inner(key))
    return replace(task, **filled)


def _names(template: str, where: KeyPath) -> list[str]:
    """The names in braces."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise FusionError(
            f"{where} is {shown(template)}, which is not a valid template ({error})",
            "{task} stands for the name of the task",
        ) from None


def _filled(template: str, task: str, where: KeyPath) -> str:
    if set(_names(template, where)) - {"task"}:
        raise FusionError(f"{where} is {shown(template)}: its only placeholder is {{task}}")
    return template.replace("{task}", task)


def _unseen(name: str, content: object, tasks: Mapping[str, Task], where: KeyPath) -> Holdout:
    split = read_class(Holdout, content, where, name=name)
    for task in (*split.fuse, *split.test):
        if task not in tasks:
            raise FusionError(f"{where}: there is no task {shown(task)}", suggestion(task, tasks))
    if both := set(split.fuse) & set(split.test):
        raise FusionError(
            f"{where}: {sorted(both)[0]} is both fused and tested", hint="list it under fuse or under test"
        )
    if without := [task for task in split.fuse if tasks[task].expert is None]:
        raise FusionError(f"{where}: {without[0]} has no expert to fuse", "remove it from fuse")
    return split
