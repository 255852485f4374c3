"""A search over TIES' λ and density against the benchmark's tuning of λ, on a suite of real fine-tunes.

    python tests/benchmarks/search_suite.py --data DIR --output FILE
    python tests/benchmarks/search_suite.py --data DIR --suite unseen-few --method dare_ties --seeds 0

Both choose on the same validation rows, which no expert was trained on; test rows are measured in the end, once for
each choice. The grid is that of the benchmark at the method's default density: all of it, and what climbing over it
from the default, as `hf-fusion bench run` does, would have taken. CPU time is that of merging and measuring, without
reading.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_fusion.bench.candidates import FIT, TEST
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.methods.declaration import SCALING
from hf_fusion.bench.setups.merging import MergingSetup
from hf_fusion.bench.suite import load_suite
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.machine import machine
from hf_fusion.evaluation.scoring import lead_of
from hf_fusion.evaluation.task_metrics import row_scores
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.search.halving import row_counts, search_dimensions
from hf_fusion.search.objective import Scores, mean_score
from hf_fusion.search.space import Dimension
from hf_fusion.search.trials import Trial, best_of

GRID: Sequence[float] = SCALING[1]
LOW, HIGH = GRID[0], GRID[-1]


class Measured:
    """The suite's experts in memory, and their merges' scores."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.method = args.method
        self.setup = MergingSetup(load_suite(args.suite), args.data, args.limit, args.rows)
        self.states = [dict(state) for state in self.setup.states]  # task vectors are added to the base once
        self.memory: dict[str, dict[Any, Any]] = {}
        self.tasks = self.setup.names
        for task in self.tasks:  # encoded before time is taken
            self.setup.task_rows(task, CLEAN, FIT)
        self.count = sum(len(self.setup.task_rows(task, CLEAN, FIT).rows) for task in self.tasks)

    def merged(self, **parameters: float) -> dict[str, torch.Tensor]:
        """The merge with some parameters."""
        return merge_states(self.method, self.setup.base, self.states, memory=self.memory, **parameters)

    def scores(self, state: Mapping[str, torch.Tensor], split: str, first: int = 0, last: int | None = None) -> Scores:
        """Scores of the rows of each task, for validation rows those from `first` to `last` of `count`."""
        candidate, found = self.setup.dense(state), {}
        for task in self.tasks:
            prepared = candidate.prepare(task, CLEAN, split)
            rows, total = prepared.rows, len(prepared.rows.rows)
            begin, end = (0, total) if last is None else (-(-n * total // self.count) for n in (first, last))
            if begin < end:
                part = replace(rows, rows=[rows.rows[index] for index in range(begin, end)], keeps=False)
                predictions = self.setup.predict(prepared._replace(rows=part))
                found[task] = row_scores(predictions, self.setup.suite.tasks[task].metric)
        return found


class Kept:
    """Trials that are not written."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def add(self, trial: Trial) -> None:
        """Keeps a trial, and says so."""
        self.trials.append(trial)
        print(f"# trial {trial.number}: {trial.parameters} {trial.scores}", flush=True)


def grid(measured: Measured) -> dict[str, Any]:
    """Every λ of the benchmark's grid; and which of them climbing from the default would have measured."""
    known = MERGE_METHODS[measured.method].parameters
    default = known["scaling"].default
    rows = []
    began = time.process_time()
    state = measured.merged(scaling=default)
    merging = time.process_time() - began
    for scaling in GRID:
        began = time.process_time()
        scaled = {
            name: torch.lerp(measured.setup.base[name].float(), tensor, scaling / default)
            for name, tensor in state.items()
        }
        score = mean_score([measured.scores(scaled, FIT, 0, measured.count)])
        rows.append({"scaling": scaling, "score": score, "cpu_seconds": time.process_time() - began})
        print(f"# grid: {rows[-1]}", flush=True)
    climbed = climb([row["score"] for row in rows], min(range(len(GRID)), key=lambda i: abs(GRID[i] - default)))
    best = max(rows, key=lambda row: row["score"])
    return {
        "density": known["density"].default,
        "points": rows,
        "best": best,
        "cpu_seconds": merging + sum(row["cpu_seconds"] for row in rows),
        "climb": {
            "points": len(climbed),
            "best": max((rows[index] for index in climbed), key=lambda row: row["score"]),
            "cpu_seconds": merging + sum(rows[index]["cpu_seconds"] for index in climbed),
        },
    }


def climb(scores: Sequence[float], start: int) -> set[int]:
    """The points that the benchmark's tuning measures: it goes on in one direction while the score rises."""
    seen = set[int]()

    def height(index: int) -> float:
        if not 0 <= index < len(scores):
            return float("-inf")
        seen.add(index)
        return scores[index]

    index = start
    step = 1 if height(index + 1) > height(index) else -1
    while height(index + step) > height(index):
        index += step
    return seen


def search(measured: Measured, budget: int, seed: int) -> dict[str, Any]:
    """A search over λ, in the range of the grid, and density."""
    known = MERGE_METHODS[measured.method].parameters
    dimensions = [
        Dimension("scaling", ("scaling",), LOW, HIGH, known["scaling"].default),
        Dimension("density", ("density",), 0.05, 1.0, known["density"].default),
    ]
    rows, kept = row_counts(measured.count), Kept()

    def measure(values: Sequence[float]) -> Iterator[float]:
        state = measured.merged(scaling=values[0], density=values[1])
        parts: list[Scores] = []
        for first, last in zip([0, *rows], rows, strict=False):
            parts.append(measured.scores(state, FIT, first, last))
            yield mean_score(parts)

    began = time.process_time()
    search_dimensions(dimensions, measure, rows, kept, budget=budget, seed=seed)
    seconds = time.process_time() - began
    best = best_of(kept.trials)
    return {
        "seed": seed,
        "rows": rows,
        "measured": [sum(len(t.scores) > rung for t in kept.trials) for rung in range(len(rows))],
        "best": {**best.parameters, "score": best.scores[-1]},
        "cpu_seconds": seconds,
        "trials": [asdict(trial) for trial in kept.trials],
    }


def compared(other: Scores, grid_scores: Scores) -> dict[str, Any]:
    """Test scores of a search's choice, and its lead over the grid's choice on the same rows."""
    lead: Score = lead_of([other[task] for task in grid_scores], [grid_scores[task] for task in grid_scores])
    means = {task: float(values.mean()) for task, values in other.items()}
    return {"tasks": means, "mean": sum(means.values()) / len(means), "lead": asdict(lead)}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", default="minilm-8", help="of full fine-tunes")
    parser.add_argument("--method", default="ties", help="a static merge with scaling and density")
    parser.add_argument("--budget", type=int, default=40, help="trials of a search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the searches")
    parser.add_argument("--rows", type=int, default=100, help="validation rows of each task; the benchmark's default")
    parser.add_argument("--limit", type=int, default=1000, help="test rows of each task")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    given = ["DIR" if word == str(args.data) else word for word in sys.argv[1:]]
    measured = Measured(args)
    result: dict[str, Any] = {
        "command": f"python tests/benchmarks/search_suite.py {shlex.join(given)}",
        "machine": machine(),
        "suite": args.suite,
        "method": args.method,
        "validation_rows": measured.count,
    }

    def write() -> None:
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result["grid"] = found = grid(measured)
    chosen = found["best"]["scaling"]
    test: Callable[..., Scores] = lambda **given: measured.scores(measured.merged(**given), TEST)  # noqa: E731
    on_test = test(scaling=chosen, density=found["density"])
    result["grid"]["test"] = {task: float(values.mean()) for task, values in on_test.items()}
    result["test_rows"] = sum(map(len, on_test.values()))
    result["searches"] = []
    write()
    for seed in args.seeds:
        run = search(measured, args.budget, seed)
        run["test"] = compared(test(scaling=run["best"]["scaling"], density=run["best"]["density"]), on_test)
        result["searches"].append(run)
        write()
        print(
            f"seed {seed}: validation {run['best']['score']:.2%} against {found['best']['score']:.2%}, "
            f"{run['cpu_seconds']:.0f} s against {found['cpu_seconds']:.0f} s of CPU; on test "
            f"{run['test']['lead']['score']:+.2%} {run['test']['lead']['ci95']}"
        )


if __name__ == "__main__":
    main()
