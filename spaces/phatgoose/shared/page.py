"""Parts of every page as HTML, pure functions of plain data; `Markup.format` escapes every text that goes in."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

HEADER = Markup('<header class="ui-head"><p class="ui-kicker">{}</p><h1>{}<code>{}</code></h1><p>{}</p></header>')
MESSAGE = Markup('<section class="ui-card ui-message" role="status"><h2>{}</h2><p>{}</p>{}</section>')
ABOUT = Markup('<footer class="ui-about">{}</footer>')
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
    """Concatenates pieces of HTML."""
    return Markup("").join(parts)


def link(url: str | None, text: str, title: str = "") -> Markup:
    """A link that opens a new tab, or only the text if there is no URL."""
    about = TITLE.format(title) if title else ""
    return LINK.format(url, about, text) if url else Markup("<span{}>{}</span>").format(about, text)


def header(kicker: str, name: str, text: str, sha: str = "") -> Markup:
    """The head of a page: its subject, and a sentence on what it does."""
    return HEADER.format(kicker, name, sha[:7], text)


def about(links: Iterable[tuple[str, str]]) -> Markup:
    """The foot of a page: links as (text, URL)."""
    return ABOUT.format(join(link(url, text) for text, url in links))


def message(title: str, text: str, hint: str = "") -> Markup:
    """A message in place of a result.

    Args:
        title: its title.
        text: its text.
        hint: what to do about it, as text or markup.
    """
    more = hint if isinstance(hint, Markup) else PARAGRAPH.format(hint) if hint else ""
    return MESSAGE.format(title, text, more)
