"""Ids on the Hub, and in the Hub's cache, that are almost like one that was not found."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import nearest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SECONDS, MOST = 3.0, 200
"""The longest that a search may take, and the most repos that are compared."""


def near_ids(repo_id: str, api: HfApi | None = None) -> list[str]:
    """Ids of models that may have been meant, the nearest first; it never raises, and takes at most `SECONDS`.

    Args:
        repo_id: of no repo.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token. Offline, only the cache is read.
    """
    owner, _, name = repo_id.rpartition("/")
    known = _cached()
    search = threading.Thread(target=_search, args=(owner, name, api, known), daemon=True)
    search.start()
    search.join(SECONDS)
    found = [each for each in list(known) if each != repo_id]
    names = {each.rpartition("/")[2]: each for each in found if each.rpartition("/")[0].casefold() == owner.casefold()}
    if close := [names[each] for each in nearest(name, names)]:
        return close
    owners = {each.rpartition("/")[0]: each for each in found if each.rpartition("/")[2].casefold() == name.casefold()}
    return [owners[each] for each in nearest(owner, owners)] or list(owners.values())[:3]


def _search(owner: str, name: str, api: HfApi | None, known: dict[str, None]) -> None:
    with suppress(Exception):  # the Hub may be unreachable: its error was reported already
        from huggingface_hub import HfApi

        hub = api or HfApi()
        for info in hub.list_models(author=owner, limit=MOST) if owner else ():
            known[info.id] = None
        for info in hub.list_models(search=name, limit=MOST):
            known[info.id] = None


def _cached() -> dict[str, None]:
    """Ids of models in the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        folders = [path.name for path in Path(HF_HUB_CACHE).iterdir() if path.name.startswith("models--")]
        return {name.removeprefix("models--").replace("--", "/"): None for name in folders}
    return {}
