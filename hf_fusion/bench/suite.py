"""Suites: what is fused, on which tasks it is measured, and where all of it comes from. Each is a file in `suites/`.

What a source of models or rows may be, see `bench.sources`.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion.bench.sources import is_hub_id
from hf_fusion.errors import FusionError, one_line, shown, suggestion
from hf_fusion.io.files import read_text
from hf_fusion.io.yaml_files import read_yaml

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
    "accuracy": "share of right classes",
    "f1": "harmonic mean of precision and recall",
    "matthews": "Matthews correlation",
    "spearman": "rank correlation",
    "exact": "share of answers that are right to the letter",
    "ranked": "share of rows whose right choice is the likeliest",
    "tokens": "share of right next tokens",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "share of written answers that are right to the letter",
    "spearman_text": "rank correlation of the numbers in written answers",
    "perplexity": "of the targets",
    "agreement": "cosine of the embedding with the own expert's",
    "mean_iou": "mean overlap of predicted and true segments",
    "absolute_error": "mean distance from the true depth",
    "angle": "mean angle to the true normals, degrees",
}
LOWER = frozenset({"perplexity", "absolute_error", "angle"})
"""Metrics on a scale of their own, of which less is better; all others are shares, of which more is better."""


@dataclass(frozen=True)
class Fitting:
    """Which rows may be learned from: they trained no expert and are not tested.

    Attributes:
        split: "train" or "test", of which a share is cut off; or a split of the data set that is neither.
        share: of the split's rows.
    """

    split: str = "train"
    share: float = 0.15


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        name: its key in the file.
        data: source of its rows.
        metric: a key of `METRICS`.
        expert: source of the expert that was trained on it; None for a held-out task.
        config: configuration of a data set on the Hub.
        train, test: its splits; `train` None where it has none.
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
    data: str
    metric: str = "accuracy"
    expert: str | None = None
    config: str | None = None
    train: str | None = "train"
    test: str = "test"
    columns: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    target: str | None = None
    choices: str | None = None
    worth: str | None = None
    fitting: Fitting = Fitting()


@dataclass(frozen=True)
class Question:
    """How a language model is asked for a score of a row.

    Attributes:
        prompt: with our columns in braces.
        target: the text, with our columns in braces, whose mean log-likelihood of a token is the score (BARTScore).
        words: or two answers: the score is the probability of the first where only these are possible (UniEval).
    """

    prompt: str
    target: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Holdout:
    """Which experts are fused, and which held-out tasks they are tested on, with the heads of these tasks' own experts.

    Attributes:
        name: its key in the file.
        fuse: tasks whose experts are fused.
        test: tasks that none of them was trained on.
    """

    name: str
    fuse: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """What is fused and measured.

    Attributes:
        name: of its file.
        title: what reports call it.
        kind: "merging": full models or adapters of one base, one head for each task, which is told; "routing": adapters
            of one base, the task is not told; "fusion": the tasks' rows are pooled, the task is not told; "regression":
            models that score texts, as people did.
        head: what its models answer with, one of `HEADS`.
        tasks: by name, in order.
        experts: name → source: those of the tasks, under their names, and those that belong to none.
        base: source of what the experts were made from; None where they differ.
        multitask: source of one model that was trained on all tasks at once; None where there is none.
        build: the command that makes the experts here; None where they are downloaded.
        unseen: which experts are fused, and which held-out tasks are tested.
        ask: of the kind "regression": expert → how it is asked for a score.
        about: what else its reader should know.
        path: its file.
    """

    name: str
    title: str
    kind: str
    head: str
    tasks: dict[str, Task]
    experts: dict[str, str]
    base: str | None = None
    multitask: str | None = None
    build: str | None = None
    unseen: tuple[Holdout, ...] = ()
    ask: Mapping[str, Question] = field(default_factory=dict)
    about: str = ""
    path: Path = SUITES

    @property
    def is_local(self) -> bool:
        """Whether nothing comes from the Hub: models and rows lie on this machine, or can be made here."""
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
        return next((name for name, own in self.experts.items() if own == source), None)


def suite_names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str | Path) -> Suite:
    """A suite by name, or from a file.

    Args:
        name: one of `suite_names()`, or the path of a ``.yaml`` file.

    Raises:
        FusionError: there is no such suite, or something in its file is wrong, which is named.
    """
    path = Path(name) if str(name).endswith(".yaml") else SUITES / f"{name}.yaml"
    if not path.is_file():
        hint = f"{suggestion(name, suite_names())} (or the path of a .yaml file)"
        raise FusionError(f"no suite {str(name)!r}", hint=hint)
    return _suite(path.stem, _content(path), path)


# ---------------------------------------------------------------- reading


def holdouts_named(suite: Suite, words: Sequence[str]) -> list[Holdout]:
    """A suite's holdouts by name; "all" are all of them.

    Raises:
        FusionError: it has none of that name.
    """
    known = {holdout.name: holdout for holdout in suite.unseen}
    for name in words:
        if name != "all" and name not in known:
            raise FusionError(f"{suite.name} has no unseen split {name!r}", hint=", ".join(known) or "leave it out")
    return list(suite.unseen) if "all" in words else [known[name] for name in words]


def _content(path: Path) -> dict[str, Any]:
    """The file's keys; those of the suite that it extends, where it has none of its own."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise FusionError(f"{path} holds no suite: keys and values are expected", hint=_allowed(_SUITE))
    content = dict(content)
    if (parent := content.pop("extends", None)) is None:
        return content
    other = _beside(path, f"{parent}.yaml")
    if not os.path.isfile(other):  # noqa: PTH113
        raise FusionError(
            f"{path}: extends {shown(parent)}, which is not there", hint=f"use one of {', '.join(suite_names())}"
        )
    inherited = read_yaml(other)
    if not isinstance(inherited, Mapping):
        raise FusionError(f"{other} holds no suite: keys and values are expected", hint=_allowed(_SUITE))
    if "extends" in inherited:
        raise FusionError(f"{path}: extends {parent}, which extends another", hint=f"extends: {inherited['extends']}")
    return {**inherited, **content}


def _beside(path: Path, name: str) -> Path:
    """A file beside a suite's, or among the package's suites."""
    own = path.parent / name
    return own if os.path.isfile(own) else SUITES / name  # noqa: PTH113 - pathlib raises for names that are too long


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return _is_text(value) or isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_columns(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, [*value, *value.values()]))


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_text, value))


def _one_of(names: Any) -> tuple[Callable[[object], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


Check = tuple[Callable[[object], bool], str]
_TEXT: Check = (_is_text, "a text")
_MAYBE: Check = (lambda value: value is None or _is_text(value), "a text or null")
_LIST: Check = (_is_texts, "a list of texts")
# key -> (whether a value will do, what is expected)
_SUITE: dict[str, Check] = {
    "title": _TEXT,
    "kind": _one_of(KINDS),
    "head": _one_of(HEADS),
    "base": _MAYBE,
    "multitask": _MAYBE,
    "build": _MAYBE,
    "about": _TEXT,
    "experts": (
        lambda value: _is_text(value) or _is_columns(value),
        "a source with {task} in it, or names and sources",
    ),
    "defaults": (lambda value: isinstance(value, Mapping), "keys of a task and values"),
    "tasks": (_is_mapping, "names of tasks, each with its keys"),
    "unseen": (_is_mapping, "names of splits, each with fuse and test"),
    "ask": (_is_mapping, "names of experts, each with a prompt, and a target or two words"),
}
_ASK: dict[str, Check] = {
    "prompt": _TEXT,
    "target": _TEXT,
    "words": (lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_text, value)), "two texts"),
}
_TASK: dict[str, Check] = {
    "data": _TEXT,
    "metric": _one_of(METRICS),
    "expert": _MAYBE,
    "config": _MAYBE,
    "train": _MAYBE,
    "test": _TEXT,
    "columns": (_is_columns, "our columns and the data set's"),
    "classes": (_is_texts, "a list of names, or the file that holds one a line"),
    "templates": _LIST,
    "prompt": _LIST,
    "words": _LIST,
    "target": _MAYBE,
    "choices": _MAYBE,
    "worth": _MAYBE,
    "fitting": (lambda value: isinstance(value, Mapping), "split and share"),
}
_FITTING: dict[str, Check] = {
    "split": _TEXT,
    "share": (lambda value: isinstance(value, (int, float)) and 0 < value <= 1, "a number above 0, at most 1"),
}
_UNSEEN: dict[str, Check] = {"fuse": _LIST, "test": _LIST}
OUR_COLUMNS = ("text", "text_pair", "image", "label")


def _allowed(known: Mapping[str, Check]) -> str:
    return f"use {', '.join(known)}"


def _checked(content: object, known: Mapping[str, Check], needed: tuple[str, ...], where: str) -> dict[str, Any]:
    """Plain values whose keys are known and whose values will do."""
    if not isinstance(content, Mapping):
        raise FusionError(f"{where} is {shown(content)}, keys and values are expected", hint=_allowed(known))
    for key, value in content.items():
        if key not in known:
            raise FusionError(f"{where} has an unknown key {shown(key)}", hint=_allowed(known))
        is_valid, expected = known[key]
        if not is_valid(value):
            raise FusionError(f"{where}: {key} is {shown(value)}, expected {expected}")
    if missing := [key for key in needed if key not in content]:
        raise FusionError(f"{where} lacks the key {missing[0]!r}", hint=f"{missing[0]}: {known[missing[0]][1]}")
    return dict(content)


def _suite(name: str, content: dict[str, Any], path: Path) -> Suite:
    given = _checked(content, _SUITE, ("title", "kind", "head", "tasks"), str(path))
    defaults = _checked(given.pop("defaults", {}), _TASK, (), f"{path}: defaults")
    pool = _numbered(given.pop("experts", {}))
    told = {
        key: _checked({} if own is None else own, _TASK, (), f"{path}: task {one_line(key)}")
        for key, own in given["tasks"].items()
    }
    tasks = {key: _task(key, {**defaults, **own}, pool, path) for key, own in told.items()}
    experts = {} if isinstance(pool, str) else dict(pool)
    named = set(experts.values())
    experts |= {task.name: task.expert for task in tasks.values() if task.expert and task.expert not in named}
    if not experts:
        raise FusionError(f"{path} names no expert", hint="experts: owner/name-{task}")
    given["tasks"] = tasks
    unseen = tuple(_unseen(key, own, tasks, path) for key, own in given.pop("unseen", {}).items())
    ask = {key: _question(own, f"{path}: ask {key}") for key, own in given.pop("ask", {}).items()}
    suite = Suite(name=name, experts=experts, unseen=unseen, ask=ask, path=path, **given)
    _check_questions(suite)
    return suite


def _check_questions(suite: Suite) -> None:
    """Whether experts are asked for scores where the suite is one of regression, and nowhere else."""
    is_regression = suite.kind == "regression"
    odd = next((task.name for task in suite.tasks.values() if task.metric != "spearman"), None)
    wrong = {  # what is said of it, and how to mend it -> whether it is so
        ("experts of regression, and no others, are asked for scores", "ask: one for each"): (
            suite.ask.keys() != (suite.experts.keys() if is_regression else set())
        ),
        ("scores are those of encoder-decoders", "head: seq2seq-lm"): is_regression and suite.head != "seq2seq-lm",
        (f"task {odd}: scores are compared by rank", "metric: spearman"): is_regression and odd is not None,
        ("scores are weighed for each task, so that none is unseen", "leave out unseen"): (
            is_regression and bool(suite.unseen)
        ),
    }
    for (what, hint), is_so in wrong.items():
        if is_so:
            raise FusionError(f"{suite.path}: {what}", hint=hint)


def _question(content: object, where: str) -> Question:
    given = _checked(content, _ASK, ("prompt",), where)
    if ("target" in given) == ("words" in given):
        raise FusionError(f"{where}: a prompt has either a target or two words", hint="words: [Yes, No]")
    names = _names(given["prompt"]) + _names(given.get("target", ""))
    if unknown := set(names) - {"text", "text_pair"}:
        raise FusionError(f"{where} has {{{sorted(unknown)[0]}}}", hint="use {text} and {text_pair}")
    return Question(given["prompt"], given.get("target"), tuple(given.get("words", ())))


def _numbered(pool: Any) -> Any:
    """Experts by name and source, where ranges of numbers were written: each number by itself."""
    if not isinstance(pool, Mapping):
        return pool
    found: dict[str, str] = {}
    for name, source in pool.items():
        if match := re.fullmatch(r"(.+)\{(\d+)-(\d+)\}(.*)", source):
            if max(len(match[2]), len(match[3])) > 4:
                raise FusionError(f"experts: {shown(source)} counts too far", hint="numbers of at most four digits")
            numbers = range(int(match[2]), int(match[3]) + 1)
            found |= {f"{name}-{number}": f"{match[1]}{number}{match[4]}" for number in numbers}
        else:
            found[name] = source
    return found


def _task(name: str, content: object, pool: Any, path: Path) -> Task:
    where = f"{path}: task {one_line(name)}"
    given = _checked(content, _TASK, ("data",), where)
    for key in ("templates", "prompt", "words", "classes"):
        if key in given:
            given[key] = _texts(given[key], path, f"{where}: {key}", lines=key == "classes")
    if unknown := set(given.get("columns", {})) - set(OUR_COLUMNS):
        raise FusionError(f"{where}: columns has {shown(sorted(unknown)[0])}", hint=f"use {', '.join(OUR_COLUMNS)}")
    if "fitting" in given:
        given["fitting"] = Fitting(**_checked(given["fitting"], _FITTING, (), f"{where}: fitting"))
    answers = [key for key in ("words", "target") if given.get(key)]
    if len(answers) != ("prompt" in given):
        raise FusionError(f"{where}: a prompt has either words or a target", hint="words: one for each class")
    if given.get("metric") == "ranked" and not (given.get("words") or given.get("choices")):
        raise FusionError(f"{where}: nothing to rank", hint="words: one for each class, or choices: the column of them")
    if given.get("train", "train") is None and given.get("fitting", Fitting()).split == "train":
        raise FusionError(
            f"{where}: without train rows something must be fitted on others", hint="fitting: {split: test}"
        )
    if "expert" not in given:
        given["expert"] = pool if isinstance(pool, str) else pool.get(name)
    elif isinstance(pool, Mapping) and given["expert"] in pool:
        given["expert"] = pool[given["expert"]]
    for key in ("expert", "data", "config"):
        if given.get(key):
            given[key] = _filled(given[key], name, f"{where}: {key}")
    return Task(name=name, **given)


def _texts(value: Any, path: Path, where: str, lines: bool) -> tuple[str, ...]:
    """A list as it is, a text as its only element; and where `lines` is set, the lines of the file of that name."""
    if isinstance(value, list):
        return tuple(value)
    if not lines:
        return (value,)
    file = _beside(path, value)
    if not os.path.isfile(file):  # noqa: PTH113
        raise FusionError(f"{where}: {one_line(file)} is missing", hint="a list of names, or a file beside the suite's")
    return tuple(read_text(file).splitlines())


def _names(template: str) -> list[str]:
    """What stands in braces."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise FusionError(f"{shown(template)} cannot be filled in ({error})", hint="{task} stands for a name") from None


def _filled(template: str, task: str, where: str) -> str:
    if set(_names(template)) - {"task"}:
        raise FusionError(f"{where} is {shown(template)}: only {{task}} can stand in it")
    return template.replace("{task}", task)


def _unseen(name: str, content: object, tasks: Mapping[str, Task], path: Path) -> Holdout:
    where = f"{path}: unseen {one_line(name)}"
    given = _checked(content, _UNSEEN, ("fuse", "test"), where)
    split = Holdout(name, *(_texts(given[key], path, where, lines=False) for key in ("fuse", "test")))
    for task in (*split.fuse, *split.test):
        if task not in tasks:
            raise FusionError(f"{where}: no task {shown(task)}", hint=f"use {', '.join(tasks)}")
    if both := set(split.fuse) & set(split.test):
        raise FusionError(f"{where}: {sorted(both)[0]} is both fused and tested", hint="unseen tasks are not fused")
    if without := [task for task in split.fuse if tasks[task].expert is None]:
        raise FusionError(f"{where}: {without[0]} has no expert to fuse")
    return split
