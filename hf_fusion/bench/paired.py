"""Paired comparisons: how far one method is ahead of others on the same test rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from hf_fusion.bench.cells import ALL, CLEAN, Cell
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.scoring import lead_of

DEFAULT = "default"


def leads(cells: Iterable[Cell], method: str, tasks: Collection[str], seed: int = 0) -> dict[tuple[str, str], Score]:
    """The mean lead of a method over each other one, on clean rows with all experts, with its 95 % interval.

    The interval is that of the mean over tasks of paired differences between rows, so that it is narrower than the
    intervals of the two scores would suggest.

    Args:
        cells: of one suite.
        method: whose lead it is, with its default parameters.
        tasks: what the mean is over.
        seed: of stochastic methods.

    Returns:
        (method, variant) → lead, without those that lack the score of a row.

    Raises:
        FusionError: the method itself lacks it.
    """
    rows: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for cell in cells:
        where = (cell.condition, cell.split, cell.seed)
        if where == (CLEAN, ALL, seed) and cell.task in tasks and cell.rows is not None:
            rows.setdefault((cell.method, cell.variant), {})[cell.task] = torch.tensor(cell.rows)
    names = list(tasks)
    found = {key: [scored[task] for task in names] for key, scored in rows.items() if len(scored) == len(names)}
    ours = (method, DEFAULT)
    if ours not in found:
        raise FusionError(f"{method} has no scores of single rows on all {len(names)} tasks", "hf-fusion bench run")
    return {key: lead_of(found[ours], other) for key, other in found.items() if key != ours}
