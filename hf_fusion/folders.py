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
    restore_folder(staging, folder)
    if folder.exists():
        new = {path.name for path in staging.iterdir()}
        stale = {path.name for pattern in STALE for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.name not in new | stale:
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, staging / path.name, symlinks=True)
                else:
                    shutil.copy2(path, staging / path.name, follow_symlinks=False)
        old = _old(staging)
        folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old)
    else:
        staging.rename(folder)


def restore_folder(staging: Path, folder: Path) -> None:
    """Undo a `replace_folder` that was killed: the folder is what it was before, nothing is left beside it."""
    old = _old(staging)
    if not old.is_dir():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


def _old(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}-old")
