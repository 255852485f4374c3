"""The Hub's client: errors as FusionError, and parallel requests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_fusion.errors import FusionError, first_line, refusal, suggestion, unwritable
from hf_fusion.hub.near_ids import near_ids
from hf_fusion.progress import track

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")
R = TypeVar("R")

READERS = 48  # parallel small requests, which mostly wait


def hub_api(api: HfApi | None) -> HfApi:
    """The given client, or one for ``HF_ENDPOINT`` with the stored token."""
    from huggingface_hub import HfApi

    return api or HfApi()


# hints for HTTP statuses without an exception class in the client
_HINTS = {
    401: "hf auth login, or set HF_TOKEN",
    403: "hf auth login with a token that may write there",
    412: "the repo has changed since it was read: run the command again",
    507: "free some space on the Hub's disk, and run the command again",
}


@contextmanager
def explain_hub_errors(name: str, api: HfApi | None = None) -> Iterator[None]:
    """Turns exceptions of huggingface_hub into a FusionError that names the repo and the next step.

    Args:
        name: of the repo.
        api: the Hub's client, to find ids of models near one that was not found; None for other repos than models.
    """
    import httpx2
    from huggingface_hub import errors

    # subclasses before their base classes
    rows: tuple[tuple[type[Exception], str, str | None], ...] = (
        (errors.GatedRepoError, "is gated", "accept the terms on its page on the Hub, then: hf auth login"),
        (errors.RepositoryNotFoundError, "was not found", "check the id; a private repo needs: hf auth login"),
        (errors.RevisionNotFoundError, "has no such revision", "check the part after @"),
        (errors.EntryNotFoundError, "lacks a file", None),
        (errors.LocalTokenNotFoundError, "needs a token", "hf auth login, or set HF_TOKEN"),
        (errors.HFValidationError, "is not a valid repo id", "write owner/name"),
        (errors.OfflineModeIsEnabled, "cannot be read offline", "unset HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, "was refused by the Hub", None),
        (httpx2.TransportError, "cannot be reached", "check the network and HF_ENDPOINT"),
        (OSError, "cannot be read", None),
    )
    kinds = tuple(row[0] for row in rows)
    try:
        yield
    except (RuntimeError, *kinds) as raised:
        error = raised if isinstance(raised, kinds) else raised.__cause__  # the client wraps errors of large files
        if not isinstance(error, kinds):
            raise
        if refusal(error) is not None:  # the cache or a temporary file cannot be written
            raise unwritable(getattr(error, "filename", None) or name, error) from error
        what, hint = next((what, hint) for kind, what, hint in rows if isinstance(error, kind))
        if type(error) is errors.HfHubHTTPError:
            hint = _HINTS.get(error.response.status_code)
        is_missing = isinstance(error, (errors.RepositoryNotFoundError, errors.OfflineModeIsEnabled))
        is_missing &= not isinstance(error, errors.GatedRepoError)
        if is_missing and api is not None and (close := near_ids(name, api)):
            hint = f"{suggestion(close[0], close)} Or {hint}"
        raise FusionError(f"{name} {what} ({first_line(error).rstrip('.')})", hint=hint) from error


def in_parallel(function: Callable[[T], R], items: Iterable[T], workers: int = READERS, name: str = "") -> list[R]:
    """``[function(item) for item in items]`` in threads, for network requests; a phase if `name` is given."""
    items = list(items)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(function, items)
        return list(track(found, name, len(items)) if name else found)


def same_file(path: Path, entry: RepoFile) -> bool:
    """Whether a local file equals one in a repo, by SHA-256 for large files and by git's hash for others."""
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def silent_bar(more: Callable[[float], None] | None = None) -> type:
    """A tqdm class without output, which passes its increments to ``more``."""
    from tqdm.auto import tqdm

    class Forwarding(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(kwargs.get("initial", 0))  # bytes of an interrupted download

        def update(self, n: float | None = 1) -> None:
            if more is not None and n:
                more(n)

    return Forwarding
