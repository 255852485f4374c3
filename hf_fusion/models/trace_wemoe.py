"""The merging coefficients of the last inputs as data."""

from __future__ import annotations

from typing import Any

import torch

from .fused_html import heat_table


class WEMoETrace:
    """Coefficients by layer and sample; returned by `WEMoEModel.routing_trace` and `WEMoEModel.trace_forward`.

    Args:
        experts: names.
    """

    def __init__(self, experts: list[str]) -> None:
        self.experts = experts
        self._parts: dict[str, torch.Tensor] = {}

    def add(self, name: str, w: torch.Tensor, rows: int) -> None:
        """Adds the coefficients of a unit; called by the unit.

        Args:
            name: of the unit.
            w: (B, K), or (1, K) for all rows.
            rows: B.
        """
        w = w.to("cpu", torch.float32)
        self._parts[name] = w.expand(rows, -1) if len(w) == 1 else w

    @property
    def layers(self) -> list[str]:
        """Names of the units, in the order in which they ran."""
        return list(self._parts)

    def coefficients(self, layer: str | None = None) -> torch.Tensor:
        """Coefficients of one layer or of all; for SMILE, means over the tokens of a unit's last linear.

        Args:
            layer: one of `layers`; None for all.

        Returns:
            (B, K) for one layer, (B, L, K) for all.

        Raises:
            KeyError: there is no such layer.
        """
        return self._parts[layer] if layer is not None else torch.stack(list(self._parts.values()), 1)

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain lists, for JSON.

        Returns:
            "experts" (names) and "layers" (name -> (B, K), rounded to 4 decimals).
        """
        return {
            "experts": self.experts,
            "layers": {name: w.round(decimals=4).tolist() for name, w in self._parts.items()},
        }

    def _repr_html_(self) -> str:
        """Tables of the coefficients: by layer, and by input."""
        if not self._parts:
            return "<p>Nothing was routed.</p>"
        w = self.coefficients()
        many = len(w) > 1
        tables = [
            (self.layers, w.mean(0), f"Coefficients by layer{f', mean of {len(w):,} inputs' if many else ''}", "layer")
        ]
        if many:
            inputs = list(map(str, range(len(w))))
            tables.append((inputs, w.mean(1), f"Coefficients by input, mean of {w.shape[1]:,} layers", "input"))
        return "".join(
            heat_table(
                self.experts,
                list(zip(names, weights.tolist(), strict=True)),
                caption,
                first=first,
                order=w.mean((0, 1)).tolist(),
                rest=f"{first}s",
            )
            for names, weights, caption, first in tables
        )


__all__ = ["WEMoETrace"]
