"""Reads L-LoRA adapters (arXiv 2310.04742), which are linearised at their initialisation, as plain LoRA.

A linearised module computes f(x; A₀, B₀) + J (A - A₀, B - B₀), where J is the Jacobian at the initial values. For
W x + s B A x with B₀ = 0, LoRA's initialisation, that is W x + s B A₀ x: a LoRA with the initial A. fusion_bench stores
both in ``linearized_adapter_model.safetensors``, initial values as ``params0_values.N`` (A₀ first, then B₀).
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
    """Tensors of an L-LoRA by PEFT's names, and B₀ of each module; other tensors keep their names."""
    starts: dict[str, list[tuple[int, T]]] = {}
    for key, value in tensors.items():
        if match := _START.fullmatch(key):
            starts.setdefault(match[1], []).append((int(match[2]), value))
    found, points = {}, {}
    for key, value in tensors.items():
        match = _TRAINED.fullmatch(key)
        start = sorted(starts.get(match[1], ()), key=lambda pair: pair[0]) if match else []
        if match and len(start) == 2:
            (_, a), (_, b) = start
            found[f"{match[1]}.lora_{match[2]}.weight"] = a if match[2] == "A" else value
            points[match[1]] = b
        elif not _START.fullmatch(key):
            found[key] = value
    return found, points


def as_lora(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Converts the tensors of an L-LoRA to those of the equivalent LoRA; those of a LoRA are unchanged.

    Args:
        tensors: of the file, by name.
        name: the adapter's name, for errors.

    Raises:
        FusionError: B₀ is not 0.
    """
    found, points = plain_names(tensors)
    if moved := next((path for path, b in points.items() if b.count_nonzero()), None):
        raise FusionError(
            f"adapter {name} was linearised at a B other than 0 ({moved}), so it is not equivalent to a LoRA"
        )
    return found
