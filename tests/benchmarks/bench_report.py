"""How long a report takes: 2,000 cells of two suites, in a process of its own, imports and pictures included.

python tests/benchmarks/bench_report.py             # least of 5 runs; at most 5 s of CPU time
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_fusion.bench.cells import Cell, write_cell

LIMIT = 5.0  # seconds of CPU time
CORRUPTIONS = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter")


def make_cells(count: int) -> list[Cell]:
    """Cells of 25 methods: eight tasks of text with two seeds, then four of images, corrupted as needed."""
    methods = ["pretrained", *(f"method-{k}" for k in range(22)), "multitask", "individual"]
    families = ["floor", *(f"family-{k % 6}" for k in range(22)), "ceiling", "ceiling"]
    places = [("text", "clean", task, seed) for seed in range(2) for task in range(8)]
    places += [("images", "clean", task, 0) for task in range(4)]
    places += [
        ("images", f"{name}:{level}", task, 0) for name in CORRUPTIONS for level in (1, 3, 5) for task in range(4)
    ]
    cells = []
    for suite, condition, task, seed in places:
        for k, (method, family) in enumerate(zip(methods, families, strict=True)):
            score = 0.4 + 0.02 * k - 0.01 * int(condition.partition(":")[2] or 0) + 0.01 * task
            cells.append(
                Cell(suite, method, f"task-{task}", family, condition=condition, seed=seed, score=score, n=500,
                     ci95=(score - 0.02, score + 0.02), cost=1.0 + k % 4, parameters={"scaling": 0.3},
                     command=f"hf-fusion bench run --suite {suite}", machine="any", versions={"torch": "2"})
            )  # fmt: skip
    return cells[:count]


def main(arguments: list[str] | None = None) -> int:
    """Prints the times; 1 if the least is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        cells = make_cells(options.cells)
        for cell in cells:
            write_cell(Path(folder) / "cells", cell)
        words = ["bench", "report", f"{folder}/cells", "--output", f"{folder}/report", "--format", "quiet"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        times = []
        for _ in range(options.runs):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "hf_fusion.cli", *words], check=True, env=env, stdout=subprocess.DEVNULL
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            print(f"{times[-1]:5.2f} s of CPU time, {time.perf_counter() - began:5.2f} s")
        pictures = len(list(Path(folder).glob("report/pictures/*.png")))
    print(f"{len(cells):,} cells, {pictures} pictures: {min(times):.2f} s of CPU time at least, limit {LIMIT:g} s")
    return 1 if min(times) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
