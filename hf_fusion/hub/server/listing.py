"""Filtering, sorting and paging of repo lists, as the clients' query strings ask for it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

from .errors import HubError

Query = dict[str, list[str]]
T = TypeVar("T")

PAGE = 1000
# client's sort key -> property of the repo
SORTS = {
    "downloads": "downloads",
    "likes": "likes",
    "lastModified": "lastModified",
    "createdAt": "createdAt",
    "trendingScore": "trendingScore",
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


def matching(repos: list[dict[str, Any]], query: Query) -> list[dict[str, Any]]:
    """Those that pass every filter of the query."""
    filters = {part for value in query.get("filter", []) for part in value.split(",") if part}
    authors = {author.lower() for author in query.get("author", [])}
    words = [word.lower() for value in query.get("search", []) for word in value.split()]
    tasks = set(query.get("pipeline_tag", []))
    gated = query.get("gated", [""])[0].lower()
    return [
        repo
        for repo in repos
        if filters <= set(repo["tags"])
        and (not authors or repo["author"].lower() in authors)
        and all(word in repo["id"].lower() for word in words)
        and (not tasks or repo["pipeline_tag"] in tasks)
        and (not gated or bool(repo["gated"]) == (gated == "true"))
    ]


def paginate(repos: list[dict[str, Any]], query: Query) -> Page[dict[str, Any]]:
    """Sorted, and cut to the page after the cursor; repos made meanwhile neither repeat nor hide others."""
    sort = query.get("sort", ["trendingScore"])[0]
    if sort not in SORTS:
        raise HubError(400, f"cannot sort by {sort}; possible: {', '.join(SORTS)}")
    try:
        size = min(int(query.get("limit", [str(PAGE)])[0]), PAGE)
        after = json.loads(base64.urlsafe_b64decode(query["cursor"][0])) if "cursor" in query else None
    except ValueError:
        raise HubError(400, "limit must be a number and cursor one that the Hub gave") from None

    def key(repo: dict[str, Any]) -> tuple[Any, str, str]:
        return repo[SORTS[sort]], repo["createdAt"], repo["id"]

    ordered = sorted(repos, key=key, reverse=True)
    if after is not None:
        ordered = [repo for repo in ordered if list(key(repo)) < after]
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
