"""Tables of results: one structure, and what writes it as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hf_fusion.hub.readme import escape_markdown

NONE = "–"


@dataclass(frozen=True)
class TableEntry:
    """One cell of a table.

    Attributes:
        text: as shown.
        value: as in CSV: unrounded, shares from 0 to 1; None if there is none.
        ci95: the interval of the value.
        best: whether it is the best of its column.
        note: why there is no value, or what is wrong with it: a footnote.
    """

    text: str = NONE
    value: float | str | None = None
    ci95: tuple[float, float] | None = None
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Rows that belong together, with a heading; the first entry of each row names it."""

    title: str
    rows: tuple[tuple[TableEntry, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its files.
        title: above it.
        columns: their headings; the first column is text, the others numbers.
        sections: its rows, each as long as `columns`.
        caption: what its numbers mean.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    caption: str = ""

    @property
    def notes(self) -> list[str]:
        """The footnotes, numbered from 1 in the order in which they are met; what is said twice is one."""
        return list(dict.fromkeys(entry.note for entry in self._entries() if entry.note))

    def _entries(self) -> Iterator[TableEntry]:
        for section in self.sections:
            for row in section.rows:
                yield from row


def file_name(name: str) -> str:
    """A name as that of a file: strangers name suites too."""
    return re.sub(r"[^\w.,+-]", "-", name)


def mark_best(rows: Sequence[tuple[TableEntry, ...]], column: int, lower: bool = False) -> list[tuple[TableEntry, ...]]:
    """Rows with the best entry of a column marked, and all that read the same."""
    numbers = [float(row[column].value) for row in rows if isinstance(row[column].value, (int, float))]  # type: ignore[arg-type]
    if not numbers:
        return list(rows)
    most = min(numbers) if lower else max(numbers)
    texts = {_first_word(row[column]) for row in rows if row[column].value == most}

    def marked(row: tuple[TableEntry, ...]) -> tuple[TableEntry, ...]:
        if row[column].value is None or _first_word(row[column]) not in texts:
            return row
        return (*row[:column], replace(row[column], best=True), *row[column + 1 :])

    return [marked(row) for row in rows]


def _first_word(entry: TableEntry) -> str:
    """The number that is read, without its interval."""
    return entry.text.partition(" ")[0]


def to_markdown(table: Table) -> str:
    """A table as GitHub's Markdown: headings of sections are rows, the best is bold, notes are below."""
    notes = {note: number for number, note in enumerate(table.notes, 1)}

    def shown(entry: TableEntry) -> str:
        text = escape_markdown(entry.text)
        text = f"**{text}**" if entry.best else text
        return f"{text}<sup>{notes[entry.note]}</sup>" if entry.note else text

    def line(words: Sequence[str]) -> str:
        return f"| {' | '.join(words)} |"

    lines = [line([escape_markdown(name) for name in table.columns]), "|---" + "|---:" * (len(table.columns) - 1) + "|"]
    for section in table.sections:
        if section.title:
            lines.append(line([f"*{escape_markdown(section.title)}*", *[""] * (len(table.columns) - 1)]))
        lines += [line([shown(entry) for entry in row]) for row in section.rows]
    parts = ["\n".join(lines)]
    if table.caption:
        parts.append(escape_markdown(table.caption))
    if notes:
        parts.append("  \n".join(f"<sup>{number}</sup> {escape_markdown(note)}" for note, number in notes.items()))
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """A table as CSV: values unrounded, the ends of intervals in two further columns, notes in the last column."""
    rows = [(section.title, row) for section in table.sections for row in section.rows]
    ranged = {index for _, row in rows for index, entry in enumerate(row) if entry.ci95}
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    head = [[name, f"{name} low", f"{name} high"] if k in ranged else [name] for k, name in enumerate(table.columns)]
    writer.writerow(["section", *(name for names in head for name in names), "notes"])
    for title, row in rows:
        line: list[float | str | None] = [title]
        for index, entry in enumerate(row):
            line.append(entry.text if index == 0 and entry.value is None else entry.value)
            if index in ranged:
                line += entry.ci95 or (None, None)
        said = [f"{name}: {entry.note}" for name, entry in zip(table.columns, row, strict=True) if entry.note]
        writer.writerow([*map(_harmless, line), "; ".join(said)])
    return written.getvalue()


def _harmless(value: float | str | None) -> float | str | None:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def to_latex(table: Table) -> str:
    r"""A table as LaTeX: a float for ``\input``, with booktabs alone (``\usepackage{booktabs}``)."""
    notes = {note: number for number, note in enumerate(table.notes, 1)}
    count = len(table.columns)

    def shown(entry: TableEntry) -> str:
        text = escape_latex(entry.text)
        text = rf"\textbf{{{text}}}" if entry.best else text
        return rf"{text}\textsuperscript{{{notes[entry.note]}}}" if entry.note else text

    lines = [
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape_latex(' '.join(filter(None, (table.title + '.', table.caption))))}}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9-]', '-', table.name)}}}",
        rf"\begin{{tabular}}{{l{'r' * (count - 1)}}}",
        r"\toprule",
        f"{' & '.join(map(escape_latex, table.columns))} \\\\",
    ]
    for section in table.sections:
        lines.append(r"\midrule")
        if section.title:
            lines.append(rf"\multicolumn{{{count}}}{{l}}{{\textit{{{escape_latex(section.title)}}}}} \\")
        lines += [f"{' & '.join(map(shown, row))} \\\\" for row in section.rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    for note, number in notes.items():
        lines.append(rf"\par\footnotesize\textsuperscript{{{number}}} {escape_latex(note)}")
    return "\n".join([*lines, r"\end{table}", ""])


RENDERERS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}

_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # behind the end of a line it would be an argument, and a star an option
    "*": "{*}",
    "–": "--",
    "—": "---",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "λ": r"$\lambda$",
    "θ": r"$\theta$",
    "τ": r"$\tau$",
    "…": r"\ldots{}",
    "\u200b": "{}",
    "’": "'",
    "“": "``",
    "”": "''",
}


def escape_latex(text: str) -> str:
    """Text that LaTeX shows as itself, in any input encoding; of characters that it may not have, the plain letter."""
    text = re.sub("-(?=-)", "-\u200b", " ".join(text.split()))  # two hyphens are no dash
    return "".join(_LATEX.get(c) or (c if c.isascii() else _plain(c)) for c in text)


def _plain(character: str) -> str:
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(_LATEX.get(c, c) for c in letters) or f"U+{ord(character):04X}"
