"""Web pages: an index of all repos, and one page per repo. They show public content."""

from __future__ import annotations

import posixpath
import re
from datetime import datetime, timezone
from functools import lru_cache
from html import escape
from typing import Annotated
from urllib.parse import quote, unquote, urlencode, urlsplit

import cmarkgfm
import nh3
from cmarkgfm.cmark import Options
from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, select_autoescape

from hf_fusion.server.access import Endpoint, Kind, StoreDep, find, may_read
from hf_fusion.server.errors import HubError
from hf_fusion.server.info import describe, facts
from hf_fusion.server.listing import SORTS, filter_repos
from hf_fusion.server.repo import Repo
from hf_fusion.server.store import KINDS
from hf_fusion.server.summaries import repo_properties

router = APIRouter()
SHOWN_REPOS, SHOWN_FILES, SHOWN_COMMITS = 200, 1000, 20
# Cards come from strangers: no scripts, and no images from elsewhere that would tell who reads what.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
MAX_OPEN = 500  # elements within elements; cleaning takes time by its square
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>")
VOID = {
    *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"),
}
CARD_TAGS = nh3.ALLOWED_TAGS - {"article", "area", "map"} | {"details", "summary"}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": _size, "ago": _ago, "count": _count, "path": quote}
    return environment


@router.get("/")
@router.get("/{author}")
def index(
    request: Request, store: StoreDep, endpoint: Endpoint, author: str = "", q: str = "", kind: Kind = "models"
) -> HTMLResponse:
    """All public repos of a kind, the most recently changed first; with an author, only the repos of that user."""
    author = unquote(author)
    if author and not store.users.exists(author):
        raise HubError(404, f"there is no user {author}")
    query = {"search": [q], "author": [author] if author else []}
    found = {k: filter_repos((repo for repo in store.all(k) if may_read(repo, None)), query) for k in KINDS}
    shown = sorted(found[kind], key=SORTS["lastModified"], reverse=True)[:SHOWN_REPOS]
    return _page(
        "index.html",
        kind=kind,
        counts={k: len(repos) for k, repos in found.items()},
        repos=[(_path(kind, repo.name), repo_properties(repo)) for repo in shown],
        more=max(len(found[kind]) - SHOWN_REPOS, 0),
        q=q,
        author=author,
        home=f"/{author}",
        endpoint=endpoint,
        link=lambda k: "?" + urlencode({"kind": k, "q": q}),
    )


def public_repo(owner: str, name: str, store: StoreDep, kind: Kind = "models") -> Repo:
    """The repo of a page's address, if everyone may see it."""
    return find(store, kind, f"{unquote(owner)}/{unquote(name)}", None)


PublicRepo = Annotated[Repo, Depends(public_repo)]


@router.get("/{owner}/{name}")
@router.get("/{kind}/{owner}/{name}")
def repo_page(repo: PublicRepo, endpoint: Endpoint, revision: str = "main") -> HTMLResponse:
    """A repo's card, files, tags, branches and history."""
    sha = repo.resolve(revision)
    path = _path(repo.kind, repo.name)
    log = repo.log(sha)
    commits = [commit for commit, _ in zip(log, range(SHOWN_COMMITS), strict=False)]
    files = list(repo.files(sha).values())
    return _page(
        "repo.html",
        repo=describe(repo, sha),
        kind=repo.kind,
        path=path,
        revision=revision,
        sha=sha,
        card=_card(repo, sha, path),
        files=files[:SHOWN_FILES],
        more_files=max(len(files) - SHOWN_FILES, 0),
        total=sum(file.size for file in files),
        commits=[
            {
                "sha": commit.id.decode(),
                "title": commit.message.decode(errors="replace").split("\n")[0],
                "author": commit.author.decode(errors="replace").split(" <")[0],
                "date": datetime.fromtimestamp(commit.commit_time, timezone.utc),
            }
            for commit in commits
        ],
        branches=repo.refs("heads"),
        tags=repo.refs("tags"),
        pull_requests=repo.refs("pr"),
        endpoint=endpoint,
    )


@router.get("/{owner}/{name}/{view}/{rev}")
@router.get("/{kind}/{owner}/{name}/{view}/{rev}")
def other_views(repo: PublicRepo, view: str, rev: str) -> Response:
    """Addresses that clients print (`/commit/sha`, `/tree/branch`, `/discussions/1`) lead to the repo's page."""
    if view not in ("commit", "tree", "commits", "discussions"):
        raise HubError(404, f"{repo.name} has no page {view}")
    revision = f"refs/pr/{rev}" if view == "discussions" else unquote(rev)
    return RedirectResponse(f"{_path(repo.kind, repo.name)}?{urlencode({'revision': revision})}")


def error_page(error: HubError) -> HTMLResponse:
    """An error, for a browser."""
    response = _page("error.html", error=error)
    response.status_code = error.status
    return response


@lru_cache(maxsize=1)
def _templates() -> Environment:
    return _environment()


def _page(template: str, **values: object) -> HTMLResponse:
    return HTMLResponse(_templates().get_template(template).render(values), headers=HEADERS)


def _path(kind: str, name: str) -> str:
    return f"/{name}" if kind == "models" else f"/{kind}/{name}"


@lru_cache(maxsize=256)
def _card(repo: Repo, sha: str, path: str) -> str:
    """The card as sanitised HTML; links and images inside the repo lead to its files."""

    def follow(tag: str, attribute: str, value: str) -> str | None:
        if attribute not in ("href", "src"):
            return value
        try:
            parts = urlsplit(value)
        except ValueError:
            return None
        if parts.scheme or parts.netloc or value.startswith(("#", "/")):
            return value
        target = posixpath.normpath(unquote(parts.path))
        return None if target.startswith("..") else f"{path}/resolve/{sha}/{quote(target)}"

    text = facts(repo, sha)["readme"]
    html = cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE)  # nh3 takes out what is unsafe
    if _depth(html) > MAX_OPEN:
        return f"<pre>{escape(text)}</pre>"
    return nh3.clean(html, tags=CARD_TAGS, attribute_filter=follow, url_schemes={"http", "https", "mailto"})


def _depth(html: str) -> int:
    """How many elements are open at once, at most; closing tags may be missing."""
    depth = deepest = 0
    for match in TAG.finditer(html):
        if match[2].lower() not in VOID:
            depth = max(depth + (-1 if match[1] else 1), 0)
            deepest = max(deepest, depth)
    return deepest


def _size(size: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _count(number: int) -> str:
    """22713216 -> "22.7M"."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)


def _ago(moment: datetime | str) -> str:
    """A time as "5 min ago"; beyond a month as a date."""
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    seconds = max((datetime.now(timezone.utc) - moment).total_seconds(), 0)
    if seconds < 60:
        return "just now"
    for length, unit in ((60, "min"), (3600, "h"), (86400, "d")):
        if seconds < length * (60 if unit == "min" else 24 if unit == "h" else 31):
            return f"{seconds // length:.0f} {unit} ago"
    return f"{moment:%Y-%m-%d}"
