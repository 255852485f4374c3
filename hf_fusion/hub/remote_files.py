"""Reads JSON files and headers of safetensors files from the Hub, with one request each.

`hf_hub_download` makes two requests per file, and stores it. Files that are read once, from hundreds of repos, are
requested directly instead; files in the cache of an earlier download are read from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.hub.commits import check_commit
from hf_fusion.hub.readme import filter_metadata
from hf_fusion.io.files import read_file
from hf_fusion.io.json_files import MAX_BYTES, parse

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

# fields requested for repos in a list, besides the card; lists have no file sizes
DESCRIBED: tuple[Any, ...] = ("sha", "siblings", "tags", "pipeline_tag", "downloads", "gated", "private")
MAX_HEADER = 25 << 20  # huggingface_hub's limit
_FIRST = 100_000  # bytes of the first request, enough for most headers


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


# raised by the client for a card with values of the wrong type, for the repo and for lists that contain it
CARD_ERRORS = (TypeError, AttributeError, ValueError, KeyError)


def fetch_model_info(repo_id: str, revision: str | None, api: HfApi) -> ModelInfo:
    """The Hub's information about a repo, without its card if the client cannot parse it.

    Raises:
        HfHubHTTPError, TransportError: as the client raises them.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError):
        raise
    except CARD_ERRORS:
        return api.model_info(repo_id, revision=revision, expand=list(DESCRIBED))


def card_of(info: ModelInfo) -> dict[str, Any]:
    """The valid metadata of a repo's card."""
    try:
        return filter_metadata(info.card_data.to_dict() if info.card_data else {})
    except CARD_ERRORS:
        return {}


def read_range(api: HfApi, repo_id: str, file: str, revision: str | None, start: int, stop: int) -> FileRange:
    """Reads bytes [start, stop) of a file in a model repo; fewer if the file is shorter.

    Buffers at most `stop` bytes, whatever the server sends.

    Raises:
        HfHubHTTPError, TransportError: as the client raises them.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo_id, file, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token, library_name=api.library_name, headers=api.headers)
    headers |= {
        "range": f"bytes={start}-{stop - 1}",
        "accept-encoding": "identity",
    }  # uncompressed, so that sizes are the file's
    with http_stream_backoff("GET", url, headers=headers) as response:
        if response.status_code == 416:  # the file is empty, or ends before `start`
            return FileRange(b"", start)
        hf_raise_for_status(response)
        for answer in (*response.history, response):
            if commit := answer.headers.get("x-repo-commit"):
                check_commit(repo_id, revision, commit)
        begins = start if response.status_code == 206 else 0  # a server may send the whole file
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= stop - begins:
                break
        length = response.headers.get("content-length")
        total = re.search(r"/(\d+)$", response.headers.get("content-range", ""))
    data = bytes(found[start - begins : stop - begins])
    return FileRange(data, int(total[1]) if total else int(length or begins + len(found)))


def read_json_file(api: HfApi, repo_id: str, file: str, revision: str) -> bytes:
    """Reads a JSON file at a commit: from the cache of an earlier download, else with one request.

    Raises:
        FusionError: it is larger than the limit.
        HfHubHTTPError, TransportError: as the client raises them.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, file, revision=revision)
    # the cache may resolve a branch that has the commit as its name
    if isinstance(cached, str) and Path(cached).parents[file.count("/")].name == revision:
        return read_file(Path(cached), most=MAX_BYTES)
    part = read_range(api, repo_id, file, revision, 0, MAX_BYTES)
    if part.size > MAX_BYTES:
        raise FusionError(f"{repo_id}: {file} has {part.size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return part.data


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        shapes: tensor name -> shape.
        size: bytes of the whole file.
    """

    shapes: dict[str, tuple[int, ...]]
    size: int


def read_header(api: HfApi, repo_id: str, file: str, revision: str | None) -> Header:
    """Reads the header of a safetensors file, with one request, or two if it is long.

    Raises:
        FusionError: the file is not a valid safetensors file.
        HfHubHTTPError, TransportError: as the client raises them.
    """
    part = read_range(api, repo_id, file, revision, 0, _FIRST)
    length = int.from_bytes(part.data[:8], "little")
    if len(part.data) < 8 or length > part.size - 8:
        raise FusionError(f"{repo_id}: {file} is not a safetensors file: its header is longer than the file")
    refuse_long(length, part.size, f"{repo_id}: {file}")
    text = part.data[8 : 8 + length]
    if len(text) < length:
        text += read_range(api, repo_id, file, revision, 8 + len(text), 8 + length).data
    try:
        shapes = _shapes(parse(text, file, repo_id))
    except (ValueError, FusionError):
        raise FusionError(f"{repo_id}: {file} is not a safetensors file: its header cannot be read") from None
    return Header(shapes, part.size)


def refuse_long(length: int, size: int, what: str) -> None:
    """Raises for a header that is implausibly long for its file, since reading it takes much memory.

    Args:
        length: of the header, in bytes.
        size: of the whole file, in bytes.
        what: name of the file in errors.

    Raises:
        FusionError: the header is longer than 4 MB plus 1/500 of the file, or than 25 MB.
    """
    if length > min(MAX_HEADER, (4 << 20) + size // 500):
        raise FusionError(f"{what} has a header of {length:,} bytes, implausibly long for a file of {size:,} bytes")


def _shapes(header: object) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape.

    Raises:
        ValueError: an entry has no valid shape.
    """
    if not isinstance(header, dict):
        raise ValueError("not an object")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} has no shape")
        found[name] = tuple(shape)
    return found
