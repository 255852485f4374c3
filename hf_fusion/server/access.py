"""Authentication and access control: the FastAPI dependencies that all routes share."""

from __future__ import annotations

import base64
from typing import Annotated, Literal
from urllib.parse import unquote

from fastapi import Depends, Path, Request

from hf_fusion.server.errors import HubError, repo_not_found
from hf_fusion.server.repo import Repo
from hf_fusion.server.store import Store
from hf_fusion.server.users import User

Kind = Literal["models", "datasets", "spaces"]


def get_store(request: Request) -> Store:
    """The Hub's folder."""
    store: Store = request.app.state.store
    return store


def endpoint(request: Request) -> str:
    """The address that the client used, for links in responses."""
    return str(request.base_url).rstrip("/")


StoreDep = Annotated[Store, Depends(get_store)]
Endpoint = Annotated[str, Depends(endpoint)]


def current_user(request: Request, store: StoreDep) -> User | None:
    """The user of the token in the request, or None without one.

    Raises:
        HubError: 401 for an unknown token.
    """
    authorization = request.headers.get("authorization", "")
    user = token_user(authorization, store)
    if user is None and _token(authorization):
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def token_user(authorization: str, store: Store) -> User | None:
    """The user of an Authorization header; None without a header or for an unknown token."""
    token = _token(authorization)
    return store.users.by_token(token) if token else None


def _token(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    return {"bearer": value, "basic": _password(value)}.get(scheme.lower(), "") if value else ""


def _password(value: str) -> str:
    """git sends its token as the password of basic authentication."""
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except ValueError:  # not base64, or not text
        return ""


CurrentUser = Annotated[User | None, Depends(current_user)]


def signed_in(user: CurrentUser) -> User:
    """The authenticated user; 401 without one."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return user


SignedIn = Annotated[User, Depends(signed_in)]


def may_read(repo: Repo, user: User | None) -> bool:
    """Whether the repo is public or belongs to the user."""
    return not repo.settings.get("private") or (user is not None and user.owns(repo.owner))


def find(store: Store, kind: str, name: str, user: User | None) -> Repo:
    """A repo the user may see.

    Raises:
        HubError: 404, the same for missing and for hidden repos.
    """
    repo = store.get(kind, name)
    if not may_read(repo, user):
        raise repo_not_found(name)
    return repo


def check_write(repo: Repo, user: User) -> Repo:
    """Check that the user is the owner or a member of the owning organisation.

    Raises:
        HubError: 403 for others.
    """
    if not user.owns(repo.owner):
        raise HubError(403, f"{user.name} has no write access to {repo.name}")
    return repo


def check_gate(repo: Repo, user: User | None) -> None:
    """Check that a gated repo belongs to the user or that access was granted.

    Raises:
        HubError: 401 or 403 GatedRepo.
    """
    if not repo.settings.get("gated"):
        return
    if user is None:
        raise HubError(401, f"Access to {repo.name} is restricted. Please log in.", "GatedRepo")
    if not user.owns(repo.owner) and user.name not in repo.settings.get("granted", ()):
        raise HubError(403, f"Access to {repo.name} is restricted and you are not in the list.", "GatedRepo")


def readable(
    request: Request,
    kind: Kind,
    owner: Annotated[str, Path()],
    name: Annotated[str, Path()],
    store: StoreDep,
    user: CurrentUser,
) -> Repo:
    """The repo of an API path, if the caller may see it."""
    request.state.repo = repo = find(store, kind, f"{unquote(owner)}/{unquote(name)}", user)
    return repo


ReadableRepo = Annotated[Repo, Depends(readable)]


def writable(repo: ReadableRepo, user: SignedIn) -> Repo:
    """The repo of an API path, if the caller may write to it."""
    return check_write(repo, user)


WritableRepo = Annotated[Repo, Depends(writable)]


def revision(rev: str) -> str:
    """The revision of a path, whose slashes arrive as %2F."""
    return unquote(rev)


Revision = Annotated[str, Depends(revision)]
