"""Which experts an input was merged from, layer by layer, as plain data."""

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
        experts, layers: names, as they are shown.
        values: L rows of K.
        constant: what every coefficient would be without routers: λ of task arithmetic, or 1/K for SMILE.
    """

    experts: list[str]
    layers: list[str]
    values: list[list[float]]
    constant: float

    def means(self) -> list[float]:
        """Of each expert, over the layers."""
        return [sum(column) / len(column) for column in zip(*self.values, strict=True)]

    def to_data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows = {layer: [round(w, 4) for w in row] for layer, row in zip(self.layers, self.values, strict=True)}
        means = dict(zip(self.experts, [round(w, 4) for w in self.means()], strict=True))
        return {"experts": self.experts, "constant": self.constant, "layers": rows, "means": means}


def read_trace(trace: Any, experts: Sequence[str], constant: float, rows: int) -> list[Coefficients]:
    """A model's `WEMoETrace`, row by row.

    Args:
        trace: of the last call.
        experts: names, as they are shown.
        constant: see `Coefficients`.
        rows: of that call.
    """
    names = layer_names(trace.layers)
    tables = trace.coefficients().tolist()  # (B, L, K)
    return [Coefficients(list(experts), names, tables[row], constant) for row in range(rows)]


def layer_names(paths: Sequence[str]) -> list[str]:
    """Module paths as their layers' numbers; with what tells them apart where numbers do not: "decoder 3"."""
    numbers = [_number(path) for path in paths]
    stacks = [path.partition(".")[0] for path in paths]
    for names in (numbers, [f"{stack} {number}" for stack, number in zip(stacks, numbers, strict=True)]):
        if all(numbers) and len(set(names)) == len(names):
            return names
    return list(paths)


def _number(path: str) -> str:
    found = NUMBER.search(path)
    return found.group(1) if found else ""
