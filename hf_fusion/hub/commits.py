"""Verifies that a Hub returns the commit that was requested.

A branch or tag can have 40 hex digits as its name, and git, Hubs and caches may prefer it to the commit. Every response
for a pinned reference is therefore compared with the requested commit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.types import SHA, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_commit(name: str, revision: str | None, found: object) -> str:
    """Checks the commit that a Hub returned for a revision, and returns it.

    Args:
        name: repo id, for errors.
        revision: the requested revision; None for the newest commit of the main branch.
        found: the Hub's response.

    Raises:
        FusionError: it is not a commit, or not the requested one.
    """
    requested = as_commit(revision)
    if not isinstance(found, str) or not SHA.fullmatch(found):
        raise FusionError(f"{name}: the Hub returned {shown(found)} instead of a commit", hint="check HF_ENDPOINT")
    if requested and found != requested:
        raise FusionError(
            f"{name}: the Hub returned commit {found} instead of {requested}",
            hint="a branch or tag may have that commit as its name: check the repo and HF_ENDPOINT",
        )
    return found


def download_file(api: HfApi, repo: str, file: str, revision: str | None, **options: Any) -> Path:
    """`hf_hub_download` of a model file, with a check of its commit.

    Args:
        api: the Hub's client.
        repo: ``owner/name``.
        file: its path in the repo.
        revision: a commit, a branch or a tag; None for the main branch.
        options: further arguments of `hf_hub_download`.

    Raises:
        FusionError: it belongs to another commit.
    """
    path = Path(api.hf_hub_download(repo, file, revision=revision, **options))
    if as_commit(revision):
        check_commit(repo, revision, path.parents[file.count("/")].name)  # …/snapshots/SHA/file
    return path
