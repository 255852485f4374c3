"""Atomic saving: files are written into a hidden folder, and moved to their final names at the end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

CONFIG_FILE = "config.json"
# arguments that `save_pretrained(…, push_to_hub=True)` passes to `push_to_hub`
PUSHED = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def saved_whole(folder: str | Path) -> Iterator[Path]:
    """A hidden folder in `folder`, on the same disk, whose files are moved up at the end.

    If a save fails, for example on a full disk, an earlier save stays unchanged. The old config is removed first and
    the new one moved last, so that a killed process leaves nothing that loads.

    Raises:
        OSError: writing failed; the message names `folder`.
    """
    folder = Path(folder)
    staging, is_new = folder / f".saving-{uuid4().hex[:8]}", not folder.exists()
    try:
        staging.mkdir(parents=True)
        yield staging
        _move(staging, folder)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        if number := _system_error(error):
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def push_options(folder: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Remove the push options from the options of `save_pretrained` and return them; empty without a push.

    The push of transformers uploads only files that its save wrote, without processor and recipe.
    """
    if not options.pop("push_to_hub", False):
        return {}
    return {"repo_id": Path(folder).name, **{name: options.pop(name) for name in PUSHED if name in options}}


def _move(staging: Path, folder: Path) -> None:
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    if not files:  # of several processes the first saves
        return
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if Path(CONFIG_FILE) in files:
        (folder / CONFIG_FILE).unlink(missing_ok=True)
    if any(WEIGHTS.fullmatch(file.name) for file in files):  # a loader would take those of an earlier save
        for path in folder.iterdir():
            if WEIGHTS.fullmatch(path.name):
                path.unlink()
    for file in sorted(files, key=lambda file: file == Path(CONFIG_FILE)):
        (staging / file).replace(folder / file)


def _system_error(error: Exception) -> int | None:
    """The errno of an error; safetensors and tokenizers have it in their message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


__all__ = ["push_options", "saved_whole"]
