"""The summary of a fused model, which prints as a table, and its repr of a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

MOST = 10  # entries of a list that are shown


class Summary(dict[str, Any]):
    """A dict that prints as a table."""

    def __repr__(self) -> str:
        return table(self)

    __str__ = __repr__


def table(values: Mapping[str, Any]) -> str:
    """One line for each value that is not empty; for a list or mapping, one line for each of its first entries."""
    shown = {name.replace("_", " "): lines for name, value in values.items() if (lines := _lines(value))}
    width = max(map(len, shown), default=0)
    return "\n".join(
        f"{name if number == 0 else '':{width}}  {line}".rstrip()
        for name, lines in shown.items()
        for number, line in enumerate(lines)
    )


def _lines(value: Any) -> list[str]:
    if value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value):
        return []
    if isinstance(value, Mapping):
        width = max(len(str(name)) for name in value)
        lines = [f"{name!s:{width}}  {_lines(entry)[0] if _lines(entry) else ''}" for name, entry in value.items()]
    elif isinstance(value, (list, tuple)):
        lines = [str(entry) for entry in value]
    elif isinstance(value, bool):
        lines = ["yes" if value else "no"]
    elif isinstance(value, (int, float)):
        lines = [f"{value:,}" if isinstance(value, int) else f"{value:.4g}"]
    else:
        lines = [str(value)]
    return lines if len(lines) <= MOST else [*lines[: MOST - 1], f"… and {len(lines) - MOST + 1} more"]


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
