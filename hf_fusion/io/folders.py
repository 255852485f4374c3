"""Folders that are written all of it or nothing: anew, or once."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_fusion.errors import FusionError, disk_refusals, writing

# By what a folder is known to hold a model, or what was measured of one.
MODEL = ("fusion.yaml", "config.json", "adapter_config.json", "*.safetensors", "results.json")
# What any save may have left and a loader would take for part of this one; and what was measured of it.
LEFTOVERS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "modules.json",
    "additional_chat_templates",
    "results.json",
)


def refuse_to_replace(folder: str | Path, overwrite: bool) -> None:
    """Refuse a folder that holds a model, fitted perhaps and measured, unless it may be replaced.

    A merge that was killed left nothing in the folder, so it goes on without being asked to overwrite.

    Raises:
        FusionError: naming what is there.
    """
    folder = Path(folder)
    if overwrite or not folder.is_dir():
        return
    found = sorted(path.name for pattern in MODEL for path in folder.glob(pattern))
    if found:
        raise FusionError(
            f"{folder} holds a model already: {', '.join(found[:5])}.",
            "choose another folder, or replace it: --overwrite (overwrite=True in Python)",
        )


def replace_folder(staging: Path, folder: Path, stale: Iterable[str]) -> None:
    """Move a finished save into place. A folder that exists is swapped as a whole: no moment shows a mixture.

    Args:
        staging: what was saved, beside the folder.
        folder: where it belongs.
        stale: patterns of what goes, of what the folder holds; the rest stays.
    """
    restore_folder(staging, folder)
    if folder.exists():
        new = {path.name for path in staging.iterdir()}
        going = {path.name for pattern in stale for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.name not in new | going:
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


def recover_folder(folder: str | Path) -> None:
    """Bring back a folder whose replacing was killed between the two renames: what was there before, with its name."""
    folder = Path(folder)
    if folder.name and not folder.exists():
        olds = folder.parent.glob(f".{glob.escape(folder.name)}-????????-old")
        if newest := max(olds, key=lambda old: old.stat().st_mtime, default=None):
            newest.rename(folder)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of a cache: as it is where it is there, else what is made in one beside it and moved into place.

    Args:
        folder: where it belongs.
        make: fills an empty folder.
    """
    if folder.is_dir():
        return folder
    with writing(folder, "set HF_FUSION_CACHE to another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with disk_refusals(folder):
            make(partial)
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _old(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}-old")
