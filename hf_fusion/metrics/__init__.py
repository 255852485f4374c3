"""Metric modules for 🤗 evaluate that travel with the package, since the Hub's cannot be fetched everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_metric(name: str) -> Any:
    """``evaluate.load`` on one of this folder's modules: "accuracy", "mse" or "exact_match"."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name))
