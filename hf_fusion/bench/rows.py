"""The rows of a suite's tasks, with our columns: which of them train, fit and test."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from hf_fusion.bench.sources import is_hub_id
from hf_fusion.bench.suite import OUR_COLUMNS, Suite, Task
from hf_fusion.data import row_contents
from hf_fusion.errors import FusionError, one_line, path_suggestion, shown, suggestion
from hf_fusion.evaluation.choices import right_choices
from hf_fusion.extras import refuse_missing
from hf_fusion.hub.client import explain_hub_errors, hub_api
from hf_fusion.hub.commits import check_commit
from hf_fusion.hub.refs_to_files import repo_ref

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 0
DIGITS_TEST_SHARE = 0.25
LANGUAGE_FIT_ROWS = 1000
Parts = dict[str, "Dataset"]


@dataclass(frozen=True)
class Rows:
    """The rows of a task; columns text, text_pair and label; or image and label, which may be an array with a value
    for each pixel; or prompt and target.

    Attributes:
        fit: what may be learned from: neither of the others. (A text that stands twice in a train split that is cut may
            stand in both parts.)
        test: what is measured.
        load_train: reads `train`, which may be large and is seldom wanted.
    """

    fit: Dataset
    test: Dataset
    load_train: Callable[[], Dataset | None]

    @cached_property
    def train(self) -> Dataset | None:
        """What its expert was trained on, or could have been; None where the data set has no such split."""
        return self.load_train()


def task_rows(suite: Suite, task: str, data_dir: str | Path | None = None) -> Rows:
    """The rows of a task; always the same ones in the same order.

    Args:
        suite: see `load_suite`.
        task: one of its tasks.
        data_dir: the folder below which ``data:`` sources lie.

    Raises:
        FusionError: the suite has no such task, or its data set is missing or lacks a declared column.
    """
    if task not in suite.tasks:
        raise FusionError(f"{suite.name} has no task {task!r}", hint=suggestion(task, suite.tasks))
    declared = suite.tasks[task]
    split, file = declared.fitting.split, str(suite.path)
    parts = {part: ours(rows, declared, file) for part, rows in _parts(declared, {split, "test"}, data_dir).items()}
    train, fit, test = divide(parts, split, declared.fitting.share)

    def load_train() -> Dataset | None:
        found = [] if train is not None else [*_parts(declared, {"train"}, data_dir).values()]
        rows = _without(ours(found[0], declared, file), test, fit) if found else train
        return rows and single(rows)

    return Rows(single(fit), single(test), load_train)


def _parts(task: Task, wanted: Collection[str], data_dir: str | Path | None) -> Parts:
    """Some of the parts of a task's data set, those that it has."""
    scheme, _, name = task.data.partition(":")
    if is_hub_id(task.data):
        splits = {task.fitting.split: task.fitting.split, "train": task.train, "test": task.test}
        return {part: _hub_split(task, split) for part, split in splits.items() if split is not None and part in wanted}
    if scheme == "data":
        found = stored_parts(data_dir, name)
    else:
        package, _, rest = name.partition("/")
        if package not in PACKAGES:
            raise FusionError(
                f"{task.data} is not a source of rows",
                hint=suggestion(package, PACKAGES),
            )
        found = PACKAGES[package](rest, data_dir)
    return {part: rows for part, rows in found.items() if part in wanted}


def divide(parts: Parts, split: str = "train", share: float = 0.15) -> tuple[Any, Dataset, Dataset]:
    """Training rows, rows for fitting and test rows, which do not overlap.

    Training and fitting rows that also occur among the test rows are dropped; the division depends only on `SEED`.

    Args:
        parts: "test", and "train" or what `split` names.
        split: the source of the fitting rows: a share of "train" or "test", or all of another part.
        share: of the rows of that split.
    """
    test, train = parts["test"], parts.get("train")
    if split == "train":
        kept, fit = _cut(_without(parts["train"], test), share)
        return kept, fit, test
    if split == "test":
        test, fit = _cut(test, share)
        fit = _without(fit, test)
    else:
        fit = _without(parts[split], test)
        fit = fit if share == 1 else _cut(fit, share)[1]
    return (None if train is None else _without(train, test, fit)), fit, test


def single(rows: Dataset) -> Dataset:
    """A row with several second texts as a row for each of them, with the label that is its own."""
    if not len(rows) or not isinstance(rows[0].get("text_pair"), list):
        return rows
    several = ("text_pair", "label")
    if not isinstance(rows[0]["label"], list):
        raise FusionError(
            "rows have a list of second texts but a single label", hint="columns: {label: the column with lists}"
        )

    def each(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        counts = [len(values) for values in batch["text_pair"]]
        return {
            name: [value for values in column for value in values]
            if name in several
            else [value for value, count in zip(column, counts, strict=True) for _ in range(count)]
            for name, column in batch.items()
        }

    return rows.map(each, batched=True)


def _without(rows: Dataset, *others: Dataset) -> Dataset:
    seen = {content for other in others for content in row_contents(other)}
    return rows.select([number for number, content in enumerate(row_contents(rows)) if content not in seen])


def _cut(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The rows shuffled, and cut before their last share."""
    rows = rows.shuffle(seed=SEED)
    kept = round(len(rows) * (1 - share))
    return rows.select(range(kept)), rows.select(range(kept, len(rows)))


# ---------------------------------------------------------------- our columns


def ours(rows: Dataset, task: Task, file: str = "") -> Dataset:
    """Rows of a data set, with our columns.

    Args:
        rows: as the data set has them.
        task: says which column is which, or how prompts and targets are written from them.
        file: where the task is declared, for errors.

    Returns:
        Columns prompt and target for a task with a prompt, with choices and which are right where they are ranked; else
        those of `OUR_COLUMNS` that are there. Labels are classes of the names that the task gives, or of the data
        set's own.

    Raises:
        FusionError: a declared column is missing, or a label is not one of the classes.
    """
    written = ("prompt", "target") if {"prompt", "target"} <= set(rows.column_names) else ()
    theirs = {name: name for name in (*OUR_COLUMNS, *written) if name in rows.column_names} | task.columns
    for column in theirs.values():
        _need(column, rows, task, file)
    if task.prompt:
        return _prompted(rows, task, theirs.get("label", "label"), file)
    rows = rows.select_columns(list(theirs.values())).rename_columns({b: a for a, b in theirs.items() if a != b})
    rows = _pictured(rows)
    return _classed(rows, task, file) if task.classes and "label" in theirs else rows


def _pictured(rows: Dataset) -> Dataset:
    """Images that are arrays (3, H, W) of 0 to 1, as pictures of 8 bits, which are compared and corrupted as others."""
    from datasets import Array3D, Features, Image, concatenate_datasets
    from PIL import Image as Pillow

    from hf_fusion.io.picture_rows import with_pictures

    if not isinstance(rows.features.get("image"), Array3D):
        return with_pictures(rows)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        levels = (row["image"].clip(0, 1) * 255).round().astype("uint8")
        return {"image": Pillow.fromarray(levels.transpose(1, 2, 0))}

    images = rows.select_columns("image").with_format("numpy").map(one, features=Features({"image": Image()}))
    return concatenate_datasets([images.with_format(None), rows.remove_columns("image")], axis=1)


def _need(column: str, rows: Dataset, task: Task, file: str) -> None:
    if column not in rows.column_names:
        raise FusionError(
            f"{task.data} has no column {column!r}; it has {', '.join(rows.column_names)}",
            hint=f"correct the task {task.name} in {file}",
        )


def _classed(rows: Dataset, task: Task, file: str) -> Dataset:
    """Labels, numbers or names, as classes of the task's names."""
    from datasets import ClassLabel

    classes = [_place(label, task, file) for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", classes)
    return rows.cast_column("label", ClassLabel(names=list(task.classes)))


def _place(label: object, task: Task, file: str) -> int:
    """The number of a class, of its number or its name."""
    if str(label) in task.classes:  # also where they are numbers that do not begin at 0
        return task.classes.index(str(label))
    count = len(task.classes or task.words)
    if isinstance(label, int) and 0 <= label < count:
        return label
    raise FusionError(
        f"{task.data} has the label {shown(label)}, which is not one of its {count} classes",
        hint=f"correct classes or words of the task {task.name} in {file}",
    )


def _prompted(rows: Dataset, task: Task, label: str, file: str) -> Dataset:
    """Prompts and targets of a language model, written from the columns that they name."""
    wordings, answers = task.prompt, task.words or (task.target or "",)
    if task.words:
        _need(label, rows, task, file)
    for template in (*wordings, *answers):
        for _, name, _, _ in Formatter().parse(template):
            if name is not None:
                _need(re.split(r"[.\[]", name)[0], rows, task, file)

    is_ranked = task.metric == "ranked"
    for column in (task.choices, task.worth) if is_ranked else ():
        if column:
            _need(column, rows, task, file)

    def one(row: dict[str, Any], number: int) -> dict[str, Any]:
        answer = answers[_place(row[label], task, file)] if task.words else answers[0]
        written = {"prompt": wordings[number % len(wordings)].format(**row), "target": answer.format(**row)}
        if not is_ranked:
            return written
        choices = row[task.choices] if task.choices else [word.format(**row) for word in task.words]
        if not choices:
            raise FusionError(
                f"{task.data} has a row without choices: {shown(written['prompt'][:60])}",
                hint=f"set metric: exact for the task {task.name} in {file}",
            )
        right = right_choices(written["target"], choices, row[task.worth] if task.worth else None)
        return {**written, "target": choices[right[0]], "choices": choices, "right": right}

    return rows.map(one, with_indices=True, remove_columns=rows.column_names)


# ---------------------------------------------------------------- where rows come from


def stored_parts(data_dir: str | Path | None, name: str) -> Parts:
    """A folder with ``train.parquet`` and ``test.parquet``.

    Raises:
        FusionError: one of them is missing.
    """
    from datasets import Dataset

    hint = "--data DIR, with one folder per data set that has train.parquet and test.parquet"
    if data_dir is None:
        raise FusionError(f"the data set {name!r} is read from a folder, and no folder was given", hint=hint)
    files = {part: Path(data_dir) / name / f"{part}.parquet" for part in ("train", "test")}
    for file in files.values():
        if not file.is_file():
            raise FusionError(
                f"there is no data set {name!r} in {data_dir}: {file} is missing", path_suggestion(file, hint)
            )
    return {part: Dataset.from_parquet(str(file)) for part, file in files.items()}


def _digits(_: str, data_dir: str | Path | None) -> Parts:
    """The 1,797 scans of scikit-learn, 8 x 8, grey; a share is tested."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        refuse_missing(error, "the data set of digits", extra="bench")
        raise
    scans = load_digits()
    grey = (scans.images * 255 / 16).round().astype("uint8")  # (N, 8, 8), from grey levels 0..16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    columns = {"image": [Pillow.fromarray(image) for image in grey], "label": scans.target}
    rows = Dataset.from_dict(columns, features=features).shuffle(seed=SEED)
    tested = round(len(rows) * DIGITS_TEST_SHARE)
    return {"train": rows.select(range(tested, len(rows))), "test": rows.select(range(tested))}


def _language(name: str, data_dir: str | Path | None) -> Parts:
    """A task of the language suite: what its expert was trained on, what comes after that, and its tests."""
    from hf_fusion.assets.language_tasks import TASKS, TEST_ROWS, rows

    trained = TASKS[name].trained if name in TASKS else 0
    drawn = rows(name, "train", trained + LANGUAGE_FIT_ROWS, data_dir).select_columns(["prompt", "target"])
    numbers = range(len(drawn))
    parts = {"train": numbers[:trained], "validation": numbers[trained:]}
    found = {part: drawn.select(list(indices)) for part, indices in parts.items() if indices}
    return {**found, "test": rows(name, "test", TEST_ROWS, data_dir).select_columns(["prompt", "target"])}


def _general(name: str, data_dir: str | Path | None) -> Parts:
    """A task of smollm-general, asked in the way that its name ends with: "sentiment", "sentiment-second"."""
    from hf_fusion.assets.general_tasks import TASKS, WAYS, asked
    from hf_fusion.assets.language_tasks import TEST_ROWS, task_named

    task, _, way = name.rpartition("-")
    if way not in WAYS:
        task, way = name, "alone"
    declared = task_named(task, TASKS)
    seen = declared.trained if declared.held_in else 0
    drawn = asked(declared, way, "train", seen + LANGUAGE_FIT_ROWS, data_dir)
    found = {"validation": drawn.select(range(min(seen, len(drawn)), len(drawn)))}
    if seen and way == "alone":
        found["train"] = drawn.select(range(min(seen, len(drawn))))
    return {**found, "test": asked(declared, way, "test", TEST_ROWS, data_dir)}


def _reactions(_: str, data_dir: str | Path | None) -> Parts:
    from hf_fusion.assets.rxnfp import reactions

    return {"test": reactions()}


def _hub_split(task: Task, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.constants import HF_HUB_OFFLINE

    ref = repo_ref(task.data)
    name, revision = ref.id, ref.revision
    hint = f"hf-fusion bench check --suite NAME, or correct the task {task.name}"
    if ref.commit and not HF_HUB_OFFLINE:
        with explain_hub_errors(name):
            check_commit(name, revision, hub_api(None).dataset_info(name, revision=revision).sha)
    try:
        return load_dataset(name, task.config, split=split, revision=revision)
    except DatasetNotFoundError:
        raise FusionError(f"the Hub has no data set {task.data}, or it is private or gated", hint=hint) from None
    except RuntimeError:  # datasets' refusal of loading scripts, among others
        with explain_hub_errors(name):
            if not hub_api(None).file_exists(
                name, f"{ref.repo.rpartition('/')[2]}.py", repo_type="dataset", revision=revision
            ):
                raise
    except ValueError as error:  # no such configuration or split
        raise FusionError(f"{task.data}: {one_line(error)}", hint=hint) from None
    # the Hub converts what a loading script returns to Parquet, on a separate branch
    files = f"hf://datasets/{name}@refs%2Fconvert%2Fparquet/{task.config or 'default'}/{split}/*.parquet"
    try:
        return load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError) as error:  # the Hub's client fails, or there are no such files
        raise FusionError(
            f"{task.data} has a loading script, which is not run, and no Parquet files ({one_line(error)})", hint=hint
        ) from None


PACKAGES: dict[str, Callable[[str, Any], Parts]] = {
    "digits": _digits,
    "general": _general,
    "language": _language,
    "reactions": _reactions,
}
"""First part of a ``package:`` source → the function that makes its rows of the rest and the data folder."""
