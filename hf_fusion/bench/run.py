"""Runs a suite: methods x tasks, cell by cell; what is measured stays measured, what fails says why."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_fusion.bench.binding import bind, check_bound, shas
from hf_fusion.bench.candidates import FIT, TEST, Candidate, everything
from hf_fusion.bench.cells import CLEAN, STATUS_WORDS, Cell, read_cells, write_cell
from hf_fusion.bench.corruptions import parse_corruptions
from hf_fusion.bench.memory import forget_peak, peak_bytes
from hf_fusion.bench.methods import METHODS, chosen
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.common import TaskSetup
from hf_fusion.bench.setups.fusion import FusionSetup
from hf_fusion.bench.setups.merging import MergingSetup
from hf_fusion.bench.setups.regression import RegressionSetup
from hf_fusion.bench.setups.routing import RoutingSetup
from hf_fusion.bench.suite import LOWER, Holdout, Suite, holdouts_named, load_suite, same_scale
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.machine import machine
from hf_fusion.evaluation.task_metrics import RowsScore, score
from hf_fusion.extras import refuse_missing
from hf_fusion.progress import phase, track

logger = logging.getLogger(__name__)

DEFAULT, TUNED = "default", "tuned"
LIBRARIES = ("hf_fusion", "torch", "transformers", "datasets", "evaluate")
# one for each kind of suite
SETUPS: tuple[type[TaskSetup], ...] = (MergingSetup, RoutingSetup, FusionSetup, RegressionSetup)


@dataclass(frozen=True)
class Job:
    """One fused model: all of its cells, for all corruptions, tasks and variants."""

    method: str
    holdout: Holdout
    seed: int


def run_suite(
    suite: str | Path | Suite,
    methods: Sequence[str] = ("all",),
    *,
    output: str | Path,
    data_dir: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    corruptions: Sequence[str] = (),
    unseen: Sequence[str] = (),
    limit: int = 500,
    tuned_on: int = 100,
    batch_size: int = 16,
    device: str | None = None,
    allow_pickle: bool = False,
    command: str = "",
    tell: Callable[[str], None] = logger.info,
) -> list[Cell]:
    """Measures methods on the tasks of a suite. Cells that the output folder contains already are not measured again.

    Each model is fused once (and once more with parameters tuned on rows that neither trained an expert nor are
    tested), and predicts all of them. A method that fails leaves cells with the reason, and the others go on. Under
    ``accelerate launch`` every process fuses, and predicts a share of the batches.

    Args:
        suite: a name, the path of a ``.yaml`` file, or a suite.
        methods: names, families, "static", or "all"; see `bench.methods.chosen`.
        output: folder of the cells, one file each.
        data_dir: folder below which the suite's ``data:`` sources lie.
        seeds: of stochastic methods; others are measured with the first.
        corruptions: what is measured beside clean rows; see `bench.corruptions.parse_corruptions`.
        unseen: names of the suite's splits that are measured beside all experts on all tasks; "all" for each of them.
        limit: test rows of each task, at most.
        tuned_on: rows of each task that parameters are tuned on.
        batch_size: rows per batch.
        device: where it runs; by default what `accelerate` chooses.
        allow_pickle: also read experts that have no safetensors.
        command: the command of the run, stored in the cells.
        tell: called with a line about each model, which includes the estimated time left.

    Returns:
        All cells of the suite in the folder.

    Raises:
        FusionError: a suite, method, corruption or split is unknown; experts or data are missing; or the folder has
            cells that were measured with other settings.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    if not seeds or limit < 1 or tuned_on < 1:
        raise FusionError("at least one seed, one test row and one tuning row are needed", hint="--seeds 0 --limit 500")
    holdouts = [everything(suite), *holdouts_named(suite, unseen)]
    wanted = [
        CLEAN,
        *parse_corruptions(corruptions, suite.is_of_images),
    ]
    folder = Path(output)
    settings = {"limit": limit, "tuned_on": tuned_on}
    check_bound(folder, suite, settings)
    names = chosen(methods, suite.kind)
    jobs = [
        Job(method, holdout, seed)
        for holdout in holdouts
        for method in names
        for seed in (seeds if METHODS[method].stochastic else seeds[:1])
    ]
    runner = _Runner(suite, folder, wanted, command, state.is_main_process)
    todo = [job for job in jobs if runner.missing(job)]
    state.wait_for_everyone()  # all have looked before any writes
    if done := len(jobs) - len(todo):
        tell(f"{suite.name}: {done} of {len(jobs)} models have already been measured")
    if todo:
        [make_setup] = [setup for setup in SETUPS if setup.kind == suite.kind]
        with phase(f"Loading the experts and rows of {suite.name}"):
            where = device or str(state.device)
            runner.setup = make_setup(
                suite, None if data_dir is None else Path(data_dir), limit, tuned_on, batch_size, where, allow_pickle
            )
        _check_rows(runner.setup, suite)
        if state.is_main_process:
            bind(folder, suite, settings)
        state.wait_for_everyone()
        runner.run(todo, tell)
    state.wait_for_everyone()
    return [cell for cell in read_cells(folder / suite.name) if cell.suite == suite.name]


class _Runner:
    """One call of `run_suite`."""

    setup: TaskSetup  # made where a cell is to be measured

    def __init__(self, suite: Suite, folder: Path, wanted: list[str], command: str, writes: bool) -> None:
        self.suite, self.folder, self.corruptions, self.writes = suite, folder, wanted, writes
        self._scored: dict[tuple[int, str, str], RowsScore] = {}
        here = folder / suite.name
        cells = read_cells(here) if any(here.rglob("[!.]*.json")) else []
        self.done = {cell.path: cell for cell in cells if cell.status != "failed"}
        self.common: dict[str, Any] = {
            "suite": suite.name,
            "command": command,
            "machine": machine(),
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        }

    @property
    def on_gpu(self) -> bool:
        """Whether models run there."""
        return str(self.setup.device).startswith("cuda")

    # ---------------------------------------------------------------- which cells

    def cells(self, job: Job) -> Iterator[Cell]:
        """All cells of a job, without scores; those of the first single expert represent all single experts."""
        row = METHODS[job.method]
        names = [f"expert:{name}" for name in job.holdout.fuse] if job.method == "experts" else [job.method]
        for name in names:
            for variant in (DEFAULT, TUNED) if row.tune else (DEFAULT,):
                for corruption in self.corruptions:
                    for task in job.holdout.test:
                        yield Cell(
                            method=name, task=task, family=row.family, variant=variant, condition=corruption,
                            split=job.holdout.name, seed=job.seed, metric=self.suite.tasks[task].metric,
                            group="held-in" if self.suite.is_fused(task, job.holdout) else "held-out", **self.common,
                        )  # fmt: skip

    def missing(self, job: Job) -> bool:
        """Whether a cell is missing, or has failed."""
        return any(cell.path not in self.done for cell in self.cells(job))

    def write(self, cell: Cell) -> None:
        """Keeps a cell."""
        if self.writes:
            write_cell(self.folder, cell)
        if cell.status != "failed":
            self.done[cell.path] = cell

    # ---------------------------------------------------------------- measuring

    def run(self, jobs: list[Job], tell: Callable[[str], None]) -> None:
        """Measures what is missing."""
        began = time.perf_counter()
        for number, job in enumerate(track(jobs, f"Measuring methods on {self.suite.name}"), 1):
            start = time.perf_counter()
            try:
                told = self.measure(job)
            except Exception as error:  # whatever it is, the others go on
                refuse_missing(error, METHODS[job.method].title)
                problem = _problem(error)
                for cell in self.cells(job):
                    if cell.path not in self.done:
                        self.write(replace(cell, **problem))
                told = f"{_shown(problem['status'])}: {problem['reason']}"
            now = time.perf_counter()
            left = (now - began) / number * (len(jobs) - number)
            where = "" if job.holdout.name == "all" else f", {job.holdout.name}"
            seed = f", seed {job.seed}" if METHODS[job.method].stochastic else ""
            tell(
                f"{number:3}/{len(jobs)} {METHODS[job.method].title + where + seed:44} {told:36} "
                f"{now - start:5.0f} s, {_minutes(left)} left"
            )

    def measure(self, job: Job) -> str:
        """Fuses, predicts, writes; returns a line about the result."""
        row = METHODS[job.method]
        forget_peak(self.on_gpu)
        started, cpu = time.perf_counter(), time.process_time()

        def spent() -> dict[str, float]:
            return {"fuse_seconds": time.perf_counter() - started, "fuse_cpu_seconds": time.process_time() - cpu}

        made = row.entries[self.suite.kind](self.setup, job.holdout, job.seed)
        candidates: Mapping[str, Candidate] = made if isinstance(made, Mapping) else {job.method: made}
        models: dict[tuple[str, str], Any] = {
            (name, DEFAULT): (candidate, spent()) for name, candidate in candidates.items()
        }
        tuned = ""
        if row.tune:
            try:
                best = self.tune(job, row.tune, candidates[job.method])
                models[job.method, TUNED] = (best, spent())
                tuned = f" ({row.tune[0]} {best.parameters[row.tune[0]]:g})"
            except Exception as error:  # the defaults are measured all the same
                refuse_missing(error, METHODS[job.method].title)
                models[job.method, TUNED] = error
        self._scored.clear()
        scores: dict[tuple[str, str], list[float]] = {}
        problems: list[str] = []
        for cell in self.cells(job):
            model = models[cell.method, cell.variant]
            try:
                if isinstance(model, Exception):
                    raise model
                measured = self.predict(cell, *model)
            except Exception as error:  # the other cells go on
                refuse_missing(error, METHODS[job.method].title)
                measured = replace(cell, **_problem(error))
                self.write(measured)
                problems.append(f"{cell.task} {_shown(measured.status)}: {measured.reason}")
            if cell.condition == CLEAN and measured.score is not None:
                scores.setdefault((cell.method, cell.variant), []).append(measured.score)
        means = {key: sum(own) / len(own) for key, own in scores.items()}
        if not same_scale(self.suite.tasks[task].metric for task in job.holdout.test):
            told = [f"{key[1]} {', '.join(f'{own:.3g}' for own in scores[key])}" for key in list(scores)[:2]]
        elif len(candidates) > 1 and means:
            told = [f"best {max(means.values()):.1%}"]
        else:
            told = [f"{variant} {mean:.1%}" for (_, variant), mean in means.items()]
        return ", ".join(told) + tuned + "".join(f", {problem}" for problem in problems[:1])

    def predict(self, cell: Cell, candidate: Candidate, times: Mapping[str, Any]) -> Cell:
        """A cell with its score; the one that was measured before, where there is one."""
        if cell.path in self.done:
            return self.done[cell.path]
        started, cpu = time.perf_counter(), time.process_time()
        key = (id(candidate), cell.task, cell.condition)
        if key not in self._scored:  # where the defaults are best, the tuned model is the same one
            self._scored[key] = self.scored(candidate, cell.task, cell.condition, TEST)
        found, seconds = self._scored[key], time.perf_counter() - started
        cell = replace(
            cell, score=found.score, ci95=found.ci95, n=found.n, rows=found.rows, parameters=candidate.parameters,
            seconds=seconds, cpu_seconds=time.process_time() - cpu, gpu_seconds=seconds if self.on_gpu else 0.0,
            peak_bytes=peak_bytes(self.on_gpu),
            stored=candidate.stored, active=candidate.active, cost=candidate.cost, shas=shas(self.suite), **times,
        )  # fmt: skip
        self.write(cell)
        return cell

    def scored(self, candidate: Candidate, task: str, corruption: str, split: str) -> RowsScore:
        """The score of a candidate on rows of a task."""
        found = self.setup.predict(candidate.prepare(task, corruption, split))
        return score(found, self.suite.tasks[task].metric)

    def tune(self, job: Job, how: tuple[str, tuple[Any, ...]], candidate: Candidate) -> Candidate:
        """The best value of a parameter on the validation splits, found by climbing from the default over a grid."""
        name, grid = how
        row = METHODS[job.method]
        fuse = row.entries[self.suite.kind]
        models: dict[int, Candidate] = {}
        heights: dict[int, float] = {}

        def height(index: int) -> float:
            if not 0 <= index < len(grid):
                return float("-inf")
            if index not in models:
                value = {name: grid[index]}
                if grid[index] == candidate.parameters[name]:
                    models[index] = candidate
                elif candidate.retuned:
                    models[index] = candidate.retuned(value)
                else:
                    found = fuse(self.setup, job.holdout, job.seed, **value)
                    assert isinstance(found, Candidate)  # what is several candidates has no parameter to tune
                    models[index] = found
                heights[index] = self.validation(job, models[index])
            return heights[index]

        index = min(range(len(grid)), key=lambda own: abs(grid[own] - candidate.parameters[name]))
        step = 1 if height(index + 1) > height(index) else -1
        while height(index + step) > height(index):
            index += step
        return models[index]

    def validation(self, job: Job, candidate: Candidate) -> float:
        """The mean score over the fused tasks, on the rows to tune on; where less is better, less than nothing.

        Where metrics have different scales, it is the mean of the logarithms, so that no scale dominates.
        """
        total = 0.0
        tasks = [task for task in self.suite.tasks if self.suite.is_fused(task, job.holdout)]
        if not tasks:
            raise NotApplicable("no task of the suite has an expert, so there are no rows to tune on")
        is_one_scale = same_scale(self.suite.tasks[task].metric for task in tasks)
        for task in tasks:
            metric = self.suite.tasks[task].metric
            value = self.scored(candidate, task, CLEAN, FIT).score
            value = value if is_one_scale else math.log(max(value, 1e-9))
            total += -value if metric in LOWER else value
        return total / len(tasks)


def _shown(status: str) -> str:
    return STATUS_WORDS.get(status, status)


def _problem(error: Exception) -> dict[str, Any]:
    """What a cell has instead of a score."""
    if isinstance(error, NotApplicable):
        return {"status": "left out", "reason": str(error)}
    logger.debug("failed", exc_info=error)
    kind = "" if isinstance(error, FusionError) else f"{type(error).__name__}: "
    return {"status": "failed", "reason": kind + " ".join(str(error).split())[:400]}


def _check_rows(setup: TaskSetup, suite: Suite) -> None:
    """Checks that some task has rows: if all are missing, one error is enough.

    Raises:
        FusionError: of the first task's rows.
    """
    problem = None
    for task in suite.tasks:
        try:
            setup.rows(task)
        except FusionError as error:
            refuse_missing(error, task)
            problem = problem or error
        else:
            return
    if problem:
        raise problem


@cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
