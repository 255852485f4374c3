"""Paired comparisons of cells on the rows that both methods predicted."""

from __future__ import annotations

import math

import pytest
from made_cells import cell

from hf_fusion.bench.paired import leads
from hf_fusion.errors import FusionError

TASKS = ("a", "b")
RIGHT = {"ours": {"a": [1, 1, 1, 0], "b": [1, 0, 1, 1]}, "other": {"a": [1, 0, 1, 0], "b": [0, 0, 1, 0]}}


def scored(method: str, task: str, rows: list[int] | None, **more):
    values = None if rows is None else [float(row) for row in rows]
    return cell(method, task, 0.5 if rows is None else sum(rows) / len(rows), rows=values, **more)


CELLS = [scored(method, task, rows) for method, tasks in RIGHT.items() for task, rows in tasks.items()]


def test_leads_are_means_of_paired_differences():
    [(key, lead)] = leads(CELLS, "ours", TASKS).items()
    # differences: a (0, 1, 0, 0), b (1, 0, 0, 1): means 1/4 and 1/2, variances 3/16 and 1/4 over four rows each
    half = 1.959963985 * math.sqrt((3 / 16 + 1 / 4) / 4) / 2
    assert key == ("other", "default") and lead.score == pytest.approx(3 / 8)
    assert lead.ci95 == pytest.approx((3 / 8 - half, 3 / 8 + half))


def test_only_clean_cells_of_the_seed_count_and_variants_are_apart():
    zero = [0, 0, 0, 0]
    tuned = [scored("ours", task, rows, variant="tuned") for task, rows in RIGHT["ours"].items()]
    others = [
        scored("other", "a", zero, condition="blur:3"),
        scored("other", "a", zero, split="last-two"),
        scored("other", "a", zero, seed=1),
    ]
    found = leads([*CELLS, *others, *tuned], "ours", TASKS)
    assert found.pop(("ours", "tuned")).score == 0
    assert found == leads(CELLS, "ours", TASKS)


def test_methods_without_rows_are_left_out():
    unpaired = [scored("older", task, None) for task in TASKS]
    partial = [scored("partial", "a", [1, 1, 1, 1])]
    assert set(leads([*CELLS, *unpaired, *partial], "ours", TASKS)) == {("other", "default")}
    with pytest.raises(FusionError, match="older has no scores of single rows on all 2 tasks"):
        leads([*CELLS, *unpaired], "older", TASKS)
