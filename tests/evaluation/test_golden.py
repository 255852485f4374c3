"""Golden results: tiny models of each kind must keep the recorded scores."""

from __future__ import annotations

import json

import pytest
from golden_cells import CASES, GOLDEN, plain


def equal(found, recorded) -> bool:
    """The same everywhere, numbers as near as single precision is on other machines."""
    if isinstance(recorded, dict):
        return list(found) == list(recorded) and all(equal(found[key], recorded[key]) for key in recorded)
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(map(equal, found, recorded))
    return found == (pytest.approx(recorded, rel=1e-5, abs=1e-7) if isinstance(recorded, float) else recorded)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_cells_are_as_recorded(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path / "cache"))
    recorded = json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
    found = plain(CASES[case](tmp_path))
    assert equal(found, recorded), f"{found}\n{recorded}"
