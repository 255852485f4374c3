"""Many inputs at once: from lines, a CSV file or pictures, and back to a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import Answer, Example
from shared.errors import InputError
from shared.uploads import read_picture

MOST_BYTES = 5_000_000  # of a CSV file
SHOWN = 80  # characters of a text in the table


def read_lines(text: str | None) -> list[Example]:
    """One example per line; a tab separates a second text. Empty lines are skipped."""
    rows = [line.partition("\t") for line in (text or "").splitlines() if line.strip()]
    return [Example(first.strip(), second.strip()) for first, _, second in rows]


def read_csv(path: str | Path) -> list[Example]:
    """Texts from the columns ``text`` and, if there is one, ``text_pair``.

    Raises:
        InputError: the file is too large, is not CSV in UTF-8, or has no column ``text``.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"That file is too large: at most {MOST_BYTES // 1_000_000} MB are allowed.")
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        columns = list(reader.fieldnames or [])
        if "text" not in columns:
            raise InputError(f"That file has the columns {', '.join(columns) or 'none'}; it needs one named text.")
        rows = [(row["text"] or "", row.get("text_pair") or "") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"That file is not CSV in UTF-8: {error}.") from error
    return [Example(text.strip(), pair.strip()) for text, pair in rows if text.strip()]


def read_pictures(paths: Sequence[str] | None) -> list[Example]:
    """Pictures from files.

    Raises:
        InputError: a file is not a picture; the message names it.
    """
    return [Example(image=read_picture(path), name=Path(path).name) for path in paths or ()]


def shown(example: Example) -> str:
    """The name of an input in the table: the beginning of its text, or its file name."""
    text = " · ".join(part for part in (example.name or example.text, example.pair) if part)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def to_csv(examples: Sequence[Example], answers: Sequence[Answer], task: str) -> str:
    """The table for download: inputs, answers, and each expert's mean coefficient to 4 decimals."""
    has_pair = any(example.pair for example in examples)
    first = answers[0].coefficients
    experts = first.experts if first else []
    head = ["input", *(["text_pair"] if has_pair else []), "task", "answer", "probability", *experts]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for example, answer in zip(examples, answers, strict=True):
        means: list[Any] = [f"{w:.4f}" for w in answer.coefficients.means()] if answer.coefficients else []
        sure = "" if answer.confidence is None else f"{answer.confidence:.4f}"
        pair = [example.pair] if has_pair else []
        writer.writerow([example.name or example.text, *pair, task, answer.text, sure, *means])
    return out.getvalue()
