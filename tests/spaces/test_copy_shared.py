"""Each Space is uploaded by itself: it contains current copies of what it imports from spaces/_shared."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

COPY = runpy.run_path(str(Path(__file__).parents[2] / "spaces" / "copy_shared.py"))
SPACES = COPY["spaces"]()


@pytest.mark.parametrize("space", SPACES, ids=[space.name for space in SPACES])
def test_space_contains_its_imports(space):
    held = {path.name: path.read_bytes() for path in (space / "shared").iterdir() if path.is_file()}
    sources = COPY["sources"]()
    assert held == {name: sources[name].read_bytes() for name in COPY["needed"](space)}, "run `make spaces`"


def test_shared_files_are_all_used():
    needed = {name for space in SPACES for name in COPY["needed"](space)}
    assert needed == COPY["sources"]().keys() and len(SPACES) == 4
