"""Methods of angles and lengths against float64 references on whole vectors."""

from __future__ import annotations

import math

import pytest
import torch
from in_memory import adversarial, close, merged, product

TWO, THREE = adversarial(2), adversarial(3)


def doubles(case):
    base, experts = case
    return base.double(), [expert.double() for expert in experts]


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


def slices_of(tensor, per):
    """The vectors that have an angle of their own, as (count, size)."""
    if per == "tensor" or tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if per == "row" else tensor.reshape(len(tensor), -1).T


def unsliced(rows, shape, per):
    if per == "column" and len(shape) > 1:
        rows = rows.T
    return rows.reshape(shape)


@pytest.mark.parametrize(("case", "with_base", "per"), product(TWO, [False, True], ["tensor", "column", "row"]))
def test_nuslerp(case, with_base, per):
    base, experts = doubles(TWO[case])
    origin = base if with_base else torch.zeros_like(base)
    pairs = zip(*(slices_of(e - origin, per) for e in experts), strict=True)
    rows = [arc(a, b, 0.75, lambda cosine: math.sqrt(1 - cosine * cosine) < 1e-3) for a, b in pairs]
    wanted = origin + unsliced(torch.stack(rows), base.shape, per)
    got = merged("nuslerp", TWO[case][0] if with_base else None, TWO[case][1], weight=[0.5, 1.5], per=per)
    close(got, wanted, [base, *experts])


def test_nuslerp_of_weights_that_sum_to_nothing_goes_half_way():
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


def test_multislerp_refuses_what_has_no_direction():
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


def stock(base, experts, average):
    """Towards the average of vectors, by the angle between them."""
    deltas = [e - base for e in experts]
    cosines = []
    for i, one in enumerate(deltas):
        for other in deltas[i + 1 :]:
            lengths = float(one.norm() * other.norm())
            cosines.append(max(-1.0, min(1.0, float((one * other).sum()) / lengths)) if lengths else 0.0)
    if average == "cosine":
        cosine = sum(cosines) / len(cosines)
    else:
        cosine = math.cos(sum(map(math.acos, cosines)) / len(cosines))
    count, cosine = len(experts), max(0.0, cosine)
    ratio = count * cosine / ((count - 1) * cosine + 1)
    return ratio * sum(experts) / count + (1 - ratio) * base, ratio


@pytest.mark.parametrize(("case", "average", "per"), product(THREE, ["cosine", "angle"], ["tensor", "column", "row"]))
def test_model_stock(case, per, average):
    base, experts = doubles(THREE[case])
    groups = zip(slices_of(base, per), *(slices_of(e, per) for e in experts), strict=True)
    rows, ratios = zip(*(stock(first, others, average) for first, *others in groups), strict=True)
    wanted = unsliced(torch.stack(rows), base.shape, per)
    got = merged("model_stock", *THREE[case], per=per, average=average)
    assert all(0 <= ratio <= 1 for ratio in ratios)
    close(got, wanted, [base, *experts])


@pytest.mark.parametrize("case", TWO)
def test_model_stock_of_two(case):
    base, experts = doubles(TWO[case])
    close(merged("model_stock", *TWO[case]), stock(base, experts, "angle")[0], [base, *experts])


@pytest.mark.parametrize("case", TWO)
def test_arcee_fusion(case):
    base, (expert, _) = doubles(TWO[case])
    rows = base.reshape(-1, base.shape[-1] if base.dim() else 1)
    importance, rounding = [], []
    for first, own in zip(rows, expert.reshape(rows.shape), strict=True):
        p, q = (torch.exp(v - v.max()) / torch.exp(v - v.max()).sum() + 1e-8 for v in (own, first))
        terms = p * (p / q).log()
        importance.append((own - first).abs() * float(terms.sum()))
        # p, q, their ratio and its logarithm are rounded, each term and each sum
        eps, most = torch.finfo(torch.float64).eps, float((p * (1 + (p / q).log().abs())).sum())
        rounding.append((own - first).abs() * (len(terms) + 8) * eps * most)
    importance, rounding = (torch.stack(rows).reshape(base.shape) for rows in (importance, rounding))
    ordered = sorted(importance.reshape(-1).tolist())
    lower, median, upper = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (upper - lower)
    got = merged("arcee_fusion", TWO[case][0], TWO[case][1][:1]).double()
    wanted = torch.where(importance >= limit, expert, base)
    # where float64 cannot tell on which side of the limit an importance lies, either is right
    sure = (importance - limit).abs() >= rounding + 4 * rounding.max()
    close(torch.where(sure, got, wanted), wanted, [base, expert])
    # KL of what differs by less than ε is rounding, and that of a row of one element
    assert sure.double().mean() > 0.97 or case in ("one element", "a number", "tiny")


WITH_BASE = {"nuslerp": 2, "multislerp": 3, "nearswap": 1, "model_stock": 2, "arcee_fusion": 1}
WITH_BASE |= {"tsv_m": 3, "iso_c": 3, "iso_cts": 3, "wudi": 3, "emr": 3}


@pytest.mark.parametrize(("method", "count"), [("slerp", 2), ("karcher", 3), ("multislerp", 3), *WITH_BASE.items()])
def test_nan_and_inf_are_never_merged_away(method, count):
    base, experts = THREE["random"]
    experts = [expert.clone() for expert in experts[:count]]
    for value in (torch.nan, torch.inf):
        experts[-1][2, 3] = value
        assert not merged(method, base if method in WITH_BASE else None, experts).isfinite().all()
