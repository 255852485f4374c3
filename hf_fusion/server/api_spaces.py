"""Routes for Spaces alone: their variables, which only those see who may write."""

from __future__ import annotations

from threading import Lock
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from hf_fusion.server.access import SignedIn, StoreDep, check_write, find
from hf_fusion.server.bodies import KeyBody, VariableBody
from hf_fusion.server.dates import now
from hf_fusion.server.repo import Repo

router = APIRouter()
_changing = Lock()


def _writable_space(owner: str, name: str, store: StoreDep, user: SignedIn) -> Repo:
    return check_write(find(store, "spaces", f"{owner}/{name}", user), user)


Space = Annotated[Repo, Depends(_writable_space)]


def _variables(space: Repo) -> dict[str, Any]:
    return dict(space.settings.get("variables", {}))


@router.get("/api/spaces/{owner}/{name}/variables")
def variables(space: Space) -> dict[str, Any]:
    """Key → value, description and date of the last change."""
    return _variables(space)


@router.post("/api/spaces/{owner}/{name}/variables")
def set_variable(body: VariableBody, space: Space) -> dict[str, Any]:
    """Sets a variable; all variables are the answer."""
    changed = {**body.model_dump(exclude_none=True), "updatedAt": now()}
    with _changing:
        space.change_settings(variables={**_variables(space), body.key: changed})
    return _variables(space)


@router.delete("/api/spaces/{owner}/{name}/variables")
def delete_variable(body: KeyBody, space: Space) -> dict[str, Any]:
    """Removes a variable, if it is set; all others are the answer."""
    with _changing:
        space.change_settings(variables={key: each for key, each in _variables(space).items() if key != body.key})
    return _variables(space)
