"""Corrupted rows: which corruptions of pictures or texts are measured beside clean rows, and how rows get them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_fusion.bench.cells import CLEAN
from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.evaluation.image_corruptions import CORRUPTIONS, corrupt
from hf_fusion.evaluation.text_corruptions import TEXT_CORRUPTIONS, corrupt_text

if TYPE_CHECKING:
    from datasets import Dataset

SEVERITIES = (1, 2, 3, 4, 5)
MARKUP = re.compile(r"(<\|\w+\|>(?:system|user|assistant)?\n?)")  # of chats; users do not type it


def parse_corruptions(words: Sequence[str], is_image: bool) -> list[str]:
    """What is measured beside clean rows.

    Args:
        words: "all", corruptions ("jpeg_compression": at all severities) or corruptions at one ("jpeg_compression:3",
            "all:5").
        is_image: whether the suite's rows are pictures; texts otherwise.

    Returns:
        Corruption and severity each, "jpeg_compression:3".

    Raises:
        FusionError: there is no such corruption, or severity.
    """
    known = list(CORRUPTIONS if is_image else TEXT_CORRUPTIONS)
    found: dict[str, None] = {}
    for word in words:
        name, _, severity = word.partition(":")
        if name != "all" and name not in known or severity and severity not in map(str, SEVERITIES):
            raise FusionError(
                f"there is no corruption {shown(word)} of {'images' if is_image else 'texts'}",
                hint=f"severities are 1 to 5: {name}:3" if name in known else suggestion(name, ["all", *known]),
            )
        names = known if name == "all" else [name]
        found |= dict.fromkeys(f"{own}:{level}" for own in names for level in ([severity] if severity else SEVERITIES))
    return list(found)


def corrupted(rows: Dataset, corruption: str) -> Dataset:
    """Rows under a corruption; the seed of a row is its number."""
    if corruption == CLEAN:
        return rows
    name, _, level = corruption.partition(":")
    severity = int(level)
    if "image" in rows.column_names:

        def one(row: dict[str, Any], number: int) -> dict[str, Any]:
            return {"image": corrupt(row["image"], name, severity, number)}

    else:
        columns = [column for column in ("text", "text_pair", "prompt") if column in rows.column_names]

        def one(row: dict[str, Any], number: int) -> dict[str, Any]:
            return {column: _corrupted_text(row[column], name, severity, number) for column in columns}

    return rows.map(one, with_indices=True, keep_in_memory=True, load_from_cache_file=False)


def _corrupted_text(text: str, name: str, severity: int, seed: int) -> str:
    """A corrupted text, the markup of a chat as it was."""
    parts = MARKUP.split(text)  # texts, with a piece of markup between each two
    parts[::2] = [corrupt_text(part, name, severity, seed) for part in parts[::2]]
    return "".join(parts)
