"""A few numbers of every tensor, kept in the config: they tell this model's files from those of another one like it.

Names and shapes do not: a shard of another fusion of the same base has the same. A digest of all bytes would, and takes
as long as loading does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

PLACES = 16


@torch.no_grad()
def samples_of(tensors: Mapping[str, torch.Tensor]) -> list[float | None]:
    """The mean magnitude of some elements spread over each tensor, in the order of the tensors' names.

    Args:
        tensors: a state dict.

    Returns:
        One number for each; None where there are no values to be had (offloaded, quantized or empty).
    """
    found: list[float | None] = []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta or not tensor.numel() or tensor.dtype in (torch.int8, torch.uint8):
            found.append(None)
            continue
        flat = tensor.reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(PLACES, len(flat)), dtype=torch.float64).long()
        found.append(float(f"{float(flat[places.to(flat.device)].double().abs().mean()):.6g}"))
    return found


def first_unlike(
    tensors: Mapping[str, torch.Tensor], kept: Sequence[float | None], tolerance: float = 0.02
) -> str | None:
    """The first tensor whose sample is not the one that was kept; None where all are, as far as they can be compared.

    Args:
        tensors: a state dict, in any float dtype: rounding stays within the tolerance.
        kept: what `samples_of` gave when it was saved.
        tolerance: by how much a sample may differ, as a share.
    """
    own = samples_of(tensors)
    if len(own) != len(kept):
        return f"one of {len(own)} tensors, where {len(kept)} were saved"
    for name, one, other in zip(sorted(tensors), own, kept, strict=True):
        if one is not None and other is not None and abs(one - other) > tolerance * max(one, other) + 1e-6:
            return name
    return None


__all__ = ["first_unlike", "samples_of"]
