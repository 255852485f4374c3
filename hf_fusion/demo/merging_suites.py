"""Suites of full fine-tunes of one base, which `examples/train_experts.py` trains, and their folders.

Files in `hf_fusion/bench/suites` tell what they are made of, `hf_fusion.bench.rows` which rows are whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_fusion.assets.minilm import MINILM, minilm_folder
from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.suite import Suite, load_suite
from hf_fusion.errors import FusionError
from hf_fusion.io.cache import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MergingSuite:
    """Experts that are merged with each other, one for each task.

    Attributes:
        declared: its file.
        head: what its experts read and classify.
        base: id on the Hub of what they were fine-tuned from; None for a base that is trained with them.
    """

    declared: Suite
    head: Literal["text", "image"]
    base: str | None

    @property
    def name(self) -> str:
        """What `--suite` calls it."""
        return self.declared.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Folder names of its data sets, and of its experts."""
        return tuple(self.declared.tasks)

    def rows(self, data_dir: str | Path, task: str) -> tuple[Dataset, Dataset, Dataset]:
        """The rows of a task: those that train its expert, those kept to adapt a merged model, and the test rows.

        Args:
            data_dir: folder that holds the data sets.
            task: one of `tasks`.

        Returns:
            (train, adapt, test), each with columns text, label and, for pairs, text_pair; or image and label.

        Raises:
            FusionError: the suite has no such task, or the data set is not there.
        """
        rows = task_rows(self.declared, task, data_dir)
        assert rows.train is not None
        return rows.train, rows.fit, rows.test


SUITES = {
    suite.name: suite
    for suite in (
        MergingSuite(load_suite("minilm-8"), "text", MINILM),
        MergingSuite(load_suite("vision-6"), "image", None),
        MergingSuite(load_suite("unseen-skewed"), "text", MINILM),
        MergingSuite(load_suite("unseen-wide"), "text", MINILM),
        MergingSuite(load_suite("unseen-few"), "text", MINILM),
    )
}


def experts_folder(suite: MergingSuite) -> Path:
    """Default folder of the suite's experts, with one folder per task, and the base if trained."""
    return cache_folder() / "merging" / suite.name


def trained_experts(suite: MergingSuite, folder: Path | None = None) -> tuple[Path, dict[str, Path]]:
    """The base's folder, and task -> the folder of its expert.

    Args:
        suite: one of `SUITES`.
        folder: where they are; default: `experts_folder(suite)`.

    Raises:
        FusionError: one of them is not trained yet, or the base's wheel is not installed.
    """
    folder = folder or experts_folder(suite)
    base = minilm_folder() if suite.base == MINILM else folder / "base"
    experts = {task: folder / task for task in suite.tasks}
    if missing := [path.name for path in (base, *experts.values()) if not path.is_dir()]:
        raise FusionError(
            f"{suite.name} is not trained yet: {folder} lacks {', '.join(missing)}",
            hint=f"train it: python examples/train_experts.py --data DIR --suite {suite.name} --output {folder.parent}",
        )
    return base, experts
