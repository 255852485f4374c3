"""Filtering, sorting and paging of repo lists, as the clients' query strings ask for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

from hf_fusion.server.errors import HubError
from hf_fusion.server.info import DEFAULT_PROPERTIES
from hf_fusion.server.repo import Repo
from hf_fusion.server.summaries import summary

Query = dict[str, list[str]]
T = TypeVar("T")

PAGE = 1000
MAX_CURSOR = 2000  # characters
# client's sort key -> what is compared
SORTS: dict[str, Callable[[Repo], Any]] = {
    "downloads": lambda repo: repo.downloads,
    "likes": lambda repo: DEFAULT_PROPERTIES["likes"],
    "lastModified": lambda repo: summary(repo).properties["lastModified"],
    "createdAt": lambda repo: repo.settings["created"],
    "trendingScore": lambda repo: DEFAULT_PROPERTIES["trendingScore"],
}
SHORT = [
    *("_id", "id", "modelId", "author", "private", "gated", "downloads", "likes", "tags", "pipeline_tag"),
    *("library_name", "createdAt", "lastModified", "trendingScore", "sdk"),
]
# the model-only properties of SHORT
MODEL_ONLY = {"modelId", "pipeline_tag", "library_name"}


@dataclass
class Page(Generic[T]):
    """A page of a list and where the next one starts, if there is one."""

    items: list[T]
    cursor: str | None = None

    @classmethod
    def of(cls, items: list[T], number: int, size: int) -> Page[T]:
        """Page ``number``, counted from 0; its cursor is the next number."""
        size = min(max(size, 1), PAGE)
        start = max(number, 0) * size
        more = len(items) > start + size
        return cls(items[start : start + size], str(number + 1) if more else None)


def filter_repos(repos: Iterable[Repo], query: Query) -> list[Repo]:
    """Those that pass every filter of the query; those deleted meanwhile are left out."""
    filters = {part for value in query.get("filter", []) for part in value.split(",") if part}
    authors = {author.lower() for author in query.get("author", [])}
    words = [word.lower() for value in query.get("search", []) for word in value.split()]
    tasks = set(query.get("pipeline_tag", []))
    gated = query.get("gated", [""])[0].lower()
    found = []
    for repo in repos:
        if (
            (not authors or repo.owner.lower() in authors)
            and all(word in repo.name.lower() for word in words)
            and (not gated or bool(repo.settings.get("gated")) == (gated == "true"))
        ):
            with suppress(HubError, FileNotFoundError):
                known = summary(repo)
                if filters <= known.tags and (not tasks or known.properties["pipeline_tag"] in tasks):
                    found.append(repo)
    return found


def paginate(repos: list[Repo], query: Query) -> Page[Repo]:
    """Sorted, and cut to the page after the cursor; repos made meanwhile neither repeat nor hide others."""
    sort = query.get("sort", ["trendingScore"])[0]
    if sort not in SORTS:
        raise HubError(400, f"repos cannot be sorted by {sort}; use one of {', '.join(SORTS)}")

    def key(repo: Repo) -> tuple[Any, str, str]:
        return SORTS[sort](repo), repo.settings["created"], repo.name

    ordered = sorted(repos, key=key, reverse=True)
    try:
        size = min(int(query.get("limit", [str(PAGE)])[0]), PAGE)
        if "cursor" in query:
            first, created, name = json.loads(base64.urlsafe_b64decode(query["cursor"][0][:MAX_CURSOR]))
            ordered = [repo for repo in ordered if key(repo) < (first, str(created), str(name))]
    except (ValueError, TypeError, RecursionError):
        raise HubError(400, "limit must be a number, and cursor must come from an earlier response") from None
    items = ordered[: max(size, 0)]
    more = items and len(ordered) > len(items)
    cursor = base64.urlsafe_b64encode(json.dumps(key(items[-1])).encode()).decode() if more else None
    return Page(items, cursor)


def properties(repo: dict[str, Any], kind: str, query: Query) -> dict[str, Any]:
    """The part of a repo's properties that a list shows."""
    if expand := query.get("expand"):
        names = ["_id", "id", *expand]
    else:
        names = [name for name in SHORT if kind == "models" or name not in MODEL_ONLY]
        if _is_true(query, "full"):
            names += ["sha", "siblings", "disabled", "cardData"]
        names += [name for name in ("cardData", "config") if _is_true(query, name)]
    return {name: repo[name] for name in names if name in repo}


def next_link(url: str, query: Query, cursor: str) -> str:
    """The ``Link`` header that leads to the next page."""
    following = urlencode({**query, "cursor": [cursor]}, doseq=True)
    return f'<{url}?{following}>; rel="next"'


def _is_true(query: Query, name: str) -> bool:
    return query.get(name, [""])[0].lower() in ("true", "1")
