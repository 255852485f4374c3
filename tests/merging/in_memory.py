"""A merging method run on tensors in memory, through the same readers, parameters and chunks as on files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.schema import arguments_at, check_setting
from hf_fusion.merging.tensors import InMemory, Tensors, merge_tensors


def merged(
    method: str,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    seed: int = 0,
    name: str = "layers.0.weight",
    **parameters: Any,
) -> torch.Tensor:
    """What a method makes of one tensor, float32 in the tensor's shape.

    A parameter of which every expert has its own is one number for all of them, or a list with one for each.
    """
    row = MERGE_METHODS[method]
    known = row.parameters
    own: list[dict[str, Any]] = [{} for _ in experts]
    shared = {}
    for key, value in parameters.items():
        each = value if known[key].per_expert and isinstance(value, (list, tuple)) else None
        if each is None:
            check_setting(known[key], value, method)
            shared[key] = value
            continue
        for settings, number in zip(own, each, strict=True):
            check_setting(known[key], number, method)
            settings[key] = number
    arguments = arguments_at(known, [shared], [[settings] for settings in own], name, 0.0)
    tensors = Tensors(name, None if base is None else InMemory(base), list(map(InMemory, experts)), seed)
    with torch.inference_mode():
        pieces = [
            (start, values.clone()) for start, values in merge_tensors(tensors, row.function(tensors, **arguments))
        ]
    assert [start for start, _ in pieces] == [sum(len(v) for _, v in pieces[:i]) for i in range(len(pieces))]
    flat = torch.cat([values for _, values in pieces]) if pieces else torch.empty(0)
    assert flat.dtype == torch.float32
    return flat.view(tensors.shape)
