"""Routes of a push: card check, preupload, large files, the commit."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dulwich.ignore import IgnoreFilter, read_ignore_patterns
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse

from hf_fusion.server import card
from hf_fusion.server.access import (
    CurrentUser,
    Endpoint,
    Kind,
    ReadableRepo,
    Revision,
    SignedIn,
    StoreDep,
    check_gate,
    check_write,
    find,
    signed_in,
)
from hf_fusion.server.bodies import CardBody, LfsBatchBody, LfsObject, PreuploadBody, PreuploadFile
from hf_fusion.server.commit_body import is_large, read_commit
from hf_fusion.server.errors import HubError
from hf_fusion.server.files import IncomingFile, size_of, temporary_file
from hf_fusion.server.limits import MAX_COMMIT, stream
from hf_fusion.server.names import check_path
from hf_fusion.server.repo import File, Repo
from hf_fusion.server.users import User

router = APIRouter()
LFS_JSON = "application/vnd.git-lfs+json"


@router.post("/api/validate-yaml")
def validate_yaml(body: CardBody) -> JSONResponse:
    """Checks a card before it is pushed."""
    errors, warnings = card.problems(body.content)
    answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return JSONResponse(answer, 400 if errors else 200)


@router.post("/api/{kind}/{owner}/{name}/preupload/{rev}")
def preupload(body: PreuploadBody, repo: ReadableRepo, revision: Revision, user: SignedIn) -> dict[str, Any]:
    """For each file: how to upload it, whether .gitignore excludes it, and the current version's id."""
    files = repo.files(repo.resolve(revision))
    _check_room(repo, body.files, files)
    ignored = _ignore_filter(repo, body.gitIgnore, files)
    answer = []
    for file in body.files:
        path = check_path(file.path)
        large = is_large(path, file.size, file.sample)
        entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored(path)}
        if (there := files.get(path)) and bool(there.sha256) == large:
            entry["oid"] = there.sha256 or there.oid
        answer.append(entry)
    return {"files": answer}


def _check_room(repo: Repo, sent: list[PreuploadFile], files: dict[str, File]) -> None:
    """Check for disk space before a push: clients with Xet retry for minutes on a full disk.

    Raises:
        HubError: 507.
        OSError: the disk is read-only, also reported as 507.
    """
    with temporary_file(repo.scratch):
        pass
    there = {path: file.size for path, file in files.items()}  # it may be the same content, and is not sent then
    needed = sum(file.size for file in sent if there.get(file.path) != file.size)
    free = shutil.disk_usage(repo.scratch).free
    if needed > free:
        raise HubError(
            507,
            f"the push needs {needed / 1e6:,.1f} MB, but the Hub's disk has {free / 1e6:,.1f}; nothing was changed",
        )


def _ignore_filter(repo: Repo, text: str | None, files: dict[str, File]) -> Callable[[str], bool]:
    """Whether a path is excluded by the .gitignore of this push (``text``) or else of the repo."""
    if text is None and (file := files.get(".gitignore")) and not file.sha256:
        text = repo.read(file).decode(errors="replace")
    if not text:
        return lambda path: False
    patterns = IgnoreFilter(read_ignore_patterns(io.BytesIO(text.encode())))

    def ignored(path: str) -> bool:
        parts = path.split("/")
        folders = ["/".join(parts[:n]) + "/" for n in range(1, len(parts))]
        return any(patterns.is_ignored(name) for name in [*folders, path])

    return ignored


# --- large files -------------------------------------------------------------------------------------------------


@router.post("/{owner}/{name}.git/info/lfs/objects/batch")
@router.post("/{kind}/{owner}/{name}.git/info/lfs/objects/batch")
def lfs_batch(
    body: LfsBatchBody,
    owner: str,
    name: str,
    store: StoreDep,
    user: CurrentUser,
    request: Request,
    endpoint: Endpoint,
    kind: Kind = "models",
) -> JSONResponse:
    """The upload or download address of each large file; existing files need no upload."""
    repo = find(store, kind, f"{unquote(owner)}/{unquote(name)}", user)
    if body.operation == "upload":
        signed_in(user)
    else:
        check_gate(repo, user)
    objects = []
    for item in body.objects:
        path = f"/lfs/{repo.kind}/{repo.name}/{item.oid}"
        signature = request.app.state.signer.sign(f"{body.operation}:{path}:{item.size}")
        actions: dict[str, dict[str, str]] = {
            body.operation: {"href": f"{endpoint}{path}?size={item.size}&signature={signature}"}
        }
        if body.operation == "upload":
            actions["verify"] = {"href": f"{endpoint}/lfs-verify/{repo.kind}/{repo.name}"}
        there = repo.large_path(item.oid).exists()
        needed = there == (body.operation == "download")
        objects.append({"oid": item.oid, "size": item.size, **({"actions": actions} if needed else {})})
    return JSONResponse({"transfer": "basic", "objects": objects}, media_type=LFS_JSON)


@router.get("/lfs/{kind}/{owner}/{name}/{oid}")
def lfs_get(
    kind: Kind, owner: str, name: str, oid: str, size: int, signature: str, store: StoreDep, request: Request
) -> FileResponse:
    """Sends a large file to git-lfs."""
    repo = store.get(kind, f"{owner}/{name}")
    request.app.state.signer.check(f"download:/lfs/{repo.kind}/{repo.name}/{oid}:{size}", signature)
    return FileResponse(repo.large_path(oid), media_type="application/octet-stream")


@router.put("/lfs/{kind}/{owner}/{name}/{oid}")
async def lfs_put(
    kind: Kind, owner: str, name: str, oid: str, size: int, signature: str, store: StoreDep, request: Request
) -> dict[str, Any]:
    """Receive a large file; the signature in the address replaces the token."""
    repo = store.get(kind, f"{owner}/{name}")
    request.app.state.signer.check(f"upload:/lfs/{repo.kind}/{repo.name}/{oid}:{size}", signature)
    with IncomingFile(store.scratch) as incoming:
        async for chunk in stream(request, min(size, MAX_COMMIT)):
            incoming.write(chunk)
        await run_in_threadpool(repo.add_large, incoming, oid, size)
    return {}


@router.post("/lfs-verify/{kind}/{owner}/{name}")
def lfs_verify(body: LfsObject, repo: ReadableRepo, user: SignedIn) -> dict[str, Any]:
    """Confirm that a large file is complete."""
    if size_of(repo.large_path(body.oid)) != body.size:
        raise HubError(404, f"{body.oid} was not uploaded")
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
    """Receive a commit as NDJSON; it is written to disk first, since one line can contain gigabytes."""
    await run_in_threadpool(_check_may_commit, repo, revision, user, create_pr)
    with temporary_file(store.scratch) as body:
        async for chunk in stream(request, MAX_COMMIT):
            body.write(chunk)
        body.flush()
        sha, number = await run_in_threadpool(_commit, repo, revision, user, Path(body.name), store.scratch, create_pr)
    prefix = "" if repo.kind == "models" else f"{repo.kind}/"
    home = f"{endpoint}/{prefix}{repo.name}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{home}/commit/{sha}", "hookOutput": ""}
    return answer | ({"pullRequestUrl": f"{home}/discussions/{number}"} if number else {})


def _check_may_commit(repo: Repo, revision: str, user: User, create_pr: bool) -> None:
    """Check write access; users with read access may open pull requests and add to their own."""
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
