"""The output of commands: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any, TextIO

from hf_fusion.cli.progress import Bars, Lines
from hf_fusion.cli.tables import Column, table_lines

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

    @property
    def width(self) -> int | None:
        """The width of the terminal that stdout is, in characters (``COLUMNS``, if set); None if it is no terminal."""
        if not self.stdout.isatty():
            return None
        if (given := os.environ.get("COLUMNS", "")).isdigit() and int(given):
            return int(given)
        try:
            return os.get_terminal_size(self.stdout.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

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
        else:
            head, body = table_lines(_columns(rows), self.width)
            bold = [self._colour(line, BOLD, self.stdout) for line in [*([title] if title else []), *head]]
            self._write("\n".join([*bold, *body]))

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
        plain = self.mode != "human" or not stream.isatty()
        if plain or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return text
        return f"\033[{colour}m{text}\033[0m"


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


def _columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns that are not empty."""
    filled = [name for name in rows[0] if any(row[name] not in (None, "", [], ()) for row in rows)]
    return [
        Column(name, [_plain(row[name]) for row in rows], all(isinstance(row[name], (int, float)) for row in rows))
        for name in filled
    ]
