"""Demos that run once per test file, which names them: ``DEMO = ("phatgoose",)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo_runs import run_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo runs."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def ran(folder: Path, request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    """The first run: its summary, and what it said on the way."""
    return run_demo(folder, *request.module.DEMO)
