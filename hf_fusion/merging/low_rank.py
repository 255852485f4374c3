"""Factors of low rank of one matrix: the best ones, or nearly the best ones in a fraction of the time."""

from __future__ import annotations

import torch

from hf_fusion.merging.methods.lora import Factors

POWER_ITERATIONS = 2
"""Power iterations of the randomised decomposition: each multiplies by the matrix and by its transpose."""
LEAST_OVERSAMPLING = 8
"""Directions that the randomised decomposition follows beyond the rank, at least; else as many as the rank."""
_SPARSE = 4  # the randomised decomposition is used for ranks up to the smaller dimension divided by this
_FIRST_RANK = 16  # tried first for a share of the energy; doubled until it suffices
_BLOCK = 1 << 22  # elements of the error computed at once


def decompose(
    delta: torch.Tensor,
    rank: int | None = None,
    energy: float | None = None,
    *,
    exact: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Factors:
    """Factors B A of a matrix, with its singular values shared equally between them.

    The exact decomposition is the best one of its rank (Eckart and Young, 1936). Its right singular vectors V are the
    eigenvectors of ΔᵀΔ in float64, for the smaller of the two dimensions, and B A = Δ V Vᵀ: at full rank nothing is
    lost but rounding. A rank of at most a quarter of the smaller dimension is found from random products instead, with
    power iterations (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061, algorithm 4.4); ranks for an energy are tried
    from 16 on, and decomposed exactly if a quarter does not suffice.

    Args:
        delta: Δ, (d_out, d_in), fp32, finite.
        rank: r; larger ones are reduced to the smaller dimension.
        energy: share of ‖Δ‖² that is kept, instead of a rank: the smallest rank that keeps it.
        exact: never use random products.
        dtype: of the factors.
        seed: of the random products.

    Returns:
        A (r, d_in) and B (d_out, r) in `dtype`, with ‖Δ - B A‖² of these rounded factors, and ‖Δ‖².
    """
    least = min(delta.shape)
    norm = float(delta.double().square().sum())
    if norm == 0:
        return Factors(delta.new_zeros(1, delta.shape[1], dtype=dtype), delta.new_zeros(len(delta), 1, dtype=dtype))
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    found = None
    if energy is None:
        wanted = min(rank or least, least)
        if not exact and _SPARSE * wanted <= least:
            found = _randomised(tall, wanted, seed)
    else:
        wanted = 0
        guess = _FIRST_RANK
        while not exact and not wanted and _SPARSE * guess <= least:
            found = _randomised(tall, guess, seed)
            wanted = _rank_keeping(found[1].square(), energy * norm)
            guess *= 2
    if not wanted or found is None:
        found = _exact(tall)
        wanted = wanted or _rank_keeping(found[1].square(), energy * norm if energy else 0.0) or least
    left, sigma, right = (part[..., :wanted] for part in found)
    root = sigma.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    left, right = (left * (sigma / root)).to(dtype), (right * root).to(dtype)
    b, a = (left, right.T) if tall is delta else (right, left.T)
    return Factors(a.contiguous(), b.contiguous(), _lost(delta, a, b), norm)


def _rank_keeping(energies: torch.Tensor, wanted: float) -> int:
    """The smallest number of the first energies whose sum is at least `wanted`; 0 if all of them are less."""
    sums = energies.double().cumsum(0)
    if wanted > float(sums[-1]):
        return 0
    return int((sums < wanted).sum()) + 1


def _exact(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, n), σ (n,) and V (n, n) of a matrix (m, n), in float64."""
    wide = tall.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    vectors = vectors.flip(1)
    products = wide @ vectors  # U Σ: their norms are more precise than the square roots of the eigenvalues
    sigma = products.norm(dim=0)
    return products / sigma.clamp_min(torch.finfo(torch.float64).tiny), sigma, vectors


def _randomised(tall: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """About the first `rank` singular triplets of a matrix (m, n): U (m, r), σ (r,) and V (n, r)."""
    columns = min(rank + max(rank, LEAST_OVERSAMPLING), tall.shape[1])
    drawn = torch.randn(tall.shape[1], columns, generator=torch.Generator().manual_seed(seed)).to(tall.device)
    basis = torch.linalg.qr(tall @ drawn)[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis)[0])[0]
    u, sigma, v = torch.linalg.svd((basis.T @ tall).double(), full_matrices=False)
    return basis.double() @ u[:, :rank], sigma[:rank], v[:rank].T


def _lost(delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """‖Δ - B A‖², a few rows at a time."""
    rows, total, a = max(1, _BLOCK // delta.shape[1]), 0.0, a.double()
    for first in range(0, len(delta), rows):
        rest = delta[first : first + rows].double() - b[first : first + rows].double() @ a
        total += float(rest.square().sum())
    return total


__all__ = ["decompose"]
