"""A fingerprint of a model's weights in its config, which detects weight files of another fusion of the same base.

Names and shapes cannot: they are equal in all fusions of one base. A digest of all bytes could, but would take
as long as loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

ELEMENTS = 16


@torch.no_grad()
def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> list[float | None]:
    """The mean magnitude of some elements spread over each tensor, in the order of the tensors' names.

    Args:
        tensors: a state dict.

    Returns:
        One number per tensor; None for a tensor without readable values (offloaded, quantized or empty).
    """
    found: list[float | None] = []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta or not tensor.numel() or tensor.dtype in (torch.int8, torch.uint8):
            found.append(None)
            continue
        flat = tensor.reshape(-1)
        indices = torch.linspace(0, len(flat) - 1, min(ELEMENTS, len(flat)), dtype=torch.float64).long()
        found.append(float(f"{float(flat[indices.to(flat.device)].double().abs().mean()):.6g}"))
    return found


def first_mismatch(
    tensors: Mapping[str, torch.Tensor], kept: Sequence[float | None], tolerance: float = 0.02
) -> str | None:
    """The first tensor whose fingerprint differs; None if all comparable ones agree.

    Args:
        tensors: a state dict, in any float dtype: rounding stays within the tolerance.
        kept: what `fingerprint_of` returned before saving.
        tolerance: allowed relative difference.
    """
    found = fingerprint_of(tensors)
    if len(found) != len(kept):
        return f"one of {len(found)} tensors, where {len(kept)} were saved"
    for name, one, other in zip(sorted(tensors), found, kept, strict=True):
        if one is not None and other is not None and abs(one - other) > tolerance * max(one, other) + 1e-6:
            return name
    return None


__all__ = ["first_mismatch", "fingerprint_of"]
