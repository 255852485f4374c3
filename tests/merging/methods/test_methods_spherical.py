"""Spherical methods against float64 references on whole vectors."""

from __future__ import annotations

import math

import pytest
import torch
from in_memory import adversarial, close, doubles, merged, product, slices_of, unsliced

TWO, THREE = adversarial(2), adversarial(3)


def arc(a, b, t, is_line):
    """From one vector to the other along the circle through both."""
    lengths = [float(v.norm()) if v.norm() > 1e-8 else 1.0 for v in (a, b)]
    cosine = max(-1.0, min(1.0, float((a * b).sum()) / lengths[0] / lengths[1]))
    if is_line(cosine):
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize(("case", "t"), product(TWO, [0.0, 1.0, 0.3]))
def test_slerp(case, t):
    _, (one, two) = doubles(TWO[case])
    wanted = arc(one, two, t, lambda cosine: abs(cosine) > 0.9995)
    close(merged("slerp", None, TWO[case][1], t=t), wanted, [one, two])


def test_slerp_keeps_the_length_between_vectors_of_one_length():
    one, two = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    two = two * one.norm() / two.norm()
    middle = merged("slerp", None, [one, two], t=0.5)
    assert middle.norm().item() == pytest.approx(one.norm().item(), rel=1e-5)
    assert (one + two).div(2).norm() < 0.8 * one.norm()
    assert (middle @ one).item() == pytest.approx((middle @ two).item(), rel=1e-4)


@pytest.mark.parametrize(("case", "with_base", "per"), product(TWO, [False, True], ["tensor", "column", "row"]))
def test_nuslerp(case, with_base, per):
    base, experts = doubles(TWO[case])
    origin = base if with_base else torch.zeros_like(base)
    pairs = zip(*(slices_of(e - origin, per) for e in experts), strict=True)
    rows = [arc(a, b, 0.75, lambda cosine: math.sqrt(1 - cosine * cosine) < 1e-3) for a, b in pairs]
    wanted = origin + unsliced(torch.stack(rows), base.shape, per)
    got = merged("nuslerp", TWO[case][0] if with_base else None, TWO[case][1], weight=[0.5, 1.5], per=per)
    close(got, wanted, [base, *experts])


def test_nuslerp_with_weights_summing_to_zero_is_the_midpoint():
    _, experts = TWO["random"]
    half = merged("nuslerp", None, experts)
    assert half.equal(merged("nuslerp", None, experts, weight=[1.0, -1.0]))
    assert not half.equal(merged("nuslerp", None, experts, weight=[1.0, -0.5]))


def multislerp(vectors, weights):
    """The step in the tangent space, as its inventor describes it."""
    lengths = [v.norm() for v in vectors]
    units = [v / length if length else v for v, length in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if mean.norm() < 1e-3 * sum(map(abs, weights)):
        return sum(w * v for w, v in zip(weights, vectors, strict=True))
    mean = mean / mean.norm()
    tangents = [u - (u * mean).sum() * mean for u in units]
    step = sum(w * tangent for w, tangent in zip(weights, tangents, strict=True))
    size = step.norm() + 1e-12
    point = mean * torch.cos(size) + step * torch.sin(size) / size
    return point * sum(w * length for w, length in zip(weights, lengths, strict=True))


@pytest.mark.parametrize(
    ("case", "with_base", "weights"), product(TWO, [False, True], [[1.0, 1.0], [1.5, -0.4], [0.3, 1.1]])
)
def test_multislerp(case, with_base, weights):
    base, experts = doubles(TWO[case])
    origin = base if with_base else torch.zeros_like(base)
    shares = [w / sum(weights) for w in weights]
    wanted = origin + multislerp([e - origin for e in experts], shares)
    got = merged("multislerp", TWO[case][0] if with_base else None, TWO[case][1], weight=weights)
    close(got, wanted, [base, *experts])


@pytest.mark.parametrize("case", THREE)
def test_multislerp_of_three_not_normalized(case):
    base, experts = doubles(THREE[case])
    weights = [0.5, 0.9, 0.6]
    wanted = base + multislerp([e - base for e in experts], weights)
    got = merged("multislerp", *THREE[case], weight=weights, normalize=False)
    close(got, wanted, [base, *experts])


def test_multislerp_refuses_cancelling_inputs():
    one = torch.arange(50.0)
    with pytest.raises(ValueError, match="weights of layers.0.weight sum to 0"):
        merged("multislerp", None, [one, one], weight=[1.0, -1.0])
    with pytest.raises(ValueError, match="directions of layers.0.weight cancel"):
        merged("multislerp", None, [one, -one, one, -one])


def karcher(vectors, steps, tol):
    """Gradient descent on the sphere."""
    lengths = [float(v.norm()) for v in vectors]
    units = [v / length for v, length in zip(vectors, lengths, strict=True) if length > tol]
    if not units:
        return torch.zeros_like(vectors[0])
    u = sum(units) / len(units)
    u = units[0] if u.norm() < tol else u / u.norm()
    for _ in range(steps):
        step = torch.zeros_like(u)
        for unit in units:
            across = unit - (unit * u).sum() * u
            angle = math.atan2(float(across.norm()), float((unit * u).sum()))
            if angle >= tol and (across.norm() > 1e-3 or (unit * u).sum() > 0):
                step += angle * across / across.norm() / len(units)
        if step.norm() < tol:
            break
        u = step.norm().cos() * u + step.norm().sin() * step / step.norm()
        u = u / u.norm()
    return sum(lengths) / len(lengths) * u


@pytest.mark.parametrize("case", THREE)
def test_karcher(case):
    _, experts = doubles(THREE[case])
    close(merged("karcher", None, THREE[case][1]), karcher(experts, 10, 1e-5), experts)


def test_karcher_is_where_the_angles_balance():
    _, experts = THREE["wide"]
    experts = [experts[0], experts[1] * 2, -experts[0] + 0.5 * experts[2]]
    u = merged("karcher", None, experts, max_iter=200, tol=1e-7).double().view(-1)
    assert u.norm() == pytest.approx(sum(e.norm().item() for e in experts) / 3, rel=1e-5)
    u = u / u.norm()
    units = [e.double().view(-1) / e.double().norm() for e in experts]
    pulls = [torch.arccos(unit @ u) * torch.nn.functional.normalize(unit - (unit @ u) * u, dim=0) for unit in units]
    assert max(pull.norm() for pull in pulls) > 0.5
    assert sum(pulls).norm() < 1e-3


@pytest.mark.parametrize(("case", "t"), product(TWO, [0.0, 0.2, 1e31, 1e-3]))
def test_nearswap(case, t):
    base, (expert, _) = doubles(TWO[case])
    distance = (expert - base).abs()
    share = torch.where(distance > 0, t / distance, 1.0).clamp(max=1)
    close(merged("nearswap", TWO[case][0], TWO[case][1][:1], t=t), share * expert + (1 - share) * base, [base, expert])


WITH_BASE = {"nuslerp": 2, "multislerp": 3, "nearswap": 1, "model_stock": 2, "arcee_fusion": 1}
WITH_BASE |= {"tsv_m": 3, "iso_c": 3, "iso_cts": 3, "wudi": 3, "emr": 3}


@pytest.mark.parametrize(("method", "count"), [("slerp", 2), ("karcher", 3), ("multislerp", 3), *WITH_BASE.items()])
def test_nan_and_inf_are_never_merged_away(method, count):
    base, experts = THREE["random"]
    experts = [expert.clone() for expert in experts[:count]]
    for value in (torch.nan, torch.inf):
        experts[-1][2, 3] = value
        assert not merged(method, base if method in WITH_BASE else None, experts).isfinite().all()
