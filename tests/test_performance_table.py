"""The scripts that print performance: their verdicts, and what they say without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The benchmark scripts, which import each other by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_a_row_is_met_up_to_its_bar(scripts):
    import performance

    cases = {(1.25, 1.25): "met", (1.26, 1.25): "not met", (1.5, None): "no bar", (None, 1.25): "not measured"}
    assert {case: performance.verdict(*case) for case in cases} == cases


def test_the_table_names_every_row_and_its_columns(scripts):
    import performance

    rows = [
        {"work": "a forward", "ours": 1.5, "peer": 2.25, "floor": None, "bar": 1.4, "met": "not met"},
        {"work": "b", "ours": None, "peer": None, "floor": 1, "bar": 2, "met": "not measured"},
    ]
    lines = [line.split() for line in performance.table(rows).splitlines()]
    assert lines[0] == ["work", "ours", "peer", "floor", "bar", "met"]
    assert lines[1] == ["a", "forward", "1.50", "2.25", "–", "1.40", "not", "met"]
    assert lines[2] == ["b", "–", "–", "1.00", "2.00", "not", "measured"]


def test_every_measure_has_goals(scripts):
    import performance

    assert performance.MEASURES.keys() == performance.GOALS.keys()


@torch.inference_mode()
def test_a_wrong_product_is_found_and_rounding_is_not(scripts):
    import gpu

    right = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        rounded = gpu.error(right.to(dtype), right)
        assert 0 < rounded < torch.finfo(dtype).eps
        assert gpu.within(rounded, rounded, dtype)
        assert not gpu.within(gpu.error(2 * right.to(dtype), right), rounded, dtype)


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, SCRIPTS / "gpu.py", "--output", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not measured: no GPU" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
