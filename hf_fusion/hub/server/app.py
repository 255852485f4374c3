"""The web application: routes in order, errors as the clients expect them, one line of record per request."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections import deque

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import api_download, api_git, api_misc, api_repos, api_upload, pages, xet
from .errors import HubError, repo_not_found
from .store import Store

logger = logging.getLogger(__name__)
Record = tuple[str, str, int]
MAX_BODY = 64 << 20
STREAMED = ("/commit/", "/lfs/", "/xet/")  # these go to disk as they come
UPLOAD_SECONDS = 24 * 3600


class Signer:
    """Signs addresses that are used without a token; its key lives as long as the process."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, text: str) -> str:
        """A signature that holds for a day."""
        expires = int(time.time()) + UPLOAD_SECONDS
        return f"{expires}-{self._digest(text, expires)}"

    def check(self, text: str, signature: str) -> None:
        """Raises HubError (403) unless ``signature`` was made here for ``text`` and still holds."""
        expires, _, digest = signature.partition("-")
        if not expires.isdecimal() or int(expires) < time.time():
            raise HubError(403, "the upload address has expired; push again")
        if not hmac.compare_digest(digest.encode(), self._digest(text, int(expires)).encode()):
            raise HubError(403, "the upload address is not one of this Hub's; push again")

    def _digest(self, text: str, expires: int) -> str:
        return hmac.new(self._key, f"{text}:{expires}".encode(), hashlib.sha256).hexdigest()


def build_app(store: Store, requests: deque[Record]) -> ASGIApp:
    """The ASGI application.

    Args:
        store: the Hub's folder.
        requests: where (method, path, status) of each answered request goes. The query string, which can hold
            signatures, and the headers, which hold tokens, do not.
    """
    app = FastAPI(title="hf_fusion embedded Hub", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store = store
    app.state.signer = Signer()
    for module in (api_misc, api_upload, xet, api_repos, api_download, api_git, pages):
        app.include_router(module.router)
    app.add_exception_handler(HubError, _refuse)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _not_found)
    for missing in (FileNotFoundError, KeyError):
        app.add_exception_handler(missing, _vanished)
    return _Outermost(app, requests)


class _Outermost:
    """Routes on the raw path, so that ``%2F`` stays apart from ``/``; records each answer; limits bodies."""

    def __init__(self, app: FastAPI, requests: deque[Record]) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["raw_path"].decode("latin-1")

        async def record(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.append((scope["method"], path, message["status"]))
                logger.debug("%s %s %s", scope["method"], path, message["status"])
            await send(message)

        limited = receive if any(part in path for part in STREAMED) else _limited(receive)
        await self._app({**scope, "path": path}, limited, record)


def _limited(receive: Receive) -> Receive:
    """Bodies that are read into memory must be small."""
    size = 0

    async def count() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HubError(413, f"more than {MAX_BODY} bytes")
        return message

    return count


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/"):
        return pages.error_page(error)
    return JSONResponse(error.body, error.status, headers=error.headers)


def _bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["loc"][0] == "path":
        return _unknown_address(request)
    return _refuse(request, HubError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))


def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        return _unknown_address(request)
    return _refuse(request, HubError(error.status_code, str(error.detail)))


def _vanished(request: Request, error: Exception) -> Response:
    """A file or an object was missing: because the repo was deleted under the request, else by a mistake of ours."""
    repo = getattr(request.state, "repo", None)
    if repo is None or request.app.state.store.holds(repo):
        raise error
    return _refuse(request, repo_not_found(repo.name))


def _unknown_address(request: Request) -> Response:
    """Names without an owner ("gpt2") have no route; to a client that is a repo that does not exist."""
    path = request.url.path
    if "/resolve/" in path or path.startswith(("/api/models/", "/api/datasets/", "/api/spaces/")):
        return _refuse(request, repo_not_found(path))
    return _refuse(request, HubError(404, f"Cannot {request.method} {path}"))
