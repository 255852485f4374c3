"""The static merging methods: one function and its decorator each, in the file that its kind is named by."""

from __future__ import annotations

from pathlib import Path

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.merging.methods.declaration import MergeMethod, methods_in

MERGE_METHODS = methods_in(Path(__file__).parent)
"""Method → what is declared of it."""


def method_named(name: str) -> MergeMethod:
    """A row of `MERGE_METHODS`.

    Raises:
        FusionError: there is none of that name.
    """
    if name not in MERGE_METHODS:
        raise FusionError(f"{shown(name)} is not a static method", suggestion(name, MERGE_METHODS))
    return MERGE_METHODS[name]


def methods_table() -> str:
    """All methods with their parameters as a table in Markdown, as the README has it."""
    rows = ["| method | | base | parameters and their defaults |", "|---|---|---|---|"]
    for name, row in MERGE_METHODS.items():
        title = f"[{row.title}]({row.url})" if row.url else row.title
        known = [f"`{p.name}`" if p.required else f"`{p.name}` {p.default}".lower() for p in row.parameters.values()]
        rows.append(f"| `{name}` | {title} | {row.base} | {', '.join(known)} |")
    return "\n".join(rows)


__all__ = ["MERGE_METHODS", "MergeMethod", "method_named", "methods_table"]
