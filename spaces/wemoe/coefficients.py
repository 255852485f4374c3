"""The merging coefficients of an input, layer by layer, as plain data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one input: L layers, K experts.

    Attributes:
        experts: names for display.
        layers: names for display.
        values: L rows of K.
        constant: every coefficient without routers: λ of task arithmetic, or 1/K for SMILE.
    """

    experts: list[str]
    layers: list[str]
    values: list[list[float]]
    constant: float

    def means(self) -> list[float]:
        """The mean coefficient of each expert over the layers."""
        return [sum(column) / len(column) for column in zip(*self.values, strict=True)]

    def to_data(self) -> dict[str, Any]:
        """The coefficients for JSON."""
        rows = {layer: [round(w, 4) for w in row] for layer, row in zip(self.layers, self.values, strict=True)}
        means = dict(zip(self.experts, [round(w, 4) for w in self.means()], strict=True))
        return {"experts": self.experts, "constant": self.constant, "layers": rows, "means": means}


def read_trace(trace: Any, experts: Sequence[str], constant: float, rows: int) -> list[Coefficients]:
    """The coefficients in a model's `WEMoETrace`, for each row.

    Args:
        trace: of the last call.
        experts: names for display.
        constant: see `Coefficients`.
        rows: number of rows of that call.
    """
    names = layer_names(trace.layers)
    tables = trace.coefficients().tolist()  # (B, L, K)
    return [Coefficients(list(experts), names, tables[row], constant) for row in range(rows)]


def layer_names(paths: Sequence[str]) -> list[str]:
    """Short names of module paths: their layers' numbers, with the stack ("decoder 3") if numbers are not unique."""
    numbers = [_number(path) for path in paths]
    stacks = [path.partition(".")[0] for path in paths]
    for names in (numbers, [f"{stack} {number}" for stack, number in zip(stacks, numbers, strict=True)]):
        if all(numbers) and len(set(names)) == len(names):
            return names
    return list(paths)


def _number(path: str) -> str:
    match = NUMBER.search(path)
    return match.group(1) if match else ""
