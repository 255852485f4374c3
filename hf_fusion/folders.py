"""A folder that is written anew, all of it or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

# What an earlier save may have left and a loader would take for part of this one; and what was measured of it.
STALE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "results.json",
    "routing.json",
    "routing.png",
    "coefficients.json",
    "coefficients.png",
)


def replace_folder(staging: Path, folder: Path) -> None:
    """Move a finished save into place. A folder that exists is swapped as a whole: no moment shows a mixture."""
    if folder.exists():
        new = {path.name for path in staging.iterdir()}
        stale = {path.name for pattern in STALE for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.name not in new | stale:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, staging / path.name)
        old = staging.with_name(f"{staging.name}-old")
        folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old)
    else:
        staging.rename(folder)
