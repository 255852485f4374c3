"""Routes for repos: create, delete, move, settings, information, listing, trees, references, history."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote, urlencode

from fastapi import APIRouter, Query, Request, Response

from hf_fusion.server.access import (
    CurrentUser,
    Endpoint,
    Kind,
    ReadableRepo,
    Revision,
    SignedIn,
    StoreDep,
    WritableRepo,
    check_gate,
    check_write,
    find,
    may_read,
)
from hf_fusion.server.bodies import BranchBody, MoveBody, RepoBody, SettingsBody, TagBody, UserBody
from hf_fusion.server.dates import stamp
from hf_fusion.server.errors import HubError, entry_not_found
from hf_fusion.server.info import describe
from hf_fusion.server.listing import Page, filter_repos, next_link, paginate, properties
from hf_fusion.server.repo import File, Repo
from hf_fusion.server.summaries import repo_properties
from hf_fusion.server.users import User

router = APIRouter()
TREE_PAGE, EXPANDED_TREE_PAGE = 1000, 50


def _address(endpoint: str, kind: str, name: str) -> str:
    prefix = "" if kind == "models" else f"{kind}/"
    return f"{endpoint}/{prefix}{name}"


def _kind_and_name(body: RepoBody, default_owner: str) -> tuple[str, str]:
    """Kind and full name of the repo in a request body."""
    return f"{body.type}s", f"{body.organization or default_owner}/{body.name}"


def _check_namespace(user: User, name: str) -> None:
    if not user.owns(namespace := name.split("/")[0]):
        raise HubError(403, f"{user.name} has no rights in the namespace {namespace}")


@router.post("/api/repos/create")
def create_repo(body: RepoBody, store: StoreDep, user: SignedIn, endpoint: Endpoint) -> dict[str, Any]:
    """Makes a repo in the caller's namespace or that of an organisation they belong to."""
    kind, name = _kind_and_name(body, user.name)
    _check_namespace(user, name)
    settings: dict[str, Any] = {"private": body.private or body.visibility == "private", "gated": False}
    if kind == "spaces":
        settings["sdk"] = body.sdk
    url = _address(endpoint, kind, name)
    try:
        repo = store.create(kind, name, user.name, settings)
    except FileExistsError:
        raise HubError(409, f"You already created this {body.type} repo: {name}", body={"url": url}) from None
    return {"url": url, "name": repo.name, "id": repo.settings["created"]}


@router.delete("/api/repos/delete")
def delete_repo(body: RepoBody, store: StoreDep, user: SignedIn) -> dict[str, Any]:
    """Removes a repo for good."""
    store.delete(check_write(find(store, *_kind_and_name(body, user.name), user), user))
    return {}


@router.post("/api/repos/move")
def move_repo(body: MoveBody, store: StoreDep, user: SignedIn) -> dict[str, Any]:
    """Gives a repo another name, in any namespace the caller may write to."""
    repo = check_write(find(store, f"{body.type}s", body.fromRepo, user), user)
    _check_namespace(user, body.toRepo)
    store.move(repo, body.toRepo)
    return {}


@router.put("/api/{kind}/{owner}/{name}/settings")
def settings(body: SettingsBody, repo: WritableRepo) -> dict[str, Any]:
    """Changes visibility and gating."""
    changes: dict[str, Any] = body.model_dump(include={"gated", "private"}, exclude_none=True)
    if body.visibility is not None:
        changes["private"] = body.visibility == "private"
    repo.change_settings(**changes)
    return {name: repo.settings[name] for name in ("private", "gated")}


@router.post("/api/{kind}/{owner}/{name}/user-access-request/grant")
def grant_access(body: UserBody, repo: WritableRepo, store: StoreDep) -> dict[str, Any]:
    """Lets a user read the files of a gated repo."""
    if not store.users.exists(body.user):
        raise HubError(404, f"there is no user {body.user}")
    if not repo.settings.get("gated"):
        raise HubError(400, f"{repo.name} is not gated")
    repo.change_settings(granted=sorted({*repo.settings.get("granted", ()), body.user}))
    return {}


@router.get("/api/{kind}/{owner}/{name}/auth-check")
def auth_check(repo: ReadableRepo, user: CurrentUser) -> dict[str, Any]:
    """200 if the caller can read the files."""
    check_gate(repo, user)
    return {}


@router.get("/api/{kind}/{owner}/{name}/auth-check/write")
def auth_check_write(repo: WritableRepo) -> dict[str, Any]:
    """200 if the caller can write."""
    return {}


# --- information -------------------------------------------------------------------------------------------------


@router.get("/api/{kind}")
def list_repos(kind: Kind, request: Request, store: StoreDep, user: CurrentUser, endpoint: Endpoint) -> Response:
    """Repos the caller may see, filtered, sorted and page by page."""
    query = parse_qs(request.url.query)
    page = paginate(filter_repos((repo for repo in store.all(kind) if may_read(repo, user)), query), query)
    link = {"Link": next_link(endpoint + request.url.path, query, page.cursor)} if page.cursor else {}
    found = [properties(repo_properties(repo), kind, query) for repo in page.items]
    return Response(json.dumps(found), media_type="application/json", headers=link)  # FastAPI would walk all of it


@router.get("/api/{kind}/{owner}/{name}")
@router.get("/api/{kind}/{owner}/{name}/revision/{rev}")
def repo_info(
    repo: ReadableRepo,
    rev: str = "main",
    blobs: bool = False,
    expand: Annotated[list[str] | None, Query()] = None,
) -> dict[str, Any]:
    """Everything about a repo at a revision, or only what `expand` names."""
    info = describe(repo, repo.resolve(unquote(rev)), blobs)
    return {name: info[name] for name in ("_id", "id", *expand) if name in info} if expand else info


def _entry(file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": file.path, "size": file.size, "oid": file.oid}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def _folder(repo: Repo, sha: str, path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": repo.tree_id(sha, path)}


def _with_last_commits(repo: Repo, sha: str, entries: list[dict[str, Any]]) -> None:
    last = repo.last_commits(sha)
    for entry in entries:
        if commit := last.get(entry["path"]):
            entry["lastCommit"] = {
                "id": commit.id.decode(),
                "title": commit.message.decode(errors="replace").split("\n")[0],
                "date": stamp(commit.commit_time),
            }


@router.get("/api/{kind}/{owner}/{name}/tree/{rev}")
@router.get("/api/{kind}/{owner}/{name}/tree/{rev}/{path:path}")
def tree(
    repo: ReadableRepo,
    revision: Revision,
    request: Request,
    response: Response,
    endpoint: Endpoint,
    path: str = "",
    recursive: bool = False,
    expand: bool = False,
    cursor: str = "",
) -> list[dict[str, Any]]:
    """Files and folders below a path, sorted by path, page by page."""
    sha = repo.resolve(revision)
    start = f"{folder}/" if (folder := unquote(path).strip("/")) else ""
    inside = {p: f for p, f in repo.files(sha).items() if p.startswith(start)}
    if start and not inside:
        raise entry_not_found(folder, sha)
    names = set()
    for name in inside:
        parts = name[len(start) :].split("/")
        names |= {start + "/".join(parts[:n]) for n in range(1, len(parts) + 1 if recursive else 2)}
    size = EXPANDED_TREE_PAGE if expand else TREE_PAGE
    wanted = sorted(name for name in names if name > cursor)
    entries = [_entry(inside[n]) if n in inside else _folder(repo, sha, n) for n in wanted[:size]]
    if expand:
        _with_last_commits(repo, sha, entries)
    if len(wanted) > size:
        query = urlencode({"recursive": recursive, "expand": expand, "cursor": wanted[size - 1]})
        response.headers["Link"] = f'<{endpoint}{request.url.path}?{query}>; rel="next"'
    return entries


@router.post("/api/{kind}/{owner}/{name}/paths-info/{rev}")
async def paths_info(repo: ReadableRepo, revision: Revision, request: Request) -> list[dict[str, Any]]:
    """The named files and folders; those that do not exist are left out."""
    form = parse_qs((await request.body()).decode(errors="replace"))
    paths = [path.strip("/") for path in form.get("paths", [])]
    sha = repo.resolve(revision)
    files = repo.files(sha)
    entries = []
    for path in paths:
        if path in files:
            entries.append(_entry(files[path]))
        elif path and any(name.startswith(f"{path}/") for name in files):
            entries.append(_folder(repo, sha, path))
    if form.get("expand", [""])[0].lower() == "true":
        _with_last_commits(repo, sha, entries)
    return entries


# --- references and history --------------------------------------------------------------------------------------


@router.get("/api/{kind}/{owner}/{name}/refs")
def refs(repo: ReadableRepo, include_prs: bool = False) -> dict[str, Any]:
    """Branches, tags and, if asked for, pull requests."""

    def listed(prefix: str) -> list[dict[str, str]]:
        found = repo.refs(prefix).items()
        return [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": sha} for n, sha in found]

    answer: dict[str, Any] = {"branches": listed("heads"), "tags": listed("tags"), "converts": []}
    if include_prs:
        answer["pullRequests"] = listed("pr")
    return answer


@router.get("/api/{kind}/{owner}/{name}/commits/{rev}")
def commits(
    repo: ReadableRepo,
    revision: Revision,
    request: Request,
    response: Response,
    endpoint: Endpoint,
    p: int = 0,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """History, newest first, page by page."""
    log = list(repo.log(repo.resolve(revision)))
    page = Page.of(log, p, limit)
    if page.cursor:
        response.headers["Link"] = f'<{endpoint}{request.url.path}?p={page.cursor}&limit={limit}>; rel="next"'
    entries = []
    for commit in page.items:
        title, _, message = commit.message.decode(errors="replace").partition("\n")
        author = commit.author.decode(errors="replace").split(" <")[0]
        entries.append(
            {
                "id": commit.id.decode(),
                "title": title,
                "message": message.strip(),
                "date": stamp(commit.commit_time),
                "authors": [{"user": author}],
            }
        )
    return entries


@router.post("/api/{kind}/{owner}/{name}/branch/{rev}")
def create_branch(repo: WritableRepo, revision: Revision, body: BranchBody) -> dict[str, Any]:
    """Makes a branch, at main or at the `startingPoint`."""
    repo.create_ref("heads", revision, repo.resolve(body.startingPoint))
    return {}


@router.delete("/api/{kind}/{owner}/{name}/branch/{rev}")
def delete_branch(repo: WritableRepo, revision: Revision) -> dict[str, Any]:
    """Removes a branch."""
    repo.delete_ref("heads", revision)
    return {}


@router.post("/api/{kind}/{owner}/{name}/tag/{rev}")
def create_tag(repo: WritableRepo, revision: Revision, user: SignedIn, body: TagBody) -> dict[str, Any]:
    """Tags a revision."""
    repo.create_ref("tags", body.tag, repo.resolve(revision), body.message, user.name)
    return {}


@router.delete("/api/{kind}/{owner}/{name}/tag/{rev}")
def delete_tag(repo: WritableRepo, revision: Revision) -> dict[str, Any]:
    """Removes a tag."""
    repo.delete_ref("tags", revision)
    return {}
