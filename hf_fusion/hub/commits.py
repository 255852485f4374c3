"""40 hex digits name a commit, and nothing else: what a Hub answers for one must be of that commit.

A branch or a tag may be called like a commit, and git, Hubs and caches may then prefer it. So what comes back for a
pinned reference is compared with what was asked for, wherever a Hub is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.types import SHA, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_commit(name: str, revision: str | None, found: object) -> str:
    """The commit that a Hub found for a revision.

    Args:
        name: repo id, for errors.
        revision: that was asked for; None for the newest of the main branch.
        found: what the Hub says it is.

    Raises:
        FusionError: it is not a commit, or not the one that was asked for.
    """
    asked = as_commit(revision)
    if not isinstance(found, str) or not SHA.fullmatch(found):
        raise FusionError(f"{name}: the Hub names no commit, but {shown(found)}.", hint="check HF_ENDPOINT")
    if asked and found != asked:
        raise FusionError(
            f"{name}: the Hub answers with commit {found} for {asked}.",
            hint="a branch or tag may be called like that commit: check the repo and HF_ENDPOINT",
        )
    return found


def download_file(api: HfApi, repo: str, file: str, revision: str | None, **options: Any) -> Path:
    """`hf_hub_download` of a file of a model, which must come from the commit that was asked for.

    Args:
        api: the Hub's client.
        repo: ``owner/name``.
        file: its path in the repo.
        revision: a commit, a branch or a tag; None for the main branch.
        options: further arguments of `hf_hub_download`.

    Raises:
        FusionError: it is of another commit.
    """
    path = Path(api.hf_hub_download(repo, file, revision=revision, **options))
    if as_commit(revision):
        check_commit(repo, revision, path.parents[file.count("/")].name)  # …/snapshots/SHA/file
    return path
