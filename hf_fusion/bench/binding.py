"""What all cells of a suite in a folder have in common, stored beside them: others would not be comparable."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import Suite, Task
from hf_fusion.errors import FusionError
from hf_fusion.hub.client import hub_api
from hf_fusion.hub.commits import check_commit
from hf_fusion.hub.refs_to_files import repo_ref
from hf_fusion.io.saving import in_folder, write_file

logger = logging.getLogger(__name__)

FILE = ".settings.json"
ANOTHER = "use another folder: --output DIR"


def check_bound(folder: Path, suite: Suite, settings: Mapping[str, int]) -> None:
    """Checks that a folder has no cells of this suite that were measured with other rows or weights.

    Raises:
        FusionError: it has such cells.
    """
    before = _read(folder, suite)
    for name, value in settings.items():
        if before.get(name, value) != value:
            option = f"--{name.replace('_', '-')}"
            raise FusionError(
                f"{folder} has cells of {suite.name} that were measured with {option} {before[name]}, not {value}",
                hint=f"use {option} {before[name]}, or another folder: --output DIR",
            )
    if before.get("tasks", _digest(suite)) != _digest(suite):
        raise FusionError(f"{folder} has cells of a suite {suite.name} with other tasks", hint=ANOTHER)
    for source, sha in before.get("shas", {}).items():
        try:
            now = _sha(source, suite.build)
        except Exception:  # what is out of reach now has not changed for all we know
            logger.debug("not compared: %s", source, exc_info=True)
            continue
        if now != sha:
            raise FusionError(f"{folder} has cells measured with {source} at {sha}; it is now at {now}", hint=ANOTHER)


def bind(folder: Path, suite: Suite, settings: Mapping[str, int]) -> None:
    """Records, beside the cells of a suite, the rows and weights that they are measured with."""
    before = _read(folder, suite)
    now = {**settings, "tasks": _digest(suite), "shas": {**before.get("shas", {}), **shas(suite)}}
    file = folder / suite.name / FILE
    with in_folder(file.parent):
        write_file(file, json.dumps(now, indent=1))


def shas(suite: Suite) -> dict[str, str]:
    """Commits of the base and the experts, or digests of their weights."""
    sources = [*([suite.base] if suite.base else []), *suite.experts.values()]
    return {source: _sha(source, suite.build) for source in sources}


def _read(folder: Path, suite: Suite) -> dict[str, Any]:
    file = folder / suite.name / FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise FusionError(
            f"{file} cannot be read", hint=f"delete it if all cells in {folder} are from one run"
        ) from None


def _digest(suite: Suite) -> str:
    """A digest of everything that determines the tasks' rows and their scores."""
    usual = {row.name: row.default if row.default is not MISSING else None for row in fields(Task)}
    tasks = {
        name: {key: repr(value) for key in usual if (value := getattr(task, key)) != usual[key] and key != "expert"}
        for name, task in suite.tasks.items()
    }  # what a task leaves as it is usually does not count: a later version may know of more
    return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _sha(source: str, build: str | None) -> str:
    """The commit of a source, or of files the digest of its weights."""
    path = expert_path(source, build)
    if not isinstance(path, Path):
        ref = repo_ref(path)
        return check_commit(ref.repo, ref.revision, hub_api(None).model_info(ref.repo, revision=ref.revision).sha)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
