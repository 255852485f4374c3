"""Parts of every page as HTML, pure functions of plain data; `Markup.format` escapes every text that goes in."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

HEADER = Markup('<header class="ui-head"><p class="ui-kicker">{}</p><h1>{}<code>{}</code></h1><p>{}</p></header>')
MESSAGE = Markup('<section class="ui-card ui-message" role="status"><h2>{}</h2><p>{}</p>{}</section>')
PARAGRAPH = Markup("<p>{}</p>")
LINK = Markup('<a href="{}"{} target="_blank" rel="noopener">{}</a>')
TITLE = Markup(' title="{}"')


def percent(share: float, digits: int = 0) -> str:
    """0.314 as "31 %"."""
    return f"{100 * share:.{digits}f} %"


def count(number: int, thing: str) -> str:
    """3, "expert" as "3 experts"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def join(parts: Iterable[Markup]) -> Markup:
    """Pieces of HTML one after the other."""
    return Markup("").join(parts)


def link(url: str | None, text: str, title: str = "") -> Markup:
    """A link that opens another page, or the mere text without a URL."""
    about = TITLE.format(title) if title else ""
    return LINK.format(url, about, text) if url else Markup("<span{}>{}</span>").format(about, text)


def header(kicker: str, name: str, text: str, sha: str = "") -> Markup:
    """What a page is about, and one sentence on what it does."""
    return HEADER.format(kicker, name, sha[:7], text)


def message(title: str, text: str, hint: str = "") -> Markup:
    """Something to say in place of a result.

    Args:
        hint: what to do about it; markup stands as it is.
    """
    more = hint if isinstance(hint, Markup) else PARAGRAPH.format(hint) if hint else ""
    return MESSAGE.format(title, text, more)
