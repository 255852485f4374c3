"""The trials of a search as JSON lines: each is written when it ends, and a search that was interrupted reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError, writing
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.saving import write_file
from hf_fusion.schema import KeyPath, read_class

TRIALS_FILE = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried.

    Attributes:
        number: from 0, which is the start of the search.
        parameters: the numbers that were searched for, by their key paths in the recipe.
        scores: on the first rows, then on more of them, as far as the trial was among the best; empty if it failed.
        rows: the number of rows of each of these scores.
        complete: whether the last score is that of all rows that are searched on.
        seconds: wall-clock time.
        failed: why it could not be merged, or "".
    """

    number: int
    parameters: dict[str, float]
    scores: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0
    failed: str = ""

    @property
    def rank(self) -> tuple[int, float]:
        """What trials are ordered by: on how many rows they were measured, then their score there."""
        return (len(self.scores), self.scores[-1]) if self.scores else (0, 0.0)


SEARCH = '{"search": '
"""How the first line of the file begins."""


class TrialsFile:
    """The file of a search's trials: a first line that says what is searched, then one line for each trial.

    Args:
        path: of the file.
        about: what is searched, as plain data. The trials of another search are refused.
        overwrite: whether they are replaced instead.

    Attributes:
        trials: that the file has, in order.

    Raises:
        FusionError: the file is of another search, or is not one of trials.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.trials: list[Trial] = []
        first = json.dumps({"search": about}, ensure_ascii=False)
        if path.exists() and not overwrite:
            self._read(first)
        self._rewrite(first)

    def add(self, trial: Trial) -> None:
        """Writes a further trial."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(trial))
        self.trials.append(trial)

    def _read(self, first: str) -> None:
        own_file(self.path)
        lines = read_text(self.path).split("\n")
        complete = lines[:-1]  # a last line without an end was being written when the search was killed
        if len(complete) == 1 and complete[0].startswith(SEARCH):
            return  # a search that ended before its first trial: nothing is lost
        if not complete or complete[0] != first:
            raise FusionError(
                f"{self.path} has the trials of another search",
                "choose another --output, or replace them: --overwrite (overwrite=True in Python)",
            )
        for number, line in enumerate(complete[1:]):
            where = KeyPath(f"{self.path}: line {number + 2}")
            try:
                content = json.loads(line)
            except ValueError:
                raise FusionError(f"{where} is not JSON", "remove the line and those after it") from None
            trial = read_class(Trial, content, where)
            if trial.number != number:
                raise FusionError(f"{where} is trial {trial.number}, expected {number}", "remove it and those after it")
            self.trials.append(trial)

    def _rewrite(self, first: str) -> None:
        """Writes what was read again, without a line that is not complete."""
        write_file(self.path, first + "\n" + "".join(map(_line, self.trials)))


def _line(trial: Trial) -> str:
    return json.dumps(asdict(trial), ensure_ascii=False) + "\n"


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score on all rows; of equal ones the first."""
    return max((trial for trial in trials if trial.complete), key=lambda trial: (trial.scores[-1], -trial.number))


__all__ = ["TRIALS_FILE", "Trial", "TrialsFile", "best_of"]
