"""Losses and statistics of dense predictions, compared with scikit-learn and numpy on labelled pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, log_loss

from hf_fusion.bench.suite import same_scale
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.task_metrics import score
from hf_fusion.training.dense import VOID, dense_loss, dense_statistics

ROWS, CLASSES, HEIGHT, WIDTH = 5, 4, 6, 7


def made(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, labels and which pixels have one: (B, C, H, W), the labels' shape, (B, H, W)."""
    generator = torch.Generator().manual_seed(channels)
    outputs = torch.randn(ROWS, channels, HEIGHT, WIDTH, generator=generator)
    known = torch.rand(ROWS, HEIGHT, WIDTH, generator=generator) < 0.7
    if channels == CLASSES:  # the last one never occurs
        labels = torch.randint(CLASSES - 1, (ROWS, HEIGHT, WIDTH), generator=generator)
        outputs[:, -1] = -9
        return outputs, labels.masked_fill(~known, VOID), known
    labels = torch.rand(ROWS, channels, HEIGHT, WIDTH, generator=generator) + 0.1
    return outputs, labels * known[:, None], known


def as_plainly(outputs: torch.Tensor, labels: torch.Tensor, known: torch.Tensor) -> tuple[float, float]:
    """The loss and the score, from lists of the labelled pixels."""
    flat, mask = outputs.movedim(1, -1).numpy(), known.numpy()
    if labels.dim() == 3:
        given, right = torch.tensor(flat[mask]).double().softmax(-1).numpy(), labels.numpy()[mask]
        ious = jaccard_score(right, given.argmax(-1), labels=range(CLASSES - 1), average="macro")
        return log_loss(right, given, labels=range(CLASSES)), ious
    targets = labels.movedim(1, -1).numpy()
    if labels.shape[1] == 1:
        errors = np.abs(flat - targets)[..., 0]
        losses = errors
    else:
        cosines = (flat * targets).sum(-1) / np.linalg.norm(flat, axis=-1) / np.linalg.norm(targets, axis=-1).clip(1e-9)
        errors, losses = np.degrees(np.arccos(cosines)), 1 - cosines
    return losses[mask].mean(), np.mean([own[seen].mean() for own, seen in zip(errors, mask, strict=True)])


METRICS = {CLASSES: "mean_iou", 1: "absolute_error", 3: "angle"}


@pytest.mark.parametrize(("channels", "metric"), METRICS.items(), ids=METRICS.values())
def test_pixels_without_a_label_do_not_count(channels, metric):
    outputs, labels, known = made(channels)
    loss, value = as_plainly(outputs, labels, known)
    assert float(dense_loss(outputs, labels)) == pytest.approx(loss, rel=1e-5)
    found = score(Predictions(*dense_statistics(outputs, labels)), metric)
    assert (found.score, found.n) == (pytest.approx(value, rel=1e-5), ROWS)
    assert found.ci95[0] < found.score < found.ci95[1]
    outputs += (~known)[:, None] * 5.0 * torch.arange(1, channels + 1)[:, None, None]
    assert float(dense_loss(outputs, labels)) == pytest.approx(loss, rel=1e-5)
    assert score(Predictions(*dense_statistics(outputs, labels)), metric) == found


@pytest.mark.parametrize("channels", METRICS)
def test_rows_without_any_label_do_not_count(channels):
    outputs, labels, _ = made(channels)
    nothing = torch.full_like(labels[:1], 0 if labels.is_floating_point() else VOID)
    found = score(Predictions(*dense_statistics(outputs, labels)), METRICS[channels])
    both = torch.cat([outputs, outputs[:1]]), torch.cat([labels, nothing])
    # sums over more rows are added up in another order: each of n numbers is rounded by half an ε
    rounding = labels.numel() * torch.finfo(torch.float32).eps
    assert score(Predictions(*dense_statistics(*both)), METRICS[channels]).score == pytest.approx(
        found.score, rel=rounding
    )
    assert float(dense_loss(*both)) == pytest.approx(float(dense_loss(outputs, labels)), rel=rounding)
    outputs.requires_grad_(True)
    loss = dense_loss(outputs[:1], nothing)
    loss.backward()
    assert loss == 0 and not outputs.grad.any()


def test_error_metrics_have_intervals_on_their_scale():
    found = score(Predictions([10.0, 20.0, 30.0], [1, 1, 1]), "angle")
    assert found.ci95 == (pytest.approx(20 - 1.96 * (200 / 9) ** 0.5, abs=1e-2), pytest.approx(29.24, abs=1e-2))
    assert score(Predictions([0.0, 0.0, 0.0, 1.0], [1] * 4), "absolute_error").ci95[0] == 0  # no error is less


@pytest.mark.parametrize("channels", METRICS)
def test_outputs_are_brought_to_the_size_of_labels(channels):
    outputs, labels, _ = made(channels)
    small = torch.nn.functional.interpolate(outputs, (3, 4), mode="bilinear", align_corners=False)
    large = torch.nn.functional.interpolate(small, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
    assert dense_statistics(small, labels) == dense_statistics(large, labels)
    assert torch.equal(dense_loss(small, labels), dense_loss(large, labels))


def test_which_metrics_can_be_averaged():
    assert same_scale(["accuracy", "f1"]) and same_scale(["angle", "angle"])
    assert not same_scale(["mean_iou", "angle"]) and not same_scale(["absolute_error", "angle"])
