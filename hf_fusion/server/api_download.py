"""Downloads of files and byte ranges."""

from __future__ import annotations

import mimetypes
import re
from typing import Annotated
from urllib.parse import unquote

from fastapi import APIRouter, Header, Request
from fastapi.responses import FileResponse, Response

from hf_fusion.server.access import CurrentUser, Kind, Revision, StoreDep, check_gate, find
from hf_fusion.server.errors import HubError, repo_not_found
from hf_fusion.server.repo import File

router = APIRouter()
# a request for one of these files counts as a download of the repo
COUNTED = {
    "models": {"config.json", "adapter_config.json", "model_index.json"},
    "datasets": {"README.md"},
    "spaces": {"README.md"},
}
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class LargeFile(FileResponse):
    """A file from disk, in chunks that are large enough to keep the event loop's overhead small."""

    chunk_size = 1 << 20


@router.get("/{owner}/{name}/resolve/{rev}/{path:path}")
@router.head("/{owner}/{name}/resolve/{rev}/{path:path}")
@router.get("/{kind}/{owner}/{name}/resolve/{rev}/{path:path}")
@router.head("/{kind}/{owner}/{name}/resolve/{rev}/{path:path}")
def resolve(
    owner: str,
    name: str,
    request: Request,
    revision: Revision,
    path: str,
    store: StoreDep,
    user: CurrentUser,
    kind: Kind = "models",
    range_: Annotated[str | None, Header(alias="range")] = None,
) -> Response:
    """A file at a revision. Large files have the same address: clients lose X-Repo-Commit in a redirect."""
    repo = find(store, kind, f"{unquote(owner)}/{unquote(name)}", user)
    check_gate(repo, user)
    sha = repo.resolve(revision)
    file = repo.file(sha, unquote(path))
    if request.method == "GET" and file.path in COUNTED[repo.kind]:
        repo.count_download()
    headers = {
        "X-Repo-Commit": sha,
        "ETag": f'"{file.sha256 or file.oid}"',
        "Accept-Ranges": "bytes",
        "Access-Control-Expose-Headers": "X-Repo-Commit, X-Linked-Size, X-Linked-Etag",
        # files are untrusted: browsers must not run them
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    }
    media_type = _media_type(file)
    if file.sha256:
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        large = repo.large_path(file.sha256)
        if not large.exists():
            raise repo_not_found(repo.name)  # deleted meanwhile
        return LargeFile(large, headers=headers, media_type=media_type)
    return _range_response(repo.read(file), range_, headers, media_type)


def _media_type(file: File) -> str:
    """The type of an image, plain text for small files, and bytes for other large files."""
    guess = mimetypes.guess_type(file.path)[0] or ""
    if guess.startswith("image/") and guess != "image/svg+xml":
        return guess
    return "application/octet-stream" if file.sha256 else "text/plain; charset=utf-8"


def _range_response(data: bytes, wanted: str | None, headers: dict[str, str], media_type: str) -> Response:
    """The requested range of ``data``, or all of it."""
    match = RANGE.fullmatch(wanted or "")
    if not match or match.groups() == ("", ""):
        return Response(data, headers=headers, media_type=media_type)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        raise HubError(
            416,
            f"the range {wanted} is outside the file's {len(data)} bytes",
            headers={"Content-Range": f"bytes */{len(data)}"},
        )
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    return Response(data[start:end], 206, headers=headers, media_type=media_type)
