"""L-LoRA (arXiv 2310.04742): adapters whose modules are linearised where they started, read as plain LoRA.

Such a module computes f(x; A₀, B₀) + J (A - A₀, B - B₀), J being the derivative at the start. Of W x + s B A x, and
with B₀ = 0 as LoRA starts, that is W x + s B A₀ x: a LoRA with the A that it started from. fusion_bench stores both in
``linearized_adapter_model.safetensors``, the start as ``params0_values.N`` (A₀ first, then B₀).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

STEM = "linearized_adapter_model"
_TRAINED = re.compile(r"(.+)\.model\.lora_([AB])\.\w+\.weight")
_START = re.compile(r"(.+)\.params0_values\.(\d+)")


def plain_names(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Tensors of L-LoRA under PEFT's names, and B₀ of each module; what has other names stays, and has no B₀."""
    starts: dict[str, list[tuple[int, T]]] = {}
    for key, own in tensors.items():
        if match := _START.fullmatch(key):
            starts.setdefault(match[1], []).append((int(match[2]), own))
    found, points = {}, {}
    for key, own in tensors.items():
        match = _TRAINED.fullmatch(key)
        start = sorted(starts.get(match[1], ()), key=lambda pair: pair[0]) if match else []
        if match and len(start) == 2:
            (_, a), (_, b) = start
            found[f"{match[1]}.lora_{match[2]}.weight"] = a if match[2] == "A" else own
            points[match[1]] = b
        elif not _START.fullmatch(key):
            found[key] = own
    return found, points


def as_lora(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of an L-LoRA as those of the LoRA that computes the same; those of a LoRA as they are.

    Args:
        tensors: of the file, by name.
        name: what errors call the adapter.

    Raises:
        FusionError: it was linearised where B is not 0.
    """
    found, points = plain_names(tensors)
    if moved := next((path for path, b in points.items() if b.count_nonzero()), None):
        raise FusionError(f"Adapter {name} was linearised at a B that is not 0, in {moved}: that is no LoRA.")
    return found
