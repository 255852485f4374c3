"""Model Stock and Arcee Fusion against float64 references on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from in_memory import adversarial, close, doubles, merged, product, slices_of, unsliced

TWO, THREE = adversarial(2), adversarial(3)


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
