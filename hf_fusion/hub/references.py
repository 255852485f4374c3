"""References to models as text, taken apart."""

from __future__ import annotations

import re
from pathlib import Path

from hf_fusion.errors import FusionError
from hf_fusion.hub.commits import as_commit
from hf_fusion.recipe import CONTENT

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NUMBERED = re.compile(r"([\w./-]+)#(\d+)(?:@(.+))?")  # an expert of one of PHATGOOSE's authors' checkpoints


def split_revision(name: str) -> tuple[str, str | None]:
    """``owner/name@revision`` → (id, revision or None); a commit in lower case.

    Raises:
        FusionError: where it is neither a repo id nor an existing folder.
    """
    repo, _, revision = name.partition("@")
    if revision.startswith(CONTENT):
        raise FusionError(
            f"{repo} was a folder of the machine that fused it (content {revision[:19]}…).",
            hint="put the path of your copy of it into the recipe",
        )
    if not _REPO_ID.fullmatch(repo) or ".." in repo:
        raise FusionError(
            f"{name!r} is neither a folder nor a repo id.",
            hint="write owner/name, owner/name@revision or a folder",
        )
    return repo, as_commit(revision) or revision or None


def parts_of(name: str) -> tuple[str, str]:
    """(base, adapter) of ``base+adapter``; ("", name) of any other name."""
    base, plus, adapter = name.partition("+")
    return (base, adapter) if plus and not Path(name).expanduser().is_dir() else ("", name)


def parts_of_expert(name: str) -> tuple[str, int] | None:
    """(``owner/name[@revision]``, number) of ``owner/name#number[@revision]``; None of any other name."""
    match = _NUMBERED.fullmatch(name)
    return match and (f"{match[1]}@{match[3]}" if match[3] else match[1], int(match[2]))


def repo_of(name: str) -> tuple[str, str | None]:
    """(id, revision or None) of an id, or of the checkpoint that holds an expert."""
    numbered = parts_of_expert(name)
    return split_revision(numbered[0] if numbered else name)
