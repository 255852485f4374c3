"""Text from facts as Markdown: escaped, linked, fenced. Nothing of a stranger's becomes markup, a link or a command."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from hf_fusion.hub.readme import escape_markdown
from hf_fusion.types import CONTENT, ModelRef

NO_BREAK_SPACE, NO_BREAK_DASH = "\u00a0", "–\u2060"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def code(text: object) -> str:
    """The inside of a code span, on one line."""
    return " ".join(str(text).replace("`", "'").split())


def repo_path(repo_id: str) -> str:
    """The path of a repo on the Hub's site, whatever characters its name has."""
    return f"/{quote(repo_id, safe='/')}"


def link(pinned: str) -> str:
    """A model's name, with a link if it is on the Hub."""
    ref = ModelRef.parse_repo(pinned)
    if ref.is_content or (not ref.revision and (pinned.endswith("@") or "/" not in ref.id)):
        return escape_markdown(ref.id)
    return f"[{escape_markdown(ref.id)}]({repo_path(ref.repo)})"


def commit(pinned: str) -> str:
    """The commit of a model on the Hub with a link, or the digest of a folder; empty if neither is known."""
    ref = ModelRef.parse_repo(pinned)
    sha = ref.revision or ""
    if ref.is_content:
        return f"a folder, sha256 {escape_markdown(sha.removeprefix(CONTENT)[:12])}…"
    return f"[{escape_markdown(sha[:7])}]({repo_path(ref.repo)}/tree/{quote(sha)})" if sha else ""


def first_names(names: Sequence[str], most: int = 6) -> str:
    """The first `most` names, and their count if there are more."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)})"


def percent(share: float | None) -> str:
    """A share in percent, on one line; empty if it is not known."""
    return "" if share is None else f"{share:.0%}".replace("%", f"{NO_BREAK_SPACE}%")


def size(count: int) -> str:
    """A number of bytes in units of 10⁶ or 10⁹."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


FILTERS: dict[str, Callable[..., Any]] = {
    "md": escape_markdown,
    "code": code,
    "linked": link,
    "commit": commit,
    "some": first_names,
    "percent": percent,
    "size": size,
    "millions": lambda count: f"{count / 1e6:,.1f} million",
    "count": "{:,}".format,
}
"""Filters of the templates; every value of a stranger's goes through one of them."""
