"""Benchmark cells as the runner writes them: tuned variants, seeds, corruptions, splits, failures."""

from __future__ import annotations

import random
from dataclasses import replace

from hf_fusion.bench.cells import Cell
from hf_fusion.bench.methods import METHODS

HOSTILE = "<img src=x onerror=window.hacked=1>\"'{{evil}}${evil}"
TASKS = ("sst2", "trec", "subj", "snips", "cola", "mrpc")
SPLITS = {"all": TASKS, "near": ("trec", "subj", "cola", "mrpc"), "far": ("sst2", "trec", "subj", "snips")}
CORRUPTIONS = ("typos", "truncation")
N = 250
# method → mean score of its clean rows, cost, its loss by corruption at severity 5
MODELS = {
    "pretrained": (0.31, 1.0, 0.02),
    "expert:sst2": (0.42, 1.0, 0.05),
    "simple_ensemble": (0.55, 6.0, 0.10),
    "average": (0.58, 1.0, 0.12),
    "task_arithmetic": (0.63, 1.0, 0.14),
    "ties": (0.66, 1.0, 0.13),
    "dare": (0.62, 1.0, 0.16),
    "tsv_m": (0.71, 1.0, 0.15),
    "emr": (0.74, 1.0, 0.15),
    "regmean": (0.69, 1.0, 0.17),
    "fisher": (0.60, 1.0, 0.12),
    "adamerging_layer": (0.73, 1.0, 0.18),
    "smile": (0.79, 1.4, 0.20),
    "wemoe": (0.81, 1.9, 0.21),
    "multitask": (0.85, 1.0, 0.15),
    "individual": (0.88, 1.0, 0.16),
}
TUNED = {"task_arithmetic": 0.02, "ties": 0.015, "dare": 0.02, "tsv_m": -0.004}
CHANCE = ("dare", "wemoe", "adamerging_layer")
FAILED = f"OutOfMemoryError: 12 GiB asked for, 3 GiB free {HOSTILE}"
LEFT_OUT = "RegMean needs linear layers that read token states"


def cells() -> list[Cell]:
    """Two suites; scores are drawn from a seed."""
    return [*_suite("minilm-8"), *_others()]


def _suite(suite: str) -> list[Cell]:
    rng = random.Random(0)
    found = []
    for method, (mean, cost, loss) in MODELS.items():
        family = "expert" if method.startswith("expert:") else METHODS[method].family
        for variant in ("default", "tuned") if method in TUNED else ("default",):
            for split, fused in SPLITS.items():
                if split != "all" and method in ("pretrained", "individual", "multitask", "expert:sst2"):
                    continue
                for condition in ("clean", *(f"{c}:{s}" for c in CORRUPTIONS for s in (1, 2, 3, 4, 5))):
                    if condition != "clean" and (split != "all" or method.startswith("expert:")):
                        continue
                    severity = 0 if condition == "clean" else int(condition[-1])
                    for seed in (0, 1, 2) if method in CHANCE and condition == "clean" else (0,):
                        for k, task in enumerate(TASKS):
                            own = mean + TUNED.get(method, 0) * (variant == "tuned") - loss * severity / 5
                            own += 0.04 * (k - 2.5) / 2.5 + rng.uniform(-0.03, 0.03) - 0.3 * (task not in fused)
                            score = round(min(max(own, 0.02), 0.99) * N) / N
                            half = 1.96 * (score * (1 - score) / N) ** 0.5
                            cell = Cell(
                                suite, method, task, family, variant, condition, split,
                                group="held-in" if task in fused else "held-out",
                                seed=seed, score=score, ci95=(score - half, score + 0.9 * half), n=N, cost=cost,
                                parameters={"scaling": 0.5} if variant == "tuned" else {},
                                seconds=1.25, fuse_cpu_seconds=3.5, peak_bytes=int(2e9),
                                stored=int(22.7e6 * cost), active=int(22.7e6 * min(cost, 2)),
                                command=f"hf-fusion bench run --suite {suite} --data DIR --methods {method}",
                                machine="x86_64, 2 CPU threads", versions={"torch": "2.9.0", "hf_fusion": "0.1.0"},
                                shas={"package:minilm": "53aa51172d14"} | {f"cache:merging/{t}": "ab12" for t in fused},
                            )  # fmt: skip
                            found.append(_with_gaps(cell))
    return found


def _with_gaps(cell: Cell) -> Cell:
    """What fails: one task of Fisher, all of RegMean's split far."""
    if (cell.method, cell.task, cell.condition) == ("fisher", "cola", "clean") and cell.split == "all":
        return replace(cell, status="failed", reason=FAILED, score=None, ci95=None)
    if (cell.method, cell.split) == ("regmean", "far"):
        return replace(cell, status="left out", reason=LEFT_OUT, score=None, ci95=None)
    return cell


def _others() -> list[Cell]:
    """A stranger's suite: less is better, and every text of it is hostile."""
    own = {
        "suite": f"stranger {HOSTILE}", "family": f"new {HOSTILE}", "metric": "perplexity", "n": 40, "ci95": (3.0, 9.0),
        "command": f"run {HOSTILE}", "machine": HOSTILE, "versions": {HOSTILE: HOSTILE}, "shas": {HOSTILE: HOSTILE},
        "parameters": {HOSTILE: [HOSTILE]},
    }  # fmt: skip
    task = f"task {HOSTILE}"
    return [
        Cell(method=f"first {HOSTILE}", task=task, score=5.5, cost=1.0, **own),
        Cell(method="second", task=task, score=4.25, cost=2.0, **own),
        Cell(method="second", task=task, score=4.75, cost=2.0, condition=f"{HOSTILE}:2", **own),
        Cell(method="=cmd()", task=task, score=8.125, cost=9.0, **own),
    ]
