"""LoRA adapters as experts: what they must not train."""

from __future__ import annotations

from typing import Any


def refuse_tied(expert: Any) -> None:
    """An adapter that trains one of two tensors that its base ties is trained for both of them apart.

    Raises:
        ValueError: naming the adapter, both tensors and the way on.
    """
    pairs = getattr(expert.model, "all_tied_weights_keys", None) or {}
    trained = {*expert.adapter.saved, *(f"{path}.weight" for path in expert.adapter.lora)}
    for one, other in pairs.items():
        if found := trained & {one, other}:
            name = min(found)
            raise ValueError(
                f"{expert.name} trains {name}, which its base ties to {other if name == one else one}: untie the base"
                " (hf-fusion fuse --method linear --experts BASE --set untie=true --output DIR), and give DIR as base"
            )


__all__ = ["refuse_tied"]
