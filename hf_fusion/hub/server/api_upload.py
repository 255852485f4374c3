"""Everything a push says: card check, preupload, large files, the commit itself."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from dulwich.ignore import IgnoreFilter, read_ignore_patterns
from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from . import card
from .access import (
    Endpoint,
    Kind,
    ReadableRepo,
    Revision,
    SignedIn,
    StoreDep,
    check_write,
    find,
)
from .commit_body import is_large, read_commit
from .errors import HubError
from .files import IncomingFile
from .repo import Repo, check_path
from .users import User

router = APIRouter()
Json = Annotated[dict[str, Any], Body()]
LFS_JSON = "application/vnd.git-lfs+json"


@router.post("/api/validate-yaml")
def validate_yaml(body: Json) -> JSONResponse:
    """Checks a card before it is pushed."""
    errors, warnings = card.problems(str(body.get("content") or ""))
    answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return JSONResponse(answer, 400 if errors else 200)


@router.post("/api/{kind}/{owner}/{name}/preupload/{rev}")
def preupload(body: Json, repo: ReadableRepo, revision: Revision, user: SignedIn) -> dict[str, Any]:
    """Says for each file how to send it, whether .gitignore excludes it, and which version is there already."""
    files = repo.files(repo.resolve(revision))
    ignored = _ignore_filter(repo, body, files)
    answer = []
    for file in body.get("files", []):
        path = check_path(str(file["path"]))
        large = is_large(path, int(file["size"]), base64.b64decode(file["sample"]))
        entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored(path)}
        if (there := files.get(path)) and bool(there.sha256) == large:
            entry["oid"] = there.sha256 or there.oid
        answer.append(entry)
    return {"files": answer}


def _ignore_filter(repo: Repo, body: dict[str, Any], files: dict[str, Any]) -> Any:
    """Whether a path is excluded by the .gitignore of this push or of the repo."""
    text = body.get("gitIgnore")
    if text is None and (file := files.get(".gitignore")) and not file.sha256:
        text = repo.read(file).decode(errors="replace")
    if not text:
        return lambda path: False
    patterns = IgnoreFilter(read_ignore_patterns(io.BytesIO(str(text).encode())))

    def ignored(path: str) -> bool:
        parts = path.split("/")
        folders = ["/".join(parts[:n]) + "/" for n in range(1, len(parts))]
        return any(patterns.is_ignored(name) for name in [*folders, path])

    return ignored


# --- large files -------------------------------------------------------------------------------------------------


@router.post("/{owner}/{name}.git/info/lfs/objects/batch")
@router.post("/{kind}/{owner}/{name}.git/info/lfs/objects/batch")
def lfs_batch(
    body: Json,
    owner: str,
    name: str,
    store: StoreDep,
    user: SignedIn,
    request: Request,
    endpoint: Endpoint,
    kind: Kind = "models",
) -> JSONResponse:
    """Tells where to send each large file; those already there need no sending."""
    repo = find(store, kind, f"{unquote(owner)}/{unquote(name)}", user)
    objects = []
    for item in body.get("objects", []):
        oid, size = str(item["oid"]), int(item["size"])
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if not repo.large_path(oid).exists():
            path = f"/lfs/{repo.kind}/{repo.name}/{oid}"
            signed = request.app.state.signer.sign(f"{path}:{size}")
            entry["actions"] = {
                "upload": {"href": f"{endpoint}{path}?size={size}&signature={signed}"},
                "verify": {"href": f"{endpoint}/lfs-verify/{repo.kind}/{repo.name}"},
            }
        objects.append(entry)
    return JSONResponse({"transfer": "basic", "objects": objects}, media_type=LFS_JSON)


@router.put("/lfs/{kind}/{owner}/{name}/{oid}")
async def lfs_put(
    kind: Kind, owner: str, name: str, oid: str, size: int, signature: str, store: StoreDep, request: Request
) -> dict[str, Any]:
    """Receives a large file; the signature in the address stands for the missing token."""
    repo = store.get(kind, f"{owner}/{name}")
    request.app.state.signer.check(f"/lfs/{repo.kind}/{repo.name}/{oid}:{size}", signature)
    with IncomingFile(store.scratch) as incoming:
        async for chunk in request.stream():
            incoming.write(chunk)
            if incoming.size > size:
                raise HubError(400, f"more than the {size} bytes that were announced")
        await run_in_threadpool(repo.add_large, incoming, oid, size)
    return {}


@router.post("/lfs-verify/{kind}/{owner}/{name}")
def lfs_verify(body: Json, repo: ReadableRepo, user: SignedIn) -> dict[str, Any]:
    """Confirms that a large file arrived whole."""
    path = repo.large_path(str(body.get("oid")))
    if not path.exists() or path.stat().st_size != body.get("size"):
        raise HubError(404, f"{body.get('oid')} has not arrived")
    return {}


# --- the commit --------------------------------------------------------------------------------------------------


@router.post("/api/{kind}/{owner}/{name}/commit/{rev}")
async def commit(
    repo: ReadableRepo,
    revision: Revision,
    user: SignedIn,
    store: StoreDep,
    request: Request,
    endpoint: Endpoint,
    create_pr: bool = False,
) -> dict[str, Any]:
    """Receives a commit as NDJSON; it goes to disk first, for one line can hold a file of gigabytes."""
    await run_in_threadpool(_check_may_commit, repo, revision, user, create_pr)
    with tempfile.NamedTemporaryFile(dir=store.scratch) as body:
        async for chunk in request.stream():
            body.write(chunk)
        body.flush()
        sha, number = await run_in_threadpool(_commit, repo, revision, user, Path(body.name), store.scratch, create_pr)
    prefix = "" if repo.kind == "models" else f"{repo.kind}/"
    home = f"{endpoint}/{prefix}{repo.name}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{home}/commit/{sha}", "hookOutput": ""}
    return answer | ({"pullRequestUrl": f"{home}/discussions/{number}"} if number else {})


def _check_may_commit(repo: Repo, revision: str, user: User, create_pr: bool) -> None:
    """The owner may always; anyone who reads may open a pull request and add to their own."""
    head = repo.commit_object(repo.resolve(revision))
    own_request = revision.startswith("refs/pr/") and head.author.startswith(f"{user.name} <".encode())
    if not create_pr and not own_request:
        check_write(repo, user)


def _commit(
    repo: Repo, revision: str, user: User, body: Path, scratch: Path, create_pr: bool
) -> tuple[str, int | None]:
    request = read_commit(body, repo, scratch)
    return repo.commit(
        revision,
        request.change,
        request.summary,
        request.description,
        author=user.name,
        parent=request.parent,
        pull_request=create_pr,
    )
