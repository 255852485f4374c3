"""Synthetic benchmark cells with scores from a formula, so that tests know the expected tables."""

from __future__ import annotations

import random

from hf_fusion.bench.cells import Cell

METHODS = {  # method -> family, quality, cost
    "pretrained": ("floor", 0.35, 1.0),
    "simple_ensemble": ("ensemble", 0.62, 8.0),
    "average": ("merge", 0.55, 1.0),
    "task_arithmetic": ("merge", 0.66, 1.0),
    "ties": ("merge", 0.68, 1.0),
    "tsv_m": ("merge", 0.76, 1.0),
    "fisher": ("data", 0.58, 1.0),
    "regmean": ("data", 0.74, 1.0),
    "adamerging_layer": ("learned", 0.78, 1.0),
    "smile": ("mixture", 0.81, 2.2),
    "wemoe": ("mixture", 0.86, 1.8),
    "multitask": ("ceiling", 0.88, 1.0),
    "individual": ("ceiling", 0.90, 1.0),
}


def cell(method: str, task: str, score: float | None, **more) -> Cell:
    """A cell with an interval of two points to both sides; without a score it failed."""
    given = {"suite": "made", "family": METHODS.get(method, ("merge",))[0], "n": 1000, **more}
    if score is None:
        return Cell(method=method, task=task, **{"status": "failed", "reason": "out of memory", **given})
    return Cell(method=method, task=task, score=score, **{"ci95": (score - 0.02, score + 0.02), **given})


def made_cells(
    tasks: int = 8,
    seeds: int = 3,
    corruptions: tuple[str, ...] = (),
    severities: int = 5,
    unseen: bool = False,
    tuned: tuple[str, ...] = ("task_arithmetic", "ties"),
    suite: str = "made",
    methods: dict[str, tuple[str, float, float]] = METHODS,
) -> list[Cell]:
    """Cells of every method: the better it is, the less it loses under corruption."""
    chance, cells = random.Random(0), []
    conditions = ["clean", *(f"{name}:{level}" for name in corruptions for level in range(1, severities + 1))]
    splits = ["all", *(["last-two"] if unseen else [])]
    for method, (family, quality, cost) in methods.items():
        for variant in ("default", *(["tuned"] if method in tuned else [])):
            for split in splits:
                for condition in conditions if split == "all" else conditions[:1]:
                    for seed in range(seeds):
                        for number in range(tasks):
                            severity = int(condition.partition(":")[2] or 0)
                            out = split != "all" and number >= tasks - 2
                            score = quality + 0.03 * (variant == "tuned") + 0.05 * (number % 3 - 1)
                            score *= 1 - 0.06 * severity * (1.2 - quality) - 0.15 * out
                            score = round(min(0.999, max(0.01, score + chance.uniform(-0.01, 0.01))), 6)
                            half = round(1.96 * (score * (1 - score) / 1000) ** 0.5, 6)
                            cells.append(
                                Cell(
                                    suite=suite,
                                    method=method,
                                    task=f"task-{number + 1}",
                                    family=family,
                                    variant=variant,
                                    condition=condition,
                                    split=split,
                                    group="held-out" if out else "held-in",
                                    seed=seed,
                                    score=score,
                                    ci95=(round(score - half, 6), round(score + half, 6)),
                                    n=1000,
                                    seconds=1.5,
                                    fuse_cpu_seconds=3.0,
                                    cost=cost,
                                    stored=22_000_000,
                                    active=22_000_000,
                                    peak_bytes=900_000_000,
                                    parameters={"scaling": 0.3} if family == "merge" else {},
                                    command=f"hf-fusion bench run --suite {suite} --methods {method}",
                                    machine="x86_64, 1 CPU thread",
                                    versions={"torch": "2.13.0"},
                                    shas={f"task-{number + 1}": "0" * 40},
                                )
                            )
    return cells
