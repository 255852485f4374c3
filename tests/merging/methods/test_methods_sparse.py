"""Sparse methods against plain float64 implementations of their papers."""

from __future__ import annotations

import math

import in_memory
import pytest
import torch
from in_memory import adversarial, merged

from hf_fusion.merging.engine.tensors import CHUNK, MemoryReader, Tensors
from hf_fusion.merging.engine.thresholds import Trim, find_thresholds

CASES = adversarial(3)
WEIGHTS = [1.0, 0.5, -0.25]


def deltas_of(base, experts):
    """In float32, as the method reads them, then exact."""
    return torch.stack([(e.float() - base.float()).double() for e in experts])


def keep_largest(tau, density, ties):
    """The largest |τ| of one expert; of equal ones the first, or all."""
    flat = tau.flatten()
    k = max(1, int(density * len(flat))) if density else 0
    order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))[:k]
    kept = torch.zeros_like(flat)
    kept[order] = flat[order]
    if ties == "all" and k:
        limit = abs(float(flat[order[-1]]))
        kept = torch.where(flat.abs() >= limit, flat, 0.0)
    return kept.view(tau.shape)


def elect(taus, weights, merge):
    """What agrees with the sign of the sum: its weighted mean or its sum."""
    weighted = torch.stack([w * tau for w, tau in zip(weights, taus)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == sign
    total = (weighted * agrees).sum(0)
    if merge == "sum":
        return total
    divisor = torch.stack([w * a for w, a in zip(weights, agrees.double())]).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor)


def close(got, wanted, base):
    """Up to what is rounded of the base and three experts."""
    in_memory.close(got, wanted, [base] * 4)


@pytest.mark.parametrize("case", [name for name in CASES if name != "chunks"])
@pytest.mark.parametrize("ties", ["exact", "all"])
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_ties(case, ties, merge):
    base, experts = CASES[case]
    taus = deltas_of(base, experts)
    trimmed = [keep_largest(tau, d, ties) for tau, d in zip(taus, [0.2, 0.5, 1.0])]
    wanted = base.double() + 0.7 * elect(trimmed, WEIGHTS, merge)
    got = merged("ties", base, experts, weight=WEIGHTS, density=[0.2, 0.5, 1.0], scaling=0.7, merge=merge, ties=ties)
    close(got, wanted, base)


@pytest.mark.parametrize("case", [name for name in CASES if name != "chunks"])
def test_magnitude_and_breadcrumbs(case):
    base, experts = CASES[case]
    taus = deltas_of(base, experts)
    wanted = base.double() + 0.3 * sum(w * keep_largest(tau, 0.4, "exact") for w, tau in zip(WEIGHTS, taus))
    close(merged("magnitude", base, experts, weight=WEIGHTS, density=0.4), wanted, base)
    middle = []
    for tau in taus:
        total = tau.numel()
        kept = int(0.6 * total)
        top = min(int(0.1 * total), total - kept)
        order = sorted(range(total), key=lambda i: (-abs(float(tau.flatten()[i])), i))[top : top + kept]
        own = torch.zeros(total, dtype=torch.float64)
        own[order] = tau.flatten()[order]
        middle.append(own.view(tau.shape))
    wanted = base.double() + 0.3 * sum(w * tau for w, tau in zip(WEIGHTS, middle))
    close(merged("breadcrumbs", base, experts, weight=WEIGHTS, density=0.6, gamma=0.1), wanted, base)
    wanted = base.double() + elect(middle, WEIGHTS, "mean")
    close(merged("breadcrumbs_ties", base, experts, weight=WEIGHTS, density=0.6, gamma=0.1), wanted, base)


@pytest.mark.parametrize("case", [name for name in CASES if name != "chunks"])
def test_sce(case):
    base, experts = CASES[case]
    taus = deltas_of(base, experts)
    variance = taus.var(0, unbiased=False)
    got = merged("sce", base, experts)
    energy = taus.square().view(3, -1).mean(1)
    total = float(energy.sum())
    weights = [float(e) / total for e in energy] if total else [1 / 3] * 3
    agrees = taus.sign() == torch.where(taus.sum(0) >= 0, 1.0, -1.0)
    parts = torch.stack([w * a for w, a in zip(weights, agrees.double())])
    divisor = parts.sum(0)
    wanted = base.double() + (taus * parts).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    close(got, wanted, base)
    kept = merged("sce", base, experts, density=0.3)
    if case in ("random", "vector", "4-D"):
        k = int(0.3 * int(torch.count_nonzero(variance)))
        assert int(((kept - base) != 0).sum()) == k
        moved = (kept - base).flatten().nonzero().view(-1)
        assert set(moved.tolist()) == set(variance.flatten().topk(k).indices.tolist())


def test_dropping_at_random():
    """As many as were asked for, the rest rescaled, no two experts alike, the same again with the same seed."""
    base, size = torch.zeros(700, 900), 630_000
    experts = [torch.ones(700, 900), torch.full((700, 900), 2.0)]
    only = {"weight": [1.0, 0.0], "drop_rate": 0.3, "scaling": 1.0}
    one = merged("dare_linear", base, experts, **only)
    torch.testing.assert_close(one.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs(float((one == 0).double().mean()) - 0.3) < 5 * math.sqrt(0.21 / size)
    assert one.equal(merged("dare_linear", base, experts, **only))
    again = merged("dare_linear", base, experts, seed=1, **only)
    both = ((one == 0) & (again == 0)).double().mean()
    assert abs(float(both) - 0.09) < 5 * math.sqrt(0.09 / size)
    other = merged("dare_linear", base, experts, weight=[0.0, 0.5], drop_rate=0.3, scaling=1.0)
    assert abs(float(((one == 0) & (other == 0)).double().mean()) - 0.09) < 5 * math.sqrt(0.09 / size)
    columns = (one[:, :-1] == 0) & (one[:, 1:] == 0)  # neighbours are drawn apart
    assert abs(float(columns.double().mean()) - 0.09) < 5 * math.sqrt(0.09 / size)


@pytest.mark.parametrize("case", CASES)
def test_kept_entries_are_rescaled_to_the_original_norm(case):
    """Over more than one chunk too, where equal magnitudes are counted twice: for the norm and for the merge."""
    base, experts = CASES[case]
    taus = deltas_of(base, experts)

    def grown(kept):
        return [k * (t.abs().sum() / k.abs().sum() if k.abs().sum() >= 1e-7 else 1) for k, t in zip(kept, taus)]

    if case == "chunks":  # the reference is too slow: of magnitudes that are all equal, the first share of them
        sign = torch.sign(experts[0] - base)
        got = merged("ties", torch.zeros_like(sign), [sign], density=0.3, rescale="norm").flatten()
        count = int(0.3 * sign.numel())
        assert torch.allclose(got[:count], sign.flatten()[:count] * sign.numel() / count)
        assert not got[count:].any()
        return
    got = merged("ties", base, experts, weight=WEIGHTS, density=0.3, rescale="norm")
    wanted = elect(grown([keep_largest(tau, 0.3, "exact") for tau in taus]), WEIGHTS, "mean")
    close(got, base.double() + wanted, base)


@pytest.mark.parametrize(("rescale", "factor"), [("rate", 2.0), ("none", 1.0), ("norm", None)])
def test_dropped_entries_are_compensated(rescale, factor):
    base, experts = CASES["random"]
    got = (merged("dare_linear", base, experts[:1], scaling=1.0, rescale=rescale) - base).double()
    [tau] = deltas_of(base, experts[:1])
    kept = got != 0
    if factor is None:
        factor = float(tau.abs().sum() / tau[kept].abs().sum())
    torch.testing.assert_close(got[kept], factor * tau[kept], rtol=1e-4, atol=1e-6)


def test_dare_ties_elects_signs_among_kept_entries():
    base, experts = CASES["random"]
    plain = {"drop_rate": 0.5, "scaling": 1.0}
    apart = [(merged("dare_linear", base, experts, weight=[float(i == k) for k in range(3)], **plain) - base).double()
             for i in range(3)]  # fmt: skip
    for merge in ("mean", "sum"):
        wanted = base.double() + elect(apart, [1.0] * 3, merge)
        close(merged("dare_ties", base, experts, merge=merge), wanted, base)
    trimmed = [keep_largest(tau, 0.2, "exact") for tau in apart]
    close(merged("dare_ties", base, experts, density=0.2), base.double() + elect(trimmed, [1.0] * 3, "mean"), base)


@pytest.mark.parametrize("rank", ["tensor", "row"])
def test_della_keeps_large_entries_more_often(rank):
    """How often entries of each tenth by rank are kept, and what becomes of them."""
    torch.manual_seed(0)
    base, expert = torch.zeros(500, 600), torch.randn(500, 600)
    got = merged("della_linear", base, [expert], density=0.5, epsilon=0.3, scaling=1.0, rank=rank)
    order = expert.abs().argsort(dim=1).argsort(dim=1) if rank == "row" else None
    if order is None:
        order = expert.abs().flatten().argsort().argsort().view(500, 600)
    share = order.double() / (600 - 1 if rank == "row" else 300_000 - 1)
    chance = 0.2 + 0.6 * share
    for low in range(10):
        tenth = (share >= low / 10) & (share < (low + 1) / 10)
        assert float((got[tenth] != 0).double().mean()) == pytest.approx(0.23 + 0.06 * low, abs=0.015)
    kept = got != 0
    torch.testing.assert_close(got[kept].double(), (expert.double() / chance)[kept], rtol=0.02, atol=0)
    plain = merged("della_linear", base, [expert], density=0.5, epsilon=0.3, scaling=1.0, rank=rank, rescale="none")
    assert plain[kept].equal(expert[kept])
    assert bool((plain[~kept] == 0).all())
    elected = merged("della", base, [expert, -2 * expert], density=0.5, epsilon=0.3, rank=rank)
    assert bool(((elected == 0) | (elected.sign() == -expert.sign()) | (elected.sign() == expert.sign())).all())
    with pytest.raises(ValueError, match="epsilon 0.5 must lie between"):
        merged("della", base, [expert], density=0.5, epsilon=0.5)


@pytest.mark.parametrize("case", ["chunks", "few values", "all equal", "heavy tail"])
def test_thresholds_are_exact(case):
    """The k-th largest of a tensor of several chunks, as sorting it all gives it."""
    generator = torch.Generator().manual_seed(1)
    size = 2 * CHUNK + 4321
    values = {
        "chunks": torch.randn(size, generator=generator),
        "few values": torch.randint(0, 7, (size,), generator=generator).float(),
        "all equal": torch.full((size,), 0.25),
        # the first chunk is a thousand times the rest: a sample sees little of what is between
        "heavy tail": torch.randn(size, generator=generator) * torch.where(torch.arange(size) < CHUNK, 1e3, 1.0),
    }[case].abs()
    tensors = Tensors("t", MemoryReader(torch.zeros(size)), [MemoryReader(values)])
    ordered = values.sort(descending=True).values
    for k in (1, 2, size // 5, size // 2, size - 1, size):
        [found] = find_thresholds(tensors, [k], lambda chunk: chunk.deltas().abs_())
        assert found.value == float(ordered[k - 1])
        assert found.equal == k - int((values > found.value).sum())
        assert found.ties == int((values == found.value).sum())
        trim = Trim([found], "exact")
        kept = torch.cat([trim(chunk.deltas(), chunk.index == 0)[0].clone() for chunk in tensors.chunks()])
        assert int((kept != 0).sum()) == min(k, int((values != 0).sum()))


def test_threshold_search_ends_with_nan():
    """Fewer numbers than are wanted: all are kept, and the search ends."""
    values = torch.rand(CHUNK + 1000, generator=torch.Generator().manual_seed(0))
    values[::3] = torch.nan
    tensors = Tensors("t", MemoryReader(torch.zeros(len(values))), [MemoryReader(values)])
    [found] = find_thresholds(tensors, [len(values)], lambda chunk: chunk.deltas().abs_())
    assert found.value == 0


@pytest.mark.parametrize("spread", [0.3, 0.6])
def test_rows_of_unlike_sizes_take_one_pass(spread, monkeypatch):
    """The sample tells how unsure it is: where rows differ, its bracket is wide enough at once."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(896, 1200, generator=generator)
    values *= (spread * torch.randn(896, 1, generator=generator)).exp()
    tensors = Tensors("t", MemoryReader(torch.zeros(values.shape)), [MemoryReader(values)])
    passes = []
    monkeypatch.setattr(tensors, "chunks", lambda: passes.append(1) or Tensors.chunks(tensors))
    [found] = find_thresholds(tensors, [values.numel() // 5], lambda chunk: chunk.deltas().abs_())
    assert found.value == float(values.flatten().abs().sort(descending=True).values[values.numel() // 5 - 1])
    assert len(passes) == 1


def test_trimmed_over_the_model():
    """One threshold for all tensors: those that moved little keep next to nothing."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(40, 50), (30,), (7, 11)]
    bases = [torch.randn(s, generator=generator) for s in shapes]
    moved = [torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, (1.0, 0.1, 3.0))]
    from hf_fusion.merging.engine.tensors import WholeModel, merge_tensors
    from hf_fusion.merging.methods.sparse import ties

    def opened():
        return [Tensors(str(i), MemoryReader(b), [MemoryReader(b + m)]) for i, (b, m) in enumerate(zip(bases, moved))]

    model = WholeModel(opened)
    taus = [(b + m) - b for b, m in zip(bases, moved)]
    flat = torch.cat([tau.flatten() for tau in taus])
    limit = flat.abs().sort(descending=True).values[int(0.2 * len(flat)) - 1]
    for number, (base, tau) in enumerate(zip(bases, taus)):
        tensors = Tensors(str(number), MemoryReader(base), [MemoryReader(base + moved[number])], model=model)
        merge = ties(tensors, weight=[1.0], density=[0.2], scaling=1.0, trim="model")
        got = torch.cat([values.clone() for _, values in merge_tensors(tensors, merge)]).view(base.shape)
        torch.testing.assert_close(got, base + torch.where(tau.abs() >= limit, tau, 0.0))


def test_dare_ties_trimmed_over_the_model():
    """As the paper and fusion_bench do: one threshold for what is left of all tensors."""
    from hf_fusion.merging.engine.tensors import WholeModel, merge_tensors
    from hf_fusion.merging.methods.sparse import dare_ties

    generator = torch.Generator().manual_seed(3)
    moved = {str(n): torch.randn(s, generator=generator) * (n + 1) for n, s in enumerate([(300, 301), (30,), (7, 11)])}

    def opened():
        return [Tensors(name, MemoryReader(torch.zeros_like(m)), [MemoryReader(m)]) for name, m in moved.items()]

    def run(density, **options):
        model, found = WholeModel(opened), []
        for tensors in opened():
            tensors.model = model
            merge = dare_ties(tensors, weight=[1.0], drop_rate=[0.5], density=[density], **options)
            found += [values.clone() for _, values in merge_tensors(tensors, merge)]
        return torch.cat(found)

    thinned, trimmed = run(1.0), run(0.2, trim="model")
    limit = thinned.abs().sort(descending=True).values[int(0.2 * len(thinned)) - 1]
    torch.testing.assert_close(trimmed, torch.where(thinned.abs() >= limit, thinned, 0.0))
    assert not trimmed.equal(run(0.2))
    with pytest.raises(ValueError, match="not with norm"):
        run(0.2, trim="model", rescale="norm")


def test_della_that_drops_nothing():
    base, expert = torch.zeros(5, 7), torch.randn(5, 7, generator=torch.Generator().manual_seed(4))
    options = {"epsilon": 0.0, "scaling": 1.0}
    torch.testing.assert_close(merged("della_linear", base, [expert], density=1.0, **options), expert)
    with pytest.raises(ValueError, match="must lie between"):
        merged("della_linear", base, [expert], density=0.0, **options)
