"""The helper that checks calls on several threads finds wrong results and errors."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from threads import difference, wrong_calls
from torch import nn


class Remembers(nn.Module):
    """Keeps its input on itself for a moment, as no model should."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        time.sleep(1e-3)
        return self.seen + 1


def test_state_on_a_module_is_found():
    model = Remembers()
    calls = {str(value): partial(model, torch.tensor([float(value)])) for value in (1, 2, 3, 4)}
    wrong = wrong_calls(calls, 40)
    assert len(wrong) > 4
    assert all("differs by" in line for line in wrong)


def test_wrong_results_and_errors_of_threads_are_reported():
    model = nn.Linear(2, 2)
    calls = {"plain": partial(model, torch.ones(1, 2)), "once": iter([1]).__next__}
    wrong = wrong_calls(calls, 8)
    assert wrong == ["once: StopIteration: "] * 4


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        (torch.ones(2), torch.ones(2) + 1e-6, ""),
        (torch.ones(2), torch.tensor([1.0, 2.0]), "differs by 4.5e-01 of its norm"),
        (torch.ones(2), torch.ones(3), r"torch.float32 [2] for torch.float32 [3]"),
        ({"a": [torch.tensor([1, 2])]}, {"a": [torch.tensor([1, 3])]}, "a: 1 of 2 values differ"),
        (torch.tensor([float("nan")]), torch.ones(1), "differs by nan of its norm"),
        (("a", 1), ("a", 2), "1 for 2"),
        ([0.5, 1.0], [0.5 + 1e-8, 1.0], ""),
        ([0.5, None], [0.5, 1.0], "None for 1.0"),
    ],
)
def test_differences_are_reported(got, want, said):
    assert difference(got, want) == said
