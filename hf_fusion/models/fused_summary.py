"""The summary of a fused model, which prints as a table, and its repr of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .fused_html import facts_table, lines_of


class Summary(dict[str, Any]):
    """A dict that prints as a table."""

    def __repr__(self) -> str:
        return table(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return facts_table(self)


def table(values: Mapping[str, Any]) -> str:
    """One line for each value that is not empty; for a list or mapping, one line for each of its first entries."""
    shown = {name.replace("_", " "): lines for name, value in values.items() if (lines := lines_of(value))}
    width = max(map(len, shown), default=0)
    return "\n".join(
        f"{name if number == 0 else '':{width}}  {line}".rstrip()
        for name, lines in shown.items()
        for number, line in enumerate(lines)
    )


def described(model: nn.Module, inner: str, **facts: Any) -> str:
    """The repr of a fused model: its facts instead of all modules.

    Args:
        model: the fused model.
        inner: attribute that holds the modules, "backbone".
        facts: named values to show.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    first = next(model.parameters(), None)
    kind = "" if first is None else f" ({str(first.dtype).removeprefix('torch.')}, {first.device})"
    modules = f"{sum(1 for _ in model.modules()):,}, shown by print(model.{inner})"
    lines = table({**facts, "parameters": f"{sum(sizes):,}{kind}", "modules": modules}).splitlines()
    return "\n".join([f"{type(model).__name__}(", *(f"  {line}" for line in lines), ")"])


__all__ = ["Summary", "described"]
