"""Suites of full fine-tunes of one base: what merging is measured with, and which rows are whose.

A data set is a folder with `train.parquet` and `test.parquet`: columns text, label and, for pairs, text_pair; or image
and label. Most of its train rows train the expert; the rest is kept apart for whoever adapts a merged model.
`examples/train_experts.py` trains the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_fusion.demo.minilm import MINILM, minilm_folder
from hf_fusion.demo.text_suites import SEED, splits
from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from datasets import Dataset

ADAPT_SHARE = 0.15
"""Share of the train rows that no expert sees."""

DIGITS = "digits"
"""The task whose rows come with scikit-learn: scans of 8 x 8, of which this share is tested."""
DIGITS_TEST_SHARE = 0.25

CACHE = Path("~/.cache/hf_fusion/merging").expanduser()


@dataclass(frozen=True)
class MergingSuite:
    """Experts that are merged with each other, one for each task.

    Attributes:
        name: what `--suite` calls it.
        head: what its experts read and classify.
        base: id on the Hub of what they were fine-tuned from; None for a base that is trained with them.
        tasks: folder names of its data sets, and of its experts.
    """

    name: str
    head: Literal["text", "image"]
    base: str | None
    tasks: tuple[str, ...]

    def rows(self, data_dir: str | Path, task: str) -> tuple[Dataset, Dataset, Dataset]:
        """The rows of a task: those that train its expert, those kept to adapt a merged model, and the test rows.

        Train rows that occur among the test rows are dropped; the division depends on nothing but `SEED`.

        Args:
            data_dir: folder that holds the data sets.
            task: one of `tasks`.

        Returns:
            (train, adapt, test), each with columns text, label and, for pairs, text_pair; or image and label.

        Raises:
            FusionError: the suite has no such task, or the data set is not there.
        """
        if task not in self.tasks:
            raise FusionError(f"{self.name} has no task {task!r}", hint=f"use one of {', '.join(self.tasks)}")
        if self.head == "text":
            return splits(data_dir, task, ADAPT_SHARE)
        train, test = _digits() if task == DIGITS else _read_images(Path(data_dir), task)
        seen = set(_encoded(test))
        train = train.select([row for row, image in enumerate(_encoded(train)) if image not in seen])
        train = train.shuffle(seed=SEED)
        kept = round(len(train) * (1 - ADAPT_SHARE))
        return train.select(range(kept)), train.select(range(kept, len(train))), test


SUITES = {
    suite.name: suite
    for suite in (
        MergingSuite(
            "minilm-8",
            "text",
            MINILM,
            ("sst2", "trec", "subj", "tweet_emotion", "banking77", "snips", "cola", "mrpc"),
        ),
        MergingSuite("vision-6", "image", None, ("mnist", "fashion_mnist", "usps", "pneumonia", "cifar10", DIGITS)),
    )
}


def experts_folder(suite: MergingSuite) -> Path:
    """Where the suite's experts lie when no other place is given: one folder for each task, and the base if trained."""
    return CACHE / suite.name


def trained_experts(suite: MergingSuite, folder: Path | None = None) -> tuple[Path, dict[str, Path]]:
    """The base's folder, and task -> the folder of its expert.

    Args:
        suite: one of `SUITES`.
        folder: where they lie; default `experts_folder(suite)`.

    Raises:
        FusionError: one of them is not trained yet, or the base's wheel is not installed.
    """
    folder = folder or experts_folder(suite)
    base = minilm_folder() if suite.base == MINILM else folder / "base"
    experts = {task: folder / task for task in suite.tasks}
    if missing := [path.name for path in (base, *experts.values()) if not path.is_dir()]:
        raise FusionError(
            f"{suite.name} is not trained yet: {folder} lacks {', '.join(missing)}",
            hint=f"python examples/train_experts.py --data DIR --suite {suite.name} --output {folder.parent}",
        )
    return base, experts


def _read_images(data_dir: Path, task: str) -> tuple[Dataset, Dataset]:
    from datasets import Dataset

    folder = data_dir / task
    for part in ("train", "test"):
        if not (folder / f"{part}.parquet").is_file():
            raise FusionError(
                f"no data set {task!r} in {data_dir}: {folder / f'{part}.parquet'} is missing",
                hint="--data DIR with one folder per data set, each with train.parquet and test.parquet",
            )
    train, test = (Dataset.from_parquet(str(folder / f"{part}.parquet")) for part in ("train", "test"))
    return train, test


def _digits() -> tuple[Dataset, Dataset]:
    """The 1,797 scans of scikit-learn, 8 x 8, grey."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise FusionError("the digits need scikit-learn, which is not installed", "pip install scikit-learn") from None
    scans = load_digits()
    grey = (scans.images * 255 / 16).round().astype("uint8")  # (N, 8, 8), from grey levels 0..16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    columns = {"image": [Pillow.fromarray(image) for image in grey], "label": scans.target}
    rows = Dataset.from_dict(columns, features=features).shuffle(seed=SEED)
    tested = round(len(rows) * DIGITS_TEST_SHARE)
    return rows.select(range(tested, len(rows))), rows.select(range(tested))


def _encoded(rows: Dataset) -> list[bytes]:
    """The file of every row's image."""
    from datasets import Image

    return [image["bytes"] for image in rows.cast_column("image", Image(decode=False))["image"]]
