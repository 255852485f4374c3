"""Factors of low rank: the exact ones are the best, the randomised ones nearly so, and both report their true error."""

from __future__ import annotations

import math

import pytest
import torch

from hf_fusion.merging.low_rank import decompose


def matrix(rows: int, columns: int, decay: float, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values exp(-decay · i), as changes of fine-tuning fall off; slowly, with a small decay."""
    generator = torch.Generator().manual_seed(seed)
    least = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, least, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, least, generator=generator, dtype=torch.float64))[0]
    return ((u * torch.exp(-decay * torch.arange(least))) @ v.T).float()


def lost(delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    return float((delta.double() - b.double() @ a.double()).square().sum())


@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (24, 40), (30, 30), (17, 1), (1, 17)])
def test_exact_factors_are_the_best_of_their_rank(rows, columns):
    delta = matrix(rows, columns, 0.1)
    sigma = torch.linalg.svdvals(delta.double())
    for rank in (1, 7, 100):
        found = decompose(delta, rank, exact=True)
        kept = min(rank, rows, columns)
        assert found.a.shape == (kept, columns) and found.b.shape == (rows, kept)
        assert found.a.dtype == found.b.dtype == torch.float32
        best = float(sigma[kept:].square().sum())
        # the rounding of A and B to float32 adds about eps² to the share
        assert found.lost == pytest.approx(best, rel=1e-5, abs=1e-12 * found.norm)
        assert found.lost == pytest.approx(lost(delta, found.a, found.b), rel=1e-9)
        assert found.norm == pytest.approx(float(sigma.square().sum()), rel=1e-6)


def test_full_rank_loses_nothing_however_small_the_singular_values():
    delta = matrix(48, 48, 0.7)  # from 1 to 5e-15: the last ones are below the rounding of the first
    found = decompose(delta, 48)
    assert math.sqrt(found.lost / found.norm) < 1e-6


@pytest.mark.parametrize("decay", [0.2, 0.02, 0.0])
@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_randomised_factors_are_nearly_the_best(decay, shape):
    """Two power iterations: for a flat spectrum any subspace is as good, for a steep one the first is found."""
    delta = matrix(*shape, decay)
    best, found = decompose(delta, 16, exact=True), decompose(delta, 16)
    assert not torch.equal(best.a, found.a)
    assert best.lost * (1 - 1e-6) <= found.lost <= 1.03 * best.lost
    assert found.lost == pytest.approx(lost(delta, found.a, found.b), rel=1e-9)
    again = decompose(delta, 16)
    assert torch.equal(again.a, found.a) and torch.equal(again.b, found.b)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_gives_the_smallest_rank_that_keeps_it(energy, exact):
    delta = matrix(160, 100, 0.05)
    found = decompose(delta, energy=energy, exact=exact)
    sums = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    smallest = int((sums < energy * sums[-1]).sum()) + 1 if energy < 1 else 100
    assert smallest <= len(found.a) <= smallest + (0 if exact else 1)
    assert found.lost <= (1 - energy) * found.norm * (1 + 1e-5) + 1e-12 * found.norm


def test_the_error_includes_the_rounding_of_the_factors():
    delta = matrix(64, 64, 0.05)
    wide, narrow = decompose(delta, 64), decompose(delta, 64, dtype=torch.bfloat16)
    assert narrow.a.dtype == torch.bfloat16
    assert narrow.lost == pytest.approx(lost(delta, narrow.a, narrow.b), rel=1e-9)
    eps = torch.finfo(torch.bfloat16).eps
    assert wide.lost < 1e-12 * wide.norm < narrow.lost < (2 * eps) ** 2 * narrow.norm


def test_no_change():
    found = decompose(torch.zeros(5, 3), 2)
    assert not found.a.any() and not found.b.any() and found.a.shape == (1, 3) and found.b.shape == (5, 1)
    assert found.lost == found.norm == 0
