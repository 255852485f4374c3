"""Dense predictions: for each pixel a class, a depth or a surface normal; the labels tell which.

Classes are whole numbers (B, H, W), `VOID` where there is none. Depths (B, 1, H, W) and normals (B, 3, H, W) are
fractions, and nothing but 0 where nothing was measured. Outputs are (B, C, h, w), and are brought to H x W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

VOID = -1


def map_outputs(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What a model makes of each pixel, fp32, (B, C, h, w); labels among the inputs are not passed on."""
    logits: torch.Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits.float()


def dense_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labelled pixels of a batch: cross entropy, absolute error, or 1 - cosine; 0 where there is none."""
    outputs = _fitted(outputs, labels)
    if not labels.is_floating_point():
        total = functional.cross_entropy(outputs, labels, ignore_index=VOID, reduction="sum")
        return total / (labels != VOID).sum().clamp(min=1)
    errors = _absolute(outputs, labels) if labels.shape[1] == 1 else 1 - _cosines(outputs, labels)
    measured = _is_measured(labels)
    return (errors * measured).sum() / measured.sum().clamp(min=1)


def dense_statistics(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """What scores are made of, row by row, so that no map need be kept.

    Returns:
        Of classes, the pixels of each that are both found and right, and those that are either, (B, C) each. Of depths
        the mean absolute error, of normals the mean angle in degrees, (B,), and 1, or 0 where nothing was measured.
    """
    outputs = _fitted(outputs, labels)
    if not labels.is_floating_point():
        classes = torch.arange(outputs.shape[1], device=labels.device)[:, None, None]
        right = labels[:, None] == classes  # (B, C, H, W)
        found = (outputs.argmax(1)[:, None] == classes) & (labels != VOID)[:, None]
        return (found & right).sum((2, 3)).tolist(), (found | right).sum((2, 3)).tolist()
    if labels.shape[1] == 1:
        errors = _absolute(outputs, labels)
    else:
        errors = _cosines(outputs, labels).clamp(-1, 1).acos().rad2deg()
    measured = _is_measured(labels)
    means = (errors * measured).sum((1, 2)) / measured.sum((1, 2)).clamp(min=1)
    return means.tolist(), measured.any((1, 2)).long().tolist()


def _fitted(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    size = labels.shape[-2:]
    if outputs.shape[-2:] == size:
        return outputs
    return functional.interpolate(outputs, size, mode="bilinear", align_corners=False)


def _is_measured(labels: torch.Tensor) -> torch.Tensor:
    return (labels != 0).any(1)  # (B, H, W)


def _absolute(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs - labels).abs()[:, 0]  # (B, H, W)


def _cosines(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cosine_similarity(outputs, labels, dim=1)  # (B, H, W)
