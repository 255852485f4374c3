"""Positions of a plot's labels."""

from __future__ import annotations

from collections.abc import Sequence

FEW_LAYERS = 12  # up to which all names have room


def axis_labels(layers: Sequence[str]) -> list[str]:
    """The label under each layer: its name; for many layers, only every fifth has one."""
    step = 1 if len(layers) <= FEW_LAYERS else 5
    return [layer if index % step == 0 else "" for index, layer in enumerate(layers)]


def spread(places: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Moves ascending positions apart, at least by `gap`, each group around its mean and all of them within bounds."""
    groups: list[list[float]] = []  # of labels that touch, with their preferred positions
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], gap) - _start(groups[-2], gap) < gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    apart = [_start(group, gap) + gap * index for group in groups for index in range(len(group))]
    apart = [min(place, high - gap * (len(apart) - 1 - index)) for index, place in enumerate(apart)]
    return [max(place, low + gap * index) for index, place in enumerate(apart)]


def _start(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2
