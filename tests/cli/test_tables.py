"""Tables fit a terminal of any width, and lose nothing."""

from __future__ import annotations

import io

import pytest

from hf_fusion.cli.methods import all_methods
from hf_fusion.cli.output import Out
from hf_fusion.cli.tables import Column, table_lines, text_width, wrap

ID = "an-organisation/a-model-with-quite-a-long-name@0123456789abcdef0123456789abcdef01234567"
TABLES = {
    "ids": [
        {"id": ID, "task": "text-classification", "labels": ("negative", "positive"), "MB": 438.0, "rejected": ""},
        {"id": "me/low", "task": None, "labels": (), "MB": 0.5, "rejected": "has only pickle weights, which can run"},
    ],
    "wide": [{"id": "人工智能/模型" * 5, "title": "é" * 3 + " naïve 😀 text", "n": 12}],
    "one": [{"id": ID}],
    "numbers": [{f"a column with number {i}": i * 1000.5 for i in range(6)}],
    "methods": [
        {"method": entry.name, "computes": entry.summary, "needs": ", ".join(entry.needs), "paper": entry.paper}
        for entry in all_methods()
    ],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(rows, width, monkeypatch, stream=Terminal):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    out = Out("human", stream(), stream())
    out.table(rows, title="Table")
    return out.stdout.getvalue()


def letters(text: str) -> list[str]:
    return sorted(each for each in text if each.isalnum())


@pytest.mark.parametrize("width", [20, 50, 80, 120, 400])
@pytest.mark.parametrize("name", TABLES)
def test_no_line_is_wider_than_the_terminal_and_no_letter_is_lost(name, width, monkeypatch):
    text = printed(TABLES[name], width, monkeypatch)
    assert max(map(text_width, text.splitlines())) <= width
    whole = printed(TABLES[name], width, monkeypatch, io.StringIO)
    cells = whole.partition("---")[2]
    assert not set(letters(cells)) - set(letters(text))
    assert len(letters(text)) >= len(letters(cells))


def test_what_is_piped_is_not_fitted(monkeypatch):
    text = printed(TABLES["ids"], 50, monkeypatch, io.StringIO)
    assert ID in text
    assert len(text.splitlines()) == 5


def columns(second: str) -> list[Column]:
    texts = [Column("id", ["me/low", "me/high"]), Column("why", ["it is a long reason", second])]
    return [*texts, Column("n", ["1", "20"], True)]


def test_a_narrow_terminal_wraps_cells_between_words():
    columns = [
        Column("id", ["me/low", "me/high"]),
        Column("why", ["it is a long reason", "none"]),
        Column("n", ["1", "20"], True),
    ]
    assert table_lines(columns, 27) == (
        ["id       why              n", "-------  --------------  --"],
        ["me/low   it is a long     1", "         reason", "me/high  none            20"],
    )


def test_a_terminal_that_is_too_narrow_shows_blocks():
    columns = [
        Column("id", ["me/low", "me/high"]),
        Column("why", ["it is a long reason", ""]),
        Column("n", ["1", "20"], True),
    ]
    assert table_lines(columns, 20) == (
        [],
        ["id   me/low", "why  it is a long", "     reason", "n    1", "", "id   me/high", "n    20"],
    )


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 5, [""]),
        ("one two", 7, ["one two"]),
        ("one two", 6, ["one", "two"]),
        ("owner/name@0123", 8, ["owner/", "name@", "0123"]),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
        ("模型模型", 5, ["模型", "模型"]),
    ],
)
def test_wrapping(text, width, lines):
    assert wrap(text, width) == lines


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_turned_off(name, value, monkeypatch):
    out = Out("human", Terminal(), Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out.table(TABLES["one"], title="Table")
    assert out.stdout.getvalue().startswith("\x1b[1mTable\x1b[0m\n")
    monkeypatch.setenv(name, value)
    out = Out("human", Terminal(), Terminal())
    out.table(TABLES["one"], title="Table")
    out.error("it is gone", "look elsewhere")
    assert "\x1b" not in out.stdout.getvalue() + out.stderr.getvalue()
