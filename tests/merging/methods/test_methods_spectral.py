"""Spectral methods against float64 references by SVD, WUDI by autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from in_memory import adversarial, doubles, merged, product
from torch.linalg import svd, svdvals

CASES = adversarial(3)
_random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
_tall, _wide = _random(4, 5003, 107), _random(4, 211, 2503)  # two chunks and a rest each
CASES["chunks"] = (_tall[0], list(_tall[1:]))
CASES["wide chunks"] = (_wide[0], list(_wide[1:]))
_low = _random(30, 2) @ _random(2, 20)
CASES["low rank"] = (torch.zeros(30, 20), [_low, _random(30, 1) @ _random(1, 20), _low * 2 - 1])


def close(got, wanted, inputs, tolerance=1e-5):
    """Equal up to float32's precision of the inputs."""
    size = max(float(x.double().abs().max()) for x in [wanted, *inputs])
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * size)


def triplets(matrix, count, largest=None):
    """The first singular triplets, those that are more than rounding."""
    u, sigma, v = svd(matrix, full_matrices=False)
    real = sigma[:count] > 1e-6 * max(float(sigma[0]) if largest is None else largest, 1e-300)
    return u[:, :count] * real, sigma[:count] * real, v[:count] * real[:, None]


def polar(matrix):
    """The nearest matrix that is orthogonal on what the matrix does not map to 0."""
    u, sigma, v = svd(matrix, full_matrices=False)
    real = sigma > 1e-5 * sigma[0]
    return (u * real) @ v


def average(base, experts, scaling):
    return base + scaling * sum(e - base for e in experts) / len(experts)


def tsv_m(base, experts, scaling, weights):
    """Algorithm 1 of the paper."""
    share = min(base.shape) // len(experts)
    parts = [triplets(w * (e - base), share) for w, e in zip(weights, experts, strict=True)]
    u, sigma, v = (
        torch.cat([p[0] for p in parts], 1),
        torch.cat([p[1] for p in parts]),
        torch.cat([p[2] for p in parts]),
    )
    if not bool(sigma.any()):
        return base
    return base + scaling * polar(u) @ torch.diag(sigma) @ polar(v)


@pytest.mark.parametrize(("case", "weights"), product(CASES, [[1.0, 1.0, 1.0], [0.5, -1.2, 2.0]]))
def test_tsv_m(case, weights):
    base, experts = doubles(CASES[case])
    got = merged("tsv_m", *CASES[case], scaling=0.7, weight=weights)
    if base.dim() == 2:
        wanted = tsv_m(base, experts, 0.7, weights)
    else:
        wanted = base + 0.7 * sum(w * (e - base) for w, e in zip(weights, experts, strict=True)) / 3
    close(got, wanted, [base, *experts])


def test_tsv_m_averages_matrices_with_fewer_rows_than_experts():
    base, *experts = _random(4, 2, 50)
    close(merged("tsv_m", base, experts), sum(experts).double() / 3, experts)


def test_tsv_m_of_one_expert_is_the_expert():
    base, expert = _random(2, 40, 30)
    close(merged("tsv_m", base, [expert]), expert.double(), [expert])


def iso_c(base, experts, scaling):
    """Equation 6 of the paper."""
    u, sigma, v = svd(sum(e - base for e in experts), full_matrices=False)
    real = sigma > 1e-6 * max(float(sigma[0]), 1e-300)
    return base + scaling * sigma.mean() * (u * real) @ v


@pytest.mark.parametrize("case", CASES)
def test_iso_c(case):
    base, experts = doubles(CASES[case])
    got = merged("iso_c", *CASES[case], scaling=1.3)
    close(got, iso_c(base, experts, 1.3) if base.dim() == 2 else average(base, experts, 1.3), [base, *experts])


def test_iso_c_makes_all_singular_values_one():
    base, experts = CASES["wide"]
    moved = merged("iso_c", base, experts, scaling=0.5) - base
    found = svdvals(sum(e - base for e in experts))
    torch.testing.assert_close(svdvals(moved), 0.5 * found.mean().expand(len(base)), rtol=1e-4, atol=1e-5)


def iso_cts(base, experts, scaling, fraction):
    """Algorithm 2 of the paper, sizes as in its code."""
    deltas, rank = [e - base for e in experts], min(base.shape)
    share = min(round((rank - int(rank * fraction)) / len(experts)), rank // len(experts))
    common = rank - share * len(experts)
    u, sigma, v = triplets(sum(deltas), common)
    parts = []
    for delta in deltas:
        largest = float(svdvals(delta)[0])
        parts.append(triplets(delta - u @ (u.T @ delta), share, largest))
    parts.append((u, sigma, v))
    us, sigmas, vs = (torch.cat([part[i] for part in parts], dim) for i, dim in ((0, 1), (1, 0), (2, 0)))
    if not bool(sigmas.any()):
        return base
    return base + scaling * sigmas.mean() * polar(us) @ polar(vs)


@pytest.mark.parametrize(("case", "fraction"), product(CASES, [0.0, 0.5, 1.0, 0.8]))
def test_iso_cts(case, fraction):
    base, experts = doubles(CASES[case])
    got = merged("iso_cts", *CASES[case], scaling=0.9, common_space_fraction=fraction)
    wanted = iso_cts(base, experts, 0.9, fraction) if base.dim() == 2 else average(base, experts, 0.9)
    close(got, wanted, [base, *experts])


def wudi(base, experts, scaling, steps, rate):
    """The loss of the paper, and Adam (arXiv 1412.6980, algorithm 1): torch's takes a second to import."""
    deltas = [e - base for e in experts]
    tau, mean, square = sum(deltas).clone().requires_grad_(), torch.zeros_like(base), torch.zeros_like(base)
    for step in range(1, steps + 1):
        moved = [d for d in deltas if d.any()]
        if len(tau) < 1000:
            losses = [((tau - d) @ d.T).square().sum() / d.square().sum() for d in moved]
        else:  # ‖A Bᵀ‖² is the sum of A BᵀB ∘ A, which spares a square of the longer side
            losses = [((tau - d) @ (d.T @ d) * (tau - d)).sum() / d.square().sum() for d in moved]
        gradient = torch.autograd.grad(sum(losses), tau)[0] if losses else torch.zeros_like(tau)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        with torch.no_grad():
            tau -= rate * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return base + scaling * tau.detach()


@pytest.mark.parametrize("case", CASES)
def test_wudi(case):
    base, experts = doubles(CASES[case])
    steps, rate = (3, 1e-4) if "chunks" in case else (40, 1e-4)
    got = merged("wudi", *CASES[case], scaling=0.8, steps=steps, learning_rate=rate)
    wanted = wudi(base, experts, 0.8, steps, rate) if base.dim() == 2 else average(base, experts, 0.8)
    close(got, wanted, [base, *experts])


def test_wudi_reduces_interference():
    base, experts = CASES["wide"]
    deltas = [e - base for e in experts]

    def loss(merged):
        return sum((((merged - base) - d) @ d.T).square().sum() / d.square().sum() for d in deltas)

    assert loss(merged("wudi", base, experts, learning_rate=1e-2)) < 0.5 * loss(base + sum(deltas))


def test_too_wide_a_matrix_is_named():
    base = torch.zeros(2, 40_000)
    with pytest.raises(ValueError, match="layers.0.weight has at least 40000 rows and columns"):
        merged("wudi", base, [base, base])
