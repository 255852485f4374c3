"""Cells: what one technique scored on one task, with everything needed to judge the number and to measure it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.intervals import Z95
from hf_fusion.evaluation.results import FUSED, RESULTS_FILE, Results
from hf_fusion.io.files import read_text
from hf_fusion.io.saving import in_folder, write_file
from hf_fusion.recipe import RECIPE_FILE, Recipe

Status = Literal["measured", "failed", "left out"]
STATUS_WORDS = {"left out": "not applicable"}  # status → what tables and progress call it, where that differs
CLEAN = "clean"
_FAMILIES = {"foe": "fusion", "ensemble": "ensemble", "phatgoose": "routing", "wemoe": "mixture"}
ALL = "all"


@dataclass(frozen=True)
class Cell:
    """One technique on one task.

    Attributes:
        suite: name.
        task: name.
        method: a key of `bench.methods.METHODS`, or `expert:NAME` for a single expert.
        family: what the method is: a key of `bench.methods.FAMILIES`.
        variant: "default", or "tuned" where parameters were chosen on the validation splits.
        condition: "clean", or corruption and severity: "gaussian_noise:3".
        split: which experts are fused: "all", or the name of one of the suite's holdouts.
        group: "held-in", or "held-out" where no fused expert was trained on the task.
        seed: seed of all randomness; for a deterministic method, that of the run.
        metric: a key of `bench.suite.METRICS`.
        status: "failed" and "left out" have a reason and no score.
        reason: why the method has no score.
        score: 0 to 1, or the metric's own scale.
        ci95: its 95 % interval over the test rows.
        n: test rows.
        rows: the score of each test row, in their order, for paired comparisons; None where the metric is not a mean
            over rows.
        parameters: of the method, as they were used.
        seconds: wall-clock time of the evaluation of this cell.
        cpu_seconds: CPU time of the evaluation of this cell.
        gpu_seconds: GPU time of the evaluation of this cell.
        fuse_seconds: wall-clock time of fusing (and fitting, adapting, tuning), once for all cells of the model.
        fuse_cpu_seconds: CPU time of the same.
        peak_bytes: peak memory of the process, or of its GPU, while the model was fused and measured.
        stored: number of parameters of the fused model.
        active: number of parameters that one example uses.
        cost: multiplications per forward pass, as a multiple of the dense base's.
        command: the command that repeats the measurement.
        machine: what it ran on.
        versions: package -> version.
        shas: model or data set -> commit, or digest of the weights where there is none.
    """

    suite: str
    method: str
    task: str
    family: str
    variant: str = "default"
    condition: str = CLEAN
    split: str = ALL
    group: str = "held-in"
    seed: int = 0
    metric: str = "accuracy"
    status: Status = "measured"
    reason: str = ""
    score: float | None = None
    ci95: tuple[float, float] | None = None
    n: int = 0
    rows: list[float] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    fuse_seconds: float = 0.0
    fuse_cpu_seconds: float = 0.0
    peak_bytes: int = 0
    stored: int = 0
    active: int = 0
    cost: float = 1.0
    command: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    shas: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Its file, below the folder of the results."""
        parts = (
            self.suite,
            self.split,
            f"{self.method}.{self.variant}",
            self.condition,
            f"{self.task}.s{self.seed}.json",
        )
        return Path(*(re.sub(r"[^\w.,+-]", "-", part) for part in parts))

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Cell:
        """Makes a cell from the content of JSON.

        Raises:
            FusionError: a key is unknown or missing.
        """
        known = {row.name for row in fields(cls)}
        if unknown := given.keys() - known:
            raise FusionError(
                f"a cell has the unknown key {sorted(unknown)[0]!r}; a newer version may have written it",
                "pip install -U hf_fusion",
            )
        values = dict(given)
        if values.get("ci95") is not None:
            values["ci95"] = tuple(values["ci95"])
        try:
            return cls(**values)
        except TypeError as error:
            raise FusionError(f"a cell is incomplete: {error}") from None


def write_cell(folder: str | Path, cell: Cell) -> Path:
    """Writes a cell's file, all of it or nothing."""
    path = Path(folder) / cell.path
    with in_folder(path.parent):
        return write_file(path, json.dumps(asdict(cell), indent=1) + "\n")


def read_cells(source: str | Path) -> list[Cell]:
    """The cells of a run's folder (one file each), or of `.jsonl` files (one line each), in the order of their paths.

    For a fused model's folder or its ``results.json``, cells are its scores in lm-evaluation-harness.

    Raises:
        FusionError: there are no cells, or a line is not a cell.
    """
    source = Path(source)
    files = [source] if source.is_file() else sorted([*source.rglob("*.json"), *source.rglob("*.jsonl")])
    measured = [file for file in files if file.name == RESULTS_FILE]
    models = {file.parent for file in measured}  # whose other files are no cells
    files = [file for file in files if models.isdisjoint(file.parents)]
    cells: dict[Path, Cell] = {cell.path: cell for file in measured for cell in harness_cells(file)}
    for file in files:
        if file.name.startswith(".") or file.name == LEADERBOARD:
            continue
        text = read_text(file, source if source.is_dir() else None)
        shared: dict[str, Any] = {}  # of the line before
        for number, line in enumerate(text.splitlines() if file.suffix == ".jsonl" else [text], 1):
            try:
                values = {**shared, **json.loads(line)}
                shared = {name: values[name] for name in SHARED if name in values}
                cell = Cell.from_dict(values)
            except (ValueError, AttributeError, FusionError) as error:
                raise FusionError(
                    f"line {number} of {file} is not a cell: {error}", hint="delete it and run again"
                ) from None
            cells[cell.path] = cell
    if not cells:
        raise FusionError(f"{source} contains no cells", hint=f"hf-fusion bench run --suite NAME --output {source}")
    return [cells[path] for path in sorted(cells)]


def harness_cells(file: Path) -> list[Cell]:
    """What lm-evaluation-harness found for a fused model and what was run beside it, as rows of the leaderboard.

    The suite is "lm-eval", with the limit of documents if there was one; a task is a column for each metric and number
    of few-shot examples. The variant is the name of the model's folder.

    Args:
        file: ``results.json`` in a model's folder.

    Raises:
        FusionError: it is not such a file, or the harness was not run on the model.
    """
    results, folder = Results.load(file), file.resolve().parent
    if not results.harness:
        raise FusionError(
            f"{file} has no scores of lm-evaluation-harness", f"hf-fusion eval {file.parent} --harness TASK"
        )
    recipe = Recipe.load(folder) if (folder / RECIPE_FILE).exists() else None
    method = recipe.method if recipe else folder.name
    fused: dict[str, Any] = {"method": method, "family": _FAMILIES.get(method, "merge"), "variant": folder.name}
    fused["parameters"] = recipe.parameters if recipe else {}
    cells = []
    for run in results.harness:
        limit = run.settings.get("limit")
        shared: dict[str, Any] = {
            "suite": f"lm-eval, first {limit}" if limit else "lm-eval",
            "command": run.command,
            "machine": run.machine,
            "versions": {"lm_eval": str(run.settings.get("lm_eval", ""))},
        }
        for score in run.shown():
            row: dict[str, Any] = fused
            if score.kind != FUSED:
                method = "pretrained" if score.kind == "base" else f"expert:{score.predictor}"
                row = {"method": method, "family": "floor" if score.kind == "base" else "expert"}
            half = 0.0 if score.stderr is None else Z95 * score.stderr
            cells.append(
                Cell(
                    task=f"{score.task}, {score.metric}" + (f", {score.shots}-shot" if score.shots else ""),
                    metric=score.metric,
                    score=score.score,
                    ci95=None if score.stderr is None else (score.score - half, score.score + half),
                    n=score.n,
                    **row,
                    **shared,
                )
            )
    return cells


def write_lines(path: str | Path, cells: Iterable[Cell], brief: bool = False) -> None:
    """All cells in one file, one line each: what is published and, briefly, committed.

    Args:
        path: ends in ``.jsonl``.
        cells: in any order.
        brief: lines lack what is empty, and of `SHARED` what is as in the line before; numbers have six digits.
    """

    def lines() -> Iterator[str]:
        before: dict[str, Any] = {}
        for cell in cells:
            values = asdict(cell)
            kept = values
            if brief:
                kept = {
                    name: _short(value)
                    for name, value in values.items()
                    if (before.get(name) != value if name in SHARED else value != EMPTY.get(name))
                }
            before = values
            yield json.dumps(kept, separators=(",", ":"))

    path = Path(path)
    with in_folder(path.parent):
        write_file(path, "\n".join(lines()) + "\n")


def _short(value: object) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value


LEADERBOARD = "leaderboard.json"  # what a report writes beside the cells
SHARED = ("command", "machine", "versions", "shas")
EMPTY = {row.name: row.default for row in fields(Cell) if row.default is not MISSING} | {"parameters": {}}
