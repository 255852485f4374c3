"""A push: at most two commits, each of them atomic.

The first commit contains all files (and a card if the repo has none). The second one changes only the card, which then
pins the first one's sha: a commit cannot contain its own sha. Wherever a push is interrupted, the repo contains a
complete model or none, and repeating the call uploads only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.card import README, render_card
from hf_fusion.cards.usage import pinned_revision
from hf_fusion.families import STALE
from hf_fusion.hub.client import explain_hub_errors, hub_api, same_file
from hf_fusion.hub.commits import check_commit
from hf_fusion.progress import phase
from hf_fusion.publishing.local_experts import push_folders
from hf_fusion.publishing.plan import PublishPlan, remote_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class PublishResult:
    """Where a model was published.

    Attributes:
        repo_id: ``owner/name``.
        sha: commit of the weights, which the card pins: load the model with ``revision=sha``.
        url: address of the repo's page.
        private: whether the repo is private.
    """

    repo_id: str
    sha: str
    url: str
    private: bool


def push(planned: PublishPlan, api: HfApi | None = None) -> PublishResult:
    """Carry out a plan: see the module for its two commits.

    Args:
        planned: what `plan` returned.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: an expert's repo contains another model, or the Hub refuses a request.
    """
    from huggingface_hub import CommitOperationAdd

    api = hub_api(api)
    if planned.pushes and planned._pushed is not None:
        planned = planned._pushed(push_folders(planned.pushes, planned.private, api))
    repo_id = planned.repo_id
    with explain_hub_errors(repo_id):
        url = api.create_repo(repo_id, private=planned.private, exist_ok=True)
        info = api.model_info(repo_id)
        card = remote_card(repo_id, api)
        sha = _matching_commit(planned, [pinned_revision(card), info.sha], api)
        head = str(info.sha)
        if sha is None:
            with phase(f"Pushing {planned.megabytes:,.0f} MB to {repo_id}"):
                sha = head = _push_files(planned, head, first=not card, api=api)
            card = remote_card(repo_id, api)
        wanted = render_card(replace(planned.facts, revision=sha), card or planned.card)
        if wanted != card:
            operation = CommitOperationAdd(README, wanted.encode())
            api.create_commit(repo_id, [operation], commit_message="Pin the card to the weights", parent_commit=head)
    return PublishResult(repo_id, sha, str(url), planned.private)


def _matching_commit(planned: PublishPlan, candidates: list[str | None], api: HfApi) -> str | None:
    """The first of the candidates that contains exactly the planned model; None if none does."""
    from huggingface_hub.errors import RevisionNotFoundError

    for sha in dict.fromkeys(candidates):
        if sha is None:
            continue
        try:
            check_commit(planned.repo_id, sha, api.model_info(planned.repo_id, revision=sha).sha)
            if not list(_differences(planned, sha, api)):
                return sha
        except RevisionNotFoundError:  # the card was edited to pin a commit that does not exist
            continue
    return None


def _differences(planned: PublishPlan, sha: str, api: HfApi) -> Iterator[str]:
    """Paths in which a commit differs from the plan, without files that are neither planned nor read by a loader."""
    from huggingface_hub.hf_api import RepoFile

    tree = {entry.path: entry for entry in api.list_repo_tree(planned.repo_id, recursive=True, revision=sha)}
    remote = {path: entry for path, entry in tree.items() if isinstance(entry, RepoFile)}
    yield from (path for path in remote if path not in planned.files and _is_stale(path))
    for path, size in planned.files.items():
        entry = remote.get(path)
        if entry is None or entry.size != size or not same_file(planned.folder / path, entry):
            yield path


def _is_stale(path: str) -> bool:
    """Whether a loader could read this file, left by an earlier version, as part of the model."""
    top, _, below = path.partition("/")
    return top in STALE if below else any(fnmatch(path, pattern) for pattern in STALE)


def _push_files(planned: PublishPlan, parent: str, first: bool, api: HfApi) -> str:
    """Commit all files, with a card if `first`; returns the commit's sha.

    An existing card is left as it is: it pins and describes the previous weights.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = [
        path
        for path in api.list_repo_files(planned.repo_id, revision=parent)
        if path not in planned.files and _is_stale(path)
    ]
    operations: list[Any] = [CommitOperationAdd(path, planned.folder / path) for path in planned.files]
    operations += [CommitOperationDelete(path) for path in stale]
    if first:
        operations.append(CommitOperationAdd(README, planned.card.encode()))
    return api.create_commit(
        planned.repo_id, operations, commit_message="Publish a fused model", parent_commit=parent
    ).oid
