"""The output of commands: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

from hf_fusion.cli.progress import Bars, Lines

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("human", "json", "quiet")
GREY, RED, YELLOW, GREEN, BOLD = "90", "31", "33", "32", "1"


# not escaped by json.dumps: C1 controls, bidirectional and invisible characters, surrogates
_INVISIBLE = re.compile("[\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")


class Out:
    """The output of one command.

    Args:
        mode: "human" for text; "json" for one JSON document per call; "quiet" for bare ids, one per line.
        stdout: stream; default is that of the process.
        stderr: stream; default is that of the process.
    """

    def __init__(self, mode: str = "human", stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.mode = mode
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self._bars: Bars | None = None

    @property
    def is_interactive(self) -> bool:
        """Whether stderr is a terminal that shows progress bars."""
        return self.mode == "human" and self.stderr.isatty()

    # ---------------------------------------------------------------- data: stdout

    def table(
        self,
        rows: Sequence[dict[str, Any]],
        title: str = "",
        key: str | None = None,
        data: object = None,
        human_only: bool = False,
    ) -> None:
        """Print rows as a table.

        Args:
            rows: with the same keys, which are the columns; columns that are empty in every row are left out.
            title: printed above the table.
            key: the column printed in quiet mode; default is the first.
            data: printed in json mode instead of the rows.
            human_only: print nothing in json and quiet mode.
        """
        if human_only and self.mode != "human":
            return
        if self.mode == "json":
            self._json(list(rows) if data is None else data)
        elif self.mode == "quiet":
            for row in rows:
                self._write(_exact(row[key or next(iter(row))]))
        elif not rows:
            self._write(f"{title}: none" if title else "none")
        elif self.stdout.isatty():
            self._rich().print(_rich_table(rows, title))
        else:
            self._write("\n".join([*([title] if title else []), *_padded(rows)]))

    def text(self, text: str) -> None:
        """Print text in human mode only."""
        if self.mode == "human":
            self._write("\n".join(map(_plain, text.splitlines())))

    def script(self, text: str) -> None:
        """Print a text of this package's own as it is, in every mode."""
        self._write(text)

    def dict(self, data: Mapping[str, Any], key: str | None = None) -> None:
        """Print named values; in quiet mode only that of `key`, by default the first.

        Human mode rounds numbers and leaves out empty values; json mode prints all of them.
        """
        if self.mode == "json":
            self._json(data)
        elif self.mode == "quiet":
            self._write(_exact(data[key or next(iter(data))]))
        else:
            shown = {name: text for name, value in data.items() if (text := _plain(value))}
            width = max(map(len, shown), default=0)
            if shown:
                self._write("\n".join(f"  {name:{width}}  {text}" for name, text in shown.items()))

    def result(self, message: str, **data: object) -> None:
        """Print the success of a command and its values; in quiet mode only the first value."""
        if self.mode == "human":
            self._write(f"{self._colour('✓', GREEN, self.stdout)} {_plain(message)}")
        if data:
            self.dict(data)

    # ---------------------------------------------------------------- messages: stderr

    @contextmanager
    def step(self, number: int, total: int, title: str) -> Iterator[None]:
        """Print a step's title before, and its duration after the context."""
        began = perf_counter()
        self.log(f"\n[{number}/{total}] {title}", BOLD)
        yield
        self.log(f"      {perf_counter() - began:.1f} s")

    def log(self, message: str, colour: str = GREY) -> None:
        """Print a progress message; nothing in quiet mode."""
        if self.mode != "quiet":
            self._say(message, colour)

    def hint(self, command: str) -> None:
        """Print the next command; nothing in quiet mode."""
        self.log(f"→ {command}")

    def warning(self, message: str) -> None:
        """Print a warning, in every mode."""
        self._say(f"Warning: {message}", YELLOW)

    def error(self, message: str, hint: str | None = None) -> None:
        """Print the error that stopped the command, and a hint."""
        self._say(f"Error: {message}", RED)
        if hint:
            self._say(f"  → {hint}", GREY)

    def reporter(self) -> Bars | Lines | None:
        """The reporter of long phases: bars on a terminal, else lines; None in quiet mode."""
        if self.mode == "quiet":
            return None
        if not self.is_interactive:
            return Lines(self.log)
        self._bars = Bars(self.stderr, self.log)
        return self._bars

    # ---------------------------------------------------------------- writing

    def _json(self, value: object) -> None:
        self._write(_INVISIBLE.sub(_escaped, json.dumps(value, default=str, ensure_ascii=False)))

    def _write(self, text: str) -> None:
        self._send(text, self.stdout)

    def _say(self, message: str, colour: str) -> None:
        text = "\n".join(map(_plain, message.splitlines()))
        self._send(self._colour(text, colour, self.stderr), self.stderr)

    def _send(self, text: str, stream: TextIO) -> None:
        encoding = stream.encoding or "utf-8"  # a pipe on Windows may not encode "✓"
        with self._bars.paused() if self._bars else nullcontext():
            stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            stream.flush()

    def _colour(self, text: str, colour: str, stream: TextIO) -> str:
        return f"\033[{colour}m{text}\033[0m" if self.mode == "human" and stream.isatty() else text

    def _rich(self) -> Console:
        from rich.console import Console

        return Console(file=self.stdout, highlight=False)


def _escaped(match: re.Match[str]) -> str:
    """A character as a JSON escape."""
    return f"\\u{ord(match[0]):04x}"


def _exact(value: object) -> str:
    """A value at full precision, on one line without control characters."""
    return _plain(value if not isinstance(value, float) else str(value))


def _plain(value: object) -> str:
    """A value on one line without control characters, so that text from the Hub cannot control the terminal.

    Floats are rounded to four significant digits, from 1,000 on to one decimal; None is "".
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(round(value, 1) if abs(value) >= 1000 else float(f"{value:.4g}"))
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(name)} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(_plain, value))
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The columns that are not empty → whether all of their values are numbers."""
    filled = [name for name in rows[0] if any(row[name] not in (None, "", [], ()) for row in rows)]
    return {name: all(isinstance(row[name], (int, float)) for row in rows) for name in filled}


def _padded(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of plain text with aligned columns."""
    columns = _columns(rows)
    cells = [list(columns), *([_plain(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, columns.values(), strict=True)
        ).rstrip()
        for line in cells
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _rich_table(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """A table in colour, fitted to the width of the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, is_number in _columns(rows).items():
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(row[name])) for name in _columns(rows)))
    return table
