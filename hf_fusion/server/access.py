"""Who asks, and what they may see: the FastAPI dependencies every route shares."""

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
    """The address the client used, so that links in answers lead back the same way."""
    return str(request.base_url).rstrip("/")


StoreDep = Annotated[Store, Depends(get_store)]
Endpoint = Annotated[str, Depends(endpoint)]


def current_user(request: Request, store: StoreDep) -> User | None:
    """The user of the token in the request, or None without one.

    Raises:
        HubError: 401 for a token nobody has.
    """
    authorization = request.headers.get("authorization", "")
    user = token_user(authorization, store)
    if user is None and _token(authorization):
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def token_user(authorization: str, store: Store) -> User | None:
    """The user of an Authorization header; None for none, and for a token nobody has."""
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
    """A user, or 401."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return user


SignedIn = Annotated[User, Depends(signed_in)]


def may_read(repo: Repo, user: User | None) -> bool:
    """The repo is public or the user's own."""
    return not repo.settings.get("private") or (user is not None and user.owns(repo.owner))


def find(store: Store, kind: str, name: str, user: User | None) -> Repo:
    """A repo the user may see.

    Raises:
        HubError: 404, alike for missing and for hidden ones.
    """
    repo = store.get(kind, name)
    if not may_read(repo, user):
        raise repo_not_found(name)
    return repo


def check_write(repo: Repo, user: User) -> Repo:
    """Lets the owner and members of the owning organisation pass.

    Raises:
        HubError: 403 for others.
    """
    if not user.owns(repo.owner):
        raise HubError(403, f"{user.name} has no write access to {repo.name}")
    return repo


def check_gate(repo: Repo, user: User | None) -> None:
    """Files of a gated repo are for its owner and for those who were granted access.

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
