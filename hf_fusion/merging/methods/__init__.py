"""The static merging methods: each is one function with the decorator `merge_method`, in a module of this folder."""

from __future__ import annotations

from pathlib import Path

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.merging.methods.declaration import MergeMethod, methods_in

MERGE_METHODS = methods_in(Path(__file__).parent)
"""Name of a method → its declaration."""
METHODS_LISTING = "hf-fusion methods"
"""The command that lists all methods, and with a method's name its parameters; for hints."""


def method_named(name: str) -> MergeMethod:
    """The declaration of a method.

    Raises:
        FusionError: there is no such method.
    """
    if name not in MERGE_METHODS:
        raise FusionError(f"{shown(name)} is not a static method", suggestion(name, MERGE_METHODS, METHODS_LISTING))
    return MERGE_METHODS[name]


def methods_table() -> str:
    """The README's Markdown table of all methods with their parameters."""
    rows = ["| method | | base | parameters and their defaults |", "|---|---|---|---|"]
    for name, row in MERGE_METHODS.items():
        title = f"[{row.title}]({row.url})" if row.url else row.title
        known = [f"`{p.name}`" if p.required else f"`{p.name}` {p.default}".lower() for p in row.parameters.values()]
        rows.append(f"| `{name}` | {title} | {row.base} | {', '.join(known)} |")
    return "\n".join(rows)


__all__ = ["MERGE_METHODS", "METHODS_LISTING", "MergeMethod", "method_named", "methods_table"]
