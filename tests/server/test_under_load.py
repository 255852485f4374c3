"""The load benchmark as a test: all bytes are returned, and no status of 500 or above."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hub_load.py"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [60])
def test_sixteen_clients(seconds):
    command = [sys.executable, str(SCRIPT), "--seconds", str(seconds), "--clients", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 180)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "     0 answers of 500 and above\n     0 errors" in done.stdout
