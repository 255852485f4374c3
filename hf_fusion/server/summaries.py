"""What lists show of each repo, derived once per commit and kept in its folder: a restart reads it back."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fusion.server.dates import stamp
from hf_fusion.server.errors import HubError
from hf_fusion.server.files import temporary_file
from hf_fusion.server.info import commit_properties, current_properties
from hf_fusion.server.repo import Repo

logger = logging.getLogger(__name__)
FILE = "summary.json"
FORMAT = 1  # to be raised whenever `info.commit_properties` derives something else from the same commit


@dataclass(frozen=True)
class RepoSummary:
    """A repo at its main branch.

    Attributes:
        sha: the commit that it was derived from.
        properties: everything derived from this commit, under the clients' names.
        tags: the same tags, for filters.
    """

    sha: str
    properties: dict[str, Any]
    tags: frozenset[str]


def summary(repo: Repo) -> RepoSummary:
    """The summary of a repo, from memory or disk where the main branch has not moved."""
    sha = repo.head
    known = repo.summary
    if not isinstance(known, RepoSummary) or known.sha != sha:
        properties = _read(repo, sha)
        if properties is None:
            properties = _derived(repo, sha)
            _write(repo, sha, properties)
        known = repo.summary = RepoSummary(sha, properties, frozenset(properties["tags"]))
    return known


def repo_properties(repo: Repo) -> dict[str, Any]:
    """All properties of a repo at its main branch, as `info.describe` gives them."""
    return {**summary(repo).properties, **current_properties(repo)}


def _derived(repo: Repo, sha: str) -> dict[str, Any]:
    """The properties derived from a commit; only a few of them if its files are broken."""
    try:
        return commit_properties(repo, sha)
    except (HubError, FileNotFoundError):  # deleted meanwhile
        raise
    except Exception:  # one repo must not break the list for everybody
        logger.warning("the properties of %s at %s cannot be derived from its files", repo.name, sha, exc_info=True)
        return {"sha": sha, "tags": [], "pipeline_tag": None, "lastModified": stamp(0), "siblings": []}


def _read(repo: Repo, sha: str) -> dict[str, Any] | None:
    """The properties that an earlier process derived from this commit, or None."""
    try:
        kept = json.loads((repo.path / FILE).read_bytes())
        return kept["properties"] if (kept["format"], kept["sha"]) == (FORMAT, sha) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(repo: Repo, sha: str, properties: dict[str, Any]) -> None:
    """Save the properties without fsync: what a crash damages is derived again."""
    content = json.dumps({"format": FORMAT, "sha": sha, "properties": properties}).encode(errors="replace")
    with suppress(OSError), temporary_file(repo.scratch) as file:  # a full disk, or a repo deleted meanwhile
        file.write(content)
        file.flush()
        Path(file.name).replace(repo.path / FILE)
