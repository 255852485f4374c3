"""Reads the tables that notebooks show."""

from __future__ import annotations

import re
from html.parser import HTMLParser

STYLE = re.compile(r"(vertical-align:top;)?(background-color:rgba\(66,133,244,0\.[0-5]\d\);)?text-align:(left|right)")


class Tables(HTMLParser):
    """Reads tables: for each its caption and the text of its cells by row; refuses what tables do not have."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in {"table", "caption", "thead", "tbody", "tr", "th", "td", "br", "p", "pre"}, tag
        for name, value in attrs:
            assert name in ("style", "scope", "colspan"), name
            assert name != "style" or STYLE.fullmatch(value), value
        if tag == "br":
            self.tables[-1][-1][-1] += "\n"
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif self.open[-1] == "caption":
            self.captions[-1] += data
