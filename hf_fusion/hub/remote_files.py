"""Small parts of files on the Hub, one request each: JSON files, and the headers of safetensors files.

`hf_hub_download` asks twice for a file, for its metadata and then for the file, and stores it. What is only looked at
once, in hundreds of repos, is read directly from its address; what an earlier download stored is read from there.
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

# what is asked of the Hub about a repo in a list, beside its card; sizes of files are not among what it tells there
DESCRIBED: tuple[Any, ...] = ("sha", "siblings", "tags", "pipeline_tag", "downloads", "gated", "private")
MAX_HEADER = 25 << 20  # as huggingface_hub's own limit
_FIRST = 100_000  # bytes: most headers are shorter, so that one request is enough


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


# a card of wrong types makes the client fail on all that the Hub says of a repo, and on the list that it is in
CARD_ERRORS = (TypeError, AttributeError, ValueError, KeyError)


def fetch_model_info(repo_id: str, revision: str | None, api: HfApi) -> ModelInfo:
    """What the Hub says of a repo, without its card where the client cannot read that.

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
    """The metadata of a repo's card, as far as it can be read."""
    try:
        return filter_metadata(info.card_data.to_dict() if info.card_data else {})
    except CARD_ERRORS:
        return {}


def read_range(api: HfApi, repo_id: str, file: str, revision: str | None, start: int, stop: int) -> FileRange:
    """The bytes from `start` to `stop` of a file in a model repo, fewer where the file ends before.

    Never holds more than ``stop - start`` bytes, whatever the server sends.

    Raises:
        HfHubHTTPError, TransportError: as the client raises them.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo_id, file, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token, library_name=api.library_name, headers=api.headers)
    headers |= {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}  # sizes are those of the file
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
    """A JSON file at a commit: from the cache of an earlier download, else by one request.

    Raises:
        FusionError: it is larger than any such file.
        HfHubHTTPError, TransportError: as the client raises them.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, file, revision=revision)
    # the cache follows a branch that is called like the commit
    if isinstance(cached, str) and Path(cached).parents[file.count("/")].name == revision:
        return read_file(Path(cached), most=MAX_BYTES)
    part = read_range(api, repo_id, file, revision, 0, MAX_BYTES)
    if part.size > MAX_BYTES:
        raise FusionError(f"{repo_id}: {file} has {part.size:,} bytes: no such file is larger than {MAX_BYTES:,}.")
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
    """The header of a safetensors file, by one request, or two where it is longer than most.

    Raises:
        FusionError: the file is not in safetensors' format.
        HfHubHTTPError, TransportError: as the client raises them.
    """
    part = read_range(api, repo_id, file, revision, 0, _FIRST)
    length = int.from_bytes(part.data[:8], "little")
    if len(part.data) < 8 or length > part.size - 8:
        raise FusionError(f"{repo_id}: {file} is not a safetensors file: its header does not fit.")
    refuse_long(length, part.size, f"{repo_id}: {file}")
    text = part.data[8 : 8 + length]
    if len(text) < length:
        text += read_range(api, repo_id, file, revision, 8 + len(text), 8 + length).data
    try:
        shapes = _shapes(parse(text, file, repo_id))
    except (ValueError, FusionError):
        raise FusionError(f"{repo_id}: {file} is not a safetensors file: its header cannot be read.") from None
    return Header(shapes, part.size)


def refuse_long(length: int, size: int, what: str) -> None:
    """Refuses a header that is out of proportion to its file: reading it would take more memory than any does.

    Args:
        length: of the header, in bytes.
        size: of the whole file.
        what: what the error calls the file.

    Raises:
        FusionError: for more than 4 MB and a byte for each 500 of the file, or 25 MB.
    """
    if length > min(MAX_HEADER, (4 << 20) + size // 500):
        raise FusionError(f"{what} has {size:,} bytes and a header of {length:,}: it names more tensors than it holds.")


def _shapes(header: object) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape.

    Raises:
        ValueError: for an entry that describes no tensor.
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
