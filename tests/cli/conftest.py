"""Running the command line as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hf_fusion(tmp_path: Path) -> Run:
    """``hf_fusion("fuse", "x", cwd=…, HF_ENDPOINT=…)`` runs a command away from the repo, with the given environment."""

    def run(*words: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hf_fusion.cli", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
