"""Writes folders atomically: replaces them, or creates them once."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_fusion.errors import FusionError, disk_refusals, writing

# files by which a folder is recognised as a model's, or as one with results
MODEL = ("fusion.yaml", "config.json", "adapter_config.json", "*.safetensors", "*.gguf", "results.json")
# files of an earlier save that a loader would read as part of the new model; and its results
LEFTOVERS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "modules.json",
    "additional_chat_templates",
    "*.gguf",
    "export.json",
    "results.json",
)


def refuse_to_replace(folder: str | Path, overwrite: bool) -> None:
    """Raises if a folder contains a model, which may be fitted and evaluated, unless it may be replaced.

    A killed merge leaves nothing in the folder, so it resumes without `overwrite`.

    Raises:
        FusionError: naming the files.
    """
    folder = Path(folder)
    if overwrite or not folder.is_dir():
        return
    found = sorted(path.name for pattern in MODEL for path in folder.glob(pattern))
    if found:
        raise FusionError(
            f"{folder} already contains a model: {', '.join(found[:5])}",
            "choose another folder, or replace it: --overwrite (overwrite=True in Python)",
        )


def replace_folder(staging: Path, folder: Path, stale: Iterable[str]) -> None:
    """Moves a complete folder into place. An existing folder is swapped as a whole and never shows a mixture.

    Args:
        staging: the complete folder, beside `folder`.
        folder: the destination.
        stale: patterns of files in `folder` to remove; others are kept.
    """
    restore_folder(staging, folder)
    if folder.exists():
        new = {path.name for path in staging.iterdir()}
        removed = {path.name for pattern in stale for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.name not in new | removed:
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
    """Undoes a killed `replace_folder`: restores the previous folder, and removes what it left beside it."""
    old = _old(staging)
    if not old.is_dir():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


def recover_folder(folder: str | Path) -> None:
    """Restores the previous folder after `replace_folder` was killed between its two renames."""
    folder = Path(folder)
    if folder.name and not folder.exists():
        olds = folder.parent.glob(f".{glob.escape(folder.name)}-????????-old")
        if newest := max(olds, key=lambda old: old.stat().st_mtime, default=None):
            newest.rename(folder)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Creates a folder of a cache atomically, unless it exists.

    Args:
        folder: path.
        make: fills an empty folder.

    Returns:
        `folder`.
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
        if not folder.is_dir():  # else another process created it first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _old(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}-old")
