"""Who am I, collections, and the small questions clients ask."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from .access import SignedIn

router = APIRouter()


@router.get("/api/whoami-v2")
def whoami(user: SignedIn) -> dict[str, Any]:
    """The user of the token."""
    return {
        "type": "user",
        "id": user.name,
        "name": user.name,
        "fullname": user.name,
        "email": None,
        "canPay": False,
        "isPro": False,
        "orgs": [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "write"} for org in user.orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "token", "role": "write"}},
    }


@router.head("/api/telemetry/{topic:path}")
def telemetry() -> Response:
    """Clients announce themselves; nothing is kept."""
    return Response()
