"""`git clone`, over the plain files of the repository (git's "dumb" protocol), and large files for git-lfs."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import unquote

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse, PlainTextResponse, Response

from hf_fusion.server.access import CurrentUser, Kind, StoreDep, check_gate, find
from hf_fusion.server.errors import HubError
from hf_fusion.server.repo import Repo

router = APIRouter()
OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{38})")


def repo_to_clone(owner: str, name: str, store: StoreDep, user: CurrentUser, kind: Kind = "models") -> Repo:
    """The repo of a clone address, with or without ``.git``.

    Raises:
        HubError: 401 where a password could help, so that git asks for one.
    """
    try:
        repo = find(store, kind, f"{unquote(owner)}/{unquote(name).removesuffix('.git')}", user)
        check_gate(repo, user)
    except HubError as error:
        if user is None:
            raise HubError(401, error.message, headers={"WWW-Authenticate": 'Basic realm="Hub"'}) from None
        raise
    return repo


RepoToClone = Annotated[Repo, Depends(repo_to_clone)]


@router.get("/{owner}/{name}/info/refs")
@router.get("/{kind}/{owner}/{name}/info/refs")
def info_refs(repo: RepoToClone) -> Response:
    """All branches and tags."""
    refs = [(sha, f"refs/{prefix}/{n}") for prefix in ("heads", "tags") for n, sha in repo.refs(prefix).items()]
    return PlainTextResponse("".join(f"{sha}\t{name}\n" for sha, name in refs))


@router.get("/{owner}/{name}/HEAD")
@router.get("/{kind}/{owner}/{name}/HEAD")
def head(repo: RepoToClone) -> Response:
    """The default branch."""
    return PlainTextResponse("ref: refs/heads/main\n")


@router.get("/{owner}/{name}/objects/{path:path}")
@router.get("/{kind}/{owner}/{name}/objects/{path:path}")
def git_object(repo: RepoToClone, path: str) -> Response:
    """One object; there are no packs."""
    match = OBJECT.fullmatch(path)
    if match:
        file = repo.path / "objects" / match[1] / match[2]
        if file.exists():
            return FileResponse(file, media_type="application/x-git-loose-object")
    raise HubError(404, f"there is no git object {path}")
