"""Dense prediction: a class, a depth or a surface normal per pixel; the shape and dtype of the labels select which.

Classes are integers (B, H, W), `VOID` for unlabelled pixels. Depths (B, 1, H, W) and normals (B, 3, H, W) are floats,
all 0 at pixels without a measurement. Outputs are (B, C, h, w) and are resized to H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

VOID = -1


def map_outputs(model: Callable[..., Any], inputs: Mapping[str, Any]) -> torch.Tensor:
    """A model's prediction per pixel, fp32, (B, C, h, w); ``labels`` are not passed to the model."""
    logits: torch.Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits.float()


def dense_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labelled pixels of a batch: cross entropy, absolute error, or 1 - cosine; 0 without such pixels."""
    outputs = _resized(outputs, labels)
    if not labels.is_floating_point():
        total = functional.cross_entropy(outputs, labels, ignore_index=VOID, reduction="sum")
        return total / (labels != VOID).sum().clamp(min=1)
    errors = _absolute_errors(outputs, labels) if labels.shape[1] == 1 else 1 - _cosine_similarities(outputs, labels)
    measured = _measured_pixels(labels)
    return (errors * measured).sum() / measured.sum().clamp(min=1)


def dense_statistics(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Sufficient statistics of the metrics per row, so that predicted maps need not be kept.

    Returns:
        For classes, the pixel counts of intersection and union of predicted and true class, (B, C) each. For depths
        the mean absolute error, for normals the mean angle in degrees, (B,); and 1, or 0 for rows without a
        measurement, (B,).
    """
    outputs = _resized(outputs, labels)
    if not labels.is_floating_point():
        classes = torch.arange(outputs.shape[1], device=labels.device)[:, None, None]
        true = labels[:, None] == classes  # (B, C, H, W)
        predicted = (outputs.argmax(1)[:, None] == classes) & (labels != VOID)[:, None]
        return (predicted & true).sum((2, 3)).tolist(), (predicted | true).sum((2, 3)).tolist()
    if labels.shape[1] == 1:
        errors = _absolute_errors(outputs, labels)
    else:
        errors = _cosine_similarities(outputs, labels).clamp(-1, 1).acos().rad2deg()
    measured = _measured_pixels(labels)
    means = (errors * measured).sum((1, 2)) / measured.sum((1, 2)).clamp(min=1)
    return means.tolist(), measured.any((1, 2)).long().tolist()


def _resized(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    size = labels.shape[-2:]
    if outputs.shape[-2:] == size:
        return outputs
    return functional.interpolate(outputs, size, mode="bilinear", align_corners=False)


def _measured_pixels(labels: torch.Tensor) -> torch.Tensor:
    return (labels != 0).any(1)  # (B, H, W)


def _absolute_errors(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs - labels).abs()[:, 0]  # (B, H, W)


def _cosine_similarities(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cosine_similarity(outputs, labels, dim=1)  # (B, H, W)
