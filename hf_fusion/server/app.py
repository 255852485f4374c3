"""The web application: routes, errors in the clients' format, and a record of each request."""

from __future__ import annotations

import errno
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

from hf_fusion.server import api_download, api_git, api_misc, api_repos, api_spaces, api_upload, pages, xet
from hf_fusion.server.access import token_user
from hf_fusion.server.errors import HubError, repo_not_found
from hf_fusion.server.limits import read_body, replay_body, route_limit
from hf_fusion.server.store import Store

logger = logging.getLogger(__name__)
Record = tuple[str, str, int]
UPLOAD_SECONDS = 24 * 3600
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)


class Signer:
    """Signs addresses that are used without a token; the key is valid for one process."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, text: str) -> str:
        """A signature that is valid for a day."""
        expires = int(time.time()) + UPLOAD_SECONDS
        return f"{expires}-{self._digest(text, expires)}"

    def check(self, text: str, signature: str) -> None:
        """Raises HubError (403) unless ``signature`` was made here for ``text`` and still holds."""
        expires, _, digest = signature.partition("-")
        if not expires.isdecimal() or int(expires) < time.time():
            raise HubError(403, "the upload address has expired; push again")
        if not hmac.compare_digest(digest.encode(), self._digest(text, int(expires)).encode()):
            raise HubError(403, "the upload address was not issued by this Hub; push again")

    def _digest(self, text: str, expires: int) -> str:
        return hmac.new(self._key, f"{text}:{expires}".encode(), hashlib.sha256).hexdigest()


def build_app(store: Store, requests: deque[Record]) -> ASGIApp:
    """The ASGI application.

    Args:
        store: the Hub's folder.
        requests: where (method, path, status) of each answered request goes. The query string, which can hold
            signatures, and the headers, which hold tokens, do not.
    """
    app = FastAPI(
        title="hf_fusion embedded Hub",
        docs_url=None,
        redoc_url=None,
        openapi_url="/.well-known/openapi.json",  # where huggingface.co has its own
    )
    app.state.store = store
    app.state.signer = Signer()
    for module in (api_misc, api_upload, xet, api_spaces, api_repos, api_download, api_git, pages):
        app.include_router(module.router)
    app.add_exception_handler(HubError, _refuse)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _not_found)
    for missing in (FileNotFoundError, KeyError):
        app.add_exception_handler(missing, _deleted_repo)
    app.add_exception_handler(OSError, _disk_error)
    return _RawPathApp(app, requests)


class _RawPathApp:
    """Routes on the raw path, which tells ``%2F`` from ``/``; records each response; limits bodies."""

    def __init__(self, app: FastAPI, requests: deque[Record]) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["raw_path"].decode("latin-1")
        scope = {**scope, "path": path}
        names = {name for name, _ in scope["headers"]}
        unread = b"transfer-encoding" in names or b"content-length" in names

        async def counted() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def record(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.append((scope["method"], path, message["status"]))
                logger.debug("%s %s %s", scope["method"], path, message["status"])
                if unread:  # the rest of a refused body is not read
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        rule = route_limit(scope["method"], path)
        if not rule.streamed:  # bodies in memory are read here, up to this caller's limit
            known = token_user(Request(scope).headers.get("authorization", ""), self._app.state.store)
            try:
                body = await read_body(counted, rule.most if known else rule.anonymous)
            except HubError as error:
                answer = (
                    error
                    if known or rule.most == rule.anonymous
                    else HubError(401, "Log in to send a request of this size.")
                )
                await _refuse(Request(scope), answer)(scope, counted, record)
                return
        await self._app(scope, counted if rule.streamed else replay_body(body, receive), record)


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


def _deleted_repo(request: Request, error: Exception) -> Response:
    """A missing file or object: 404 if the repo was deleted during the request, else an internal error."""
    repo = getattr(request.state, "repo", None)
    if repo is None or request.app.state.store.holds(repo):
        raise error
    return _refuse(request, repo_not_found(repo.name))


def _disk_error(request: Request, error: Exception) -> Response:
    """507 if the disk is full or not writable; nothing was changed."""
    assert isinstance(error, OSError)
    if error.errno not in FULL:
        raise error
    logger.warning("%s %s: %s", request.method, request.url.path, error)
    return _refuse(request, HubError(507, f"the Hub cannot write to its disk ({error.strerror}); nothing was changed"))


def _unknown_address(request: Request) -> Response:
    """Names without an owner ("gpt2") have no route; to a client that is a repo that does not exist."""
    path = request.url.path
    if "/resolve/" in path or path.startswith(("/api/models/", "/api/datasets/", "/api/spaces/")):
        return _refuse(request, repo_not_found(path))
    return _refuse(request, HubError(404, f"Cannot {request.method} {path}"))
