"""Size limits of request bodies, by route and caller, which are checked before a body is read."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Message, Receive

from hf_fusion.server.errors import HubError

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
MAX_COMMIT = 16 * GB  # streamed to disk
MAX_XORB = 80 * MB  # clients keep to 64 MiB


@dataclass(frozen=True)
class RouteLimit:
    """The limits of a route.

    Attributes:
        route: matches "METHOD /path".
        most: maximum size of a body in bytes.
        anonymous: the same without a valid token.
        streamed: whether the route itself reads the body in chunks, after it has checked access.
    """

    route: re.Pattern[str]
    most: int
    anonymous: int = 64 * KB
    streamed: bool = False


_REPO = r"/api/[^/]+/[^/]+/[^/]+"
# the first match applies
ROUTE_LIMITS = (
    RouteLimit(re.compile(rf"POST {_REPO}/commit/.*"), MAX_COMMIT, streamed=True),
    RouteLimit(re.compile(r"PUT /lfs/[^/]+/[^/]+/[^/]+/[0-9a-f]{64}"), MAX_COMMIT, streamed=True),
    RouteLimit(re.compile(r"POST /xet/[^/]+/[^/]+/[^/]+/[0-9a-f]{32}/.*"), MAX_XORB, streamed=True),
    RouteLimit(re.compile(r"POST /api/validate-yaml"), 4 * MB, anonymous=4 * MB),
    RouteLimit(re.compile(rf"POST {_REPO}/paths-info/.*"), 4 * MB, anonymous=4 * MB),
    RouteLimit(re.compile(r"POST /.*\.git/info/lfs/objects/batch"), 16 * MB, anonymous=1 * MB),
    RouteLimit(re.compile(r"(GET|HEAD|OPTIONS) .*"), 64 * KB),
    RouteLimit(re.compile(r".*"), 32 * MB),
)


def route_limit(method: str, path: str) -> RouteLimit:
    """The limits for a request."""
    return next(rule for rule in ROUTE_LIMITS if rule.route.fullmatch(f"{method} {path}"))


async def read_body(receive: Receive, most: int) -> bytes:
    """The whole body of a request.

    Raises:
        HubError: 413, as soon as more has come.
    """
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            raise too_large(most)
        if not message.get("more_body"):
            return bytes(body)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body that was read already."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def stream(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body of a request, in chunks.

    Raises:
        HubError: 413, as soon as more has come.
    """
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large(most)
        yield chunk


def too_large(most: int) -> HubError:
    """The error for a body above the limit."""
    return HubError(413, f"the request body is larger than {most:,} bytes")
