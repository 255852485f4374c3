"""The experts that were queried for the last inputs, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fused_html import MOST_ROWS, first_of, lines_of, table


class FoETrace(dict[str, Any]):
    """The routing of a Fusion of Experts' last forward, a dict; returned by `FoEModel.routing_trace`.

    Args:
        values: the entries; see `FoEModel.routing_trace`.
        labels: index of an output -> its name, for tables.
    """

    def __init__(self, values: Mapping[str, Any], labels: Mapping[Any, str] | None = None) -> None:
        super().__init__(values)
        self.labels = dict(labels or {})

    def _repr_html_(self) -> str:
        """A table of the inputs: the prediction, the experts in the order in which they were queried, their cost."""
        rows = []
        for index, places in enumerate(self["order"][:MOST_ROWS].tolist()):
            queried = sorted((place, expert) for expert, place in enumerate(places) if place > 0)
            names = ", ".join(lines_of([self["experts"][expert] for _, expert in queried]))
            cost = sum(self["cost_shares"][expert] for _, expert in queried)
            rows.append([index, *self._prediction(index), names, f"{cost:.0%}"])
        columns = ["input", *(["prediction"] if self._predicts else []), "experts, in the order queried", "cost"]
        return table(columns, first_of(rows, "inputs", len(self["order"])), "Experts queried for each input")

    @property
    def _predicts(self) -> bool:
        """Whether the model itself predicts; a model that generates only chooses who does."""
        return self["answers"].dim() > 1

    def _prediction(self, index: int) -> list[str]:
        if not self._predicts:
            return []
        outputs = self["answers"][index]
        if len(outputs) == 1:
            return [f"{float(outputs):.4g}"]
        best = int(outputs.argmax())
        return [str(self.labels.get(best, best))]


__all__ = ["FoETrace"]
