"""The NDJSON body of a commit, read from disk without ever holding a whole file in memory."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from hf_fusion.server import card
from hf_fusion.server.errors import HubError
from hf_fusion.server.files import IncomingFile, size_of
from hf_fusion.server.names import check_path
from hf_fusion.server.repo import LARGE_SUFFIXES, POINTER, Change, Repo, pointer

LARGE_BYTES = 10 << 20  # git itself gets slow with more
CONTENT = re.compile(rb'"content"\s*:\s*"')
CONTENT_WITHIN = 1 << 14  # the content's key comes within the first bytes of its line
MAX_LINE = 1 << 20  # bytes of a line, but for a file's content
STEP = 4 * -(-LARGE_BYTES // 3)  # base64 characters decoded at once: files that are not large need one step


@dataclass
class CommitRequest:
    """What a client asks for; the blobs and large files are already stored."""

    summary: str = ""
    description: str = ""
    parent: str | None = None
    change: Change = field(default_factory=Change)


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file is kept beside git rather than in it: by suffix, by size, or because it is binary."""
    suffix = path.rsplit(".", 1)[-1].lower()
    return size > 0 and (suffix in LARGE_SUFFIXES or size > LARGE_BYTES or b"\0" in sample)


def read_commit(body: Path, repo: Repo, scratch: Path) -> CommitRequest:
    """Reads a commit's body, storing its files.

    Args:
        body: the NDJSON as it came.
        repo: where the files go.
        scratch: for files that are not complete yet.

    Raises:
        HubError: 400 for an invalid body, or one that names a large file that was never uploaded.
    """
    request = CommitRequest()
    try:
        for key, value, content in _lines(body):
            _apply_line(request, repo, scratch, key, value, content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise HubError(400, f"the commit cannot be read: {error!r}") from error
    if not request.summary:
        raise HubError(400, "the commit has no header line with a summary")
    return request


def _apply_line(
    request: CommitRequest,
    repo: Repo,
    scratch: Path,
    key: str,
    value: dict[str, Any],
    content: Iterator[bytes] | None,
) -> None:
    change = request.change
    if key == "header":
        request.summary = str(value["summary"])
        request.description = str(value.get("description") or "")
        request.parent = value.get("parentCommit")
        if not isinstance(request.parent, (str, type(None))):
            raise ValueError("parentCommit is not a sha")
        return
    path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        change.files[path] = _store(repo, scratch, path, content or iter(()))
    elif key == "lfsFile":
        change.files[path] = _link(repo, path, str(value["oid"]), value.get("size"))
    elif key == "deletedFile":
        change.files[path] = None
    elif key == "deletedFolder":
        change.deleted_folders.append(path)
    else:
        raise ValueError(f"unknown operation {key!r}")


def _lines(body: Path) -> Iterator[tuple[str, dict[str, Any], Iterator[bytes] | None]]:
    """Key and value of each line; the base64 of a file comes apart, as an iterator over its bytes."""
    with body.open("rb") as file:
        start = 0
        while beginning := _read(file, start, start + CONTENT_WITHIN):
            end = _find(file, b"\n", start)
            # a quote within a JSON string is escaped, so this cannot match inside a path
            match = CONTENT.search(beginning[: end - start])
            if match:
                first = start + match.end()
                last = min(_find(file, b'"', first), end)
                line = json.loads(beginning[: match.end()] + _read_json_part(file, last, end))
                yield line["key"], line["value"], _decode_base64(file, first, last)
            elif end > start:
                line = json.loads(_read_json_part(file, start, end))
                yield line["key"], line["value"], None
            start = end + 1


def _read(file: IO[bytes], start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _read_json_part(file: IO[bytes], start: int, end: int) -> bytes:
    if end - start > MAX_LINE:
        raise HubError(
            413, f"a line of the commit has {end - start:,} bytes beside its content; the limit is {MAX_LINE:,}"
        )
    return _read(file, start, end)


def _find(file: IO[bytes], byte: bytes, start: int) -> int:
    """Where ``byte`` next stands, or the end of the file."""
    file.seek(start)
    while step := file.read(STEP):
        if (found := step.find(byte)) >= 0:
            return start + found
        start += len(step)
    return start


def _decode_base64(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    for position in range(start, end, STEP):
        try:
            yield base64.b64decode(_read(file, position, min(position + STEP, end)), validate=True)
        except binascii.Error as error:
            raise HubError(400, f"the content of a file in the commit is not base64: {error}") from error


def _store(repo: Repo, scratch: Path, path: str, content: Iterator[bytes]) -> str:
    """Stores a file sent within the commit, beside git if it is large."""
    data = next(content, b"")
    more = next(content, None)
    if more is not None or is_large(path, len(data), data[:512]):
        with IncomingFile(scratch) as incoming:
            for piece in chain((data, more or b""), content):
                incoming.write(piece)
            repo.add_large(incoming, incoming.sha256)
            return repo.add_blob(pointer(incoming.sha256, incoming.size))
    if match := POINTER.fullmatch(data):
        return _link(repo, path, match[1].decode(), int(match[2]))
    if path == "README.md" and (errors := card.problems(data.decode(errors="replace"))[0]):
        raise HubError(400, f"README.md: {'; '.join(errors)}")
    return repo.add_blob(data)


def _link(repo: Repo, path: str, sha256: str, size: int | None) -> str:
    """A pointer to a large file, which must have arrived before."""
    found = size_of(repo.large_path(sha256))
    if found is None or size not in (None, found):
        raise HubError(400, f"{path} points to {sha256}, which was never uploaded")
    return repo.add_blob(pointer(sha256, found))
