"""Degenerate inputs, where formulas are undefined or ill-conditioned: limits computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from in_memory import close, merged

from hf_fusion import FusionError
from hf_fusion.merging.engine.tensors import CHUNK, MemoryReader, Statistic, Tensors, merge_tensors
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.merging.methods.fisher_regmean import fisher

V = torch.tensor([[3.0, -1.0, 0.5], [2.0, 0.25, -4.0]])
ZERO = torch.zeros(2, 3)
SIZE = CHUNK + 4321


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("deltas", [True, False])
def test_products_are_exact(deltas):
    """(1 + 2⁻¹²)² needs 25 bits, one more than float32 has; their sum fits into float64 to the last bit."""
    value, other, base = 1 + 2.0**-12, -3 - 2.0**-12, -1.0
    readers = [MemoryReader(torch.full((SIZE,), number)) for number in (value, other)]
    got = Tensors("t", MemoryReader(torch.full((SIZE,), base)), readers).gram(deltas)
    values = torch.tensor([value, other], dtype=torch.float64) - (base if deltas else 0)
    assert got.equal(SIZE * torch.outer(values, values))


def test_products_of_huge_and_tiny_values():
    for size in (1e30, 1e-30):
        values = torch.tensor([size] * 4)
        got = Tensors("t", None, [MemoryReader(values), MemoryReader(-values)]).gram(deltas=False)
        wanted = 4 * float(values[0]) ** 2
        assert got.tolist() == [[wanted, -wanted], [-wanted, wanted]]


@pytest.mark.parametrize(
    ("average", "per", "size"), itertools.product(["cosine", "angle"], ["tensor", "row", "column"], [1.0, 1e-3])
)
def test_model_stock_of_experts_that_point_away_from_each_other_is_the_base(average, per, size):
    """Angles of 180°, 0° and 180° are 120° on average, where the denominator of three experts is 0."""
    base, step = random(50, 60), size * random(50, 60, seed=1)
    got = merged("model_stock", base, [base + step, base - step, base + step], average=average, per=per)
    assert got.equal(base)


@pytest.mark.parametrize("average", ["cosine", "angle"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_stays_between_its_inputs(count, average):
    """Whatever the angles, single numbers with a sign of their own included."""
    for shape, seed in itertools.product([(1, 7), (3, 2), (40, 50)], range(20)):
        base, *experts = random(count + 1, *shape, seed=seed)
        for per in ("tensor", "row", "column"):
            got, every = merged("model_stock", base, experts, average=average, per=per), torch.stack([base, *experts])
            room = 8 * torch.finfo(torch.float32).eps * every.abs().max()
            assert bool(((got >= every.amin(0) - room) & (got <= every.amax(0) + room)).all())


def test_model_stock_of_no_angle_and_of_none_at_all():
    base = random(5, 6)
    assert merged("model_stock", base, [base, base]).equal(base)
    expert = base + random(5, 6, seed=1)
    close(merged("model_stock", base, [expert] * 3), expert, [base, expert])
    assert merged("model_stock", base, [expert, base]).equal(base)  # what stayed is at right angles to all


HALF = math.sin(math.pi / 4)
# method, inputs, parameters, what comes of them
ARCS = [
    ("slerp", [V, 3 * V], {"t": 0.5}, 2 * V),
    ("slerp", [V, -V], {"t": 0.25}, 0.5 * V),
    ("slerp", [V, -V], {"t": 0.5}, ZERO),
    ("slerp", [ZERO, V], {"t": 0.5}, HALF * V),
    ("slerp", [V, ZERO], {"t": 0.5}, HALF * V),
    ("slerp", [ZERO, ZERO], {"t": 0.5}, ZERO),
    ("nuslerp", [V, 3 * V], {"weight": [1.0, 3.0]}, 2.5 * V),
    ("nuslerp", [V, -V], {"weight": [3.0, 1.0]}, 0.5 * V),
    ("nuslerp", [ZERO, V], {"weight": [1.0, 1.0]}, HALF * V),
    ("nuslerp", [ZERO, ZERO], {}, ZERO),
    ("multislerp", [V, V, V], {}, V),
    ("multislerp", [V, 3 * V], {}, 2 * V),
    ("multislerp", [V, -3 * V], {}, -V),  # two that balance out: Σ w_i v_i
    ("multislerp", [ZERO, V], {}, 0.5 * V),
    ("multislerp", [ZERO, ZERO, ZERO], {}, ZERO),
    ("karcher", [V, V, V], {}, V),
    ("karcher", [V, 3 * V], {}, 2 * V),
    ("karcher", [V, -3 * V], {}, 2 * V),  # the first's direction, in the mean length
    ("karcher", [ZERO, V], {}, 0.5 * V),
    ("karcher", [ZERO, ZERO], {}, ZERO),
]


@pytest.mark.parametrize(("method", "inputs", "parameters", "wanted"), ARCS)
def test_equal_opposite_and_zero_directions(method, inputs, parameters, wanted):
    close(merged(method, None, inputs, **parameters), wanted, inputs)
    if method in ("nuslerp", "multislerp"):  # of task vectors
        base = random(2, 3)
        moved = [base + one for one in inputs]
        close(merged(method, base, moved, **parameters), base + wanted, [base, *moved])


@pytest.mark.parametrize("apart", [2e-3, 1e-3, 1e-4])
def test_nearly_opposite_directions_meet_their_mean_exactly(apart):
    """Large numbers cancel out: Karcher's mean of two is their sum's direction, a thousandth of what is added up."""
    one, across = random(2, 400, 700).double()
    across -= (across * one).sum() / one.square().sum() * one
    two = (-one + apart * across * one.norm() / across.norm()).float()
    one = one.float()
    total = one.double() / one.double().norm() + two.double() / two.double().norm()
    wanted = total / total.norm() * (one.double().norm() + two.double().norm()) / 2
    got = merged("karcher", None, [one, two], max_iter=0, tol=1e-9)
    # the result is rounded to float32; ‖m‖² ≈ apart² is what 1 + cos α leaves of products of so many elements
    relative = torch.finfo(torch.float32).eps + one.numel() * torch.finfo(torch.float64).eps / apart**2
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=relative * float(wanted.abs().max()))


def test_sce_weighs_by_energy_at_any_scale():
    """A power of two changes nothing but the size: no threshold decides how small a fine-tune may be."""
    base, experts = torch.zeros(40, 30), [random(40, 30, seed=i) * (i + 1) for i in range(3)]
    for density, scale in itertools.product((1.0, 0.3), (2.0**-40, 2.0**60)):
        got = merged("sce", base, [scale * one for one in experts], density=density)
        assert got.equal(scale * merged("sce", base, experts, density=density))
    assert merged("sce", V, [V, V, V]).equal(V)
    assert merged("sce", V, [V, V, V], density=0.5).equal(V)


def test_sce_selects_nothing_where_experts_are_equal():
    """The mean of three equal numbers is that number, which float32 does not see: nothing varies, nothing is kept."""
    base, expert = random(301, 30), random(301, 30, seed=1)
    assert merged("sce", base, [expert] * 3, density=0.5).equal(base)


@pytest.mark.parametrize("weight", [0.3, 1 / 3, 0.7, 1.0])
def test_votes_that_cancel_out_elect_plus(weight):
    """Fused multiply-adds would leave the rounding of a product, with any sign."""
    step = random(70, 90)
    got = merged("ties", torch.zeros_like(step), [step, -step], weight=weight, density=1.0)
    close(got, step.abs(), [step])
    three = merged("ties", torch.zeros_like(step), [step, step, -2 * step], weight=weight, density=1.0)
    close(three, torch.where(step > 0, step, -2 * step), [2 * step])


def test_weights_that_cancel_out_do_not_divide():
    """0.1 + 0.2 - 0.3 is 3e-8 in float32, not 0."""
    one = V.abs()
    got = merged("ties", ZERO, [one, one, -one], weight=[0.1, 0.2, -0.3], density=1.0)
    close(got, 0.6 * one, [one])


def test_very_few_kept_entries_are_rescaled():
    """Of 4 million a share of 5 in a million: 21, with a standard deviation of 4.6; 16 random bits would leave none."""
    got = merged("dare_linear", torch.zeros(1 << 22), [torch.ones(1 << 22)], drop_rate=1 - 5e-6, scaling=1.0)
    kept = got[got != 0]
    assert 0 < len(kept) < 45
    torch.testing.assert_close(kept, torch.full_like(kept, 2e5), rtol=1e-5, atol=0)
    assert not merged("dare_linear", ZERO, [V], drop_rate=1.0, scaling=1.0).any()


def test_rare_entries_grow_by_as_much_as_they_are_rare():
    """A chance of 1e-5 is drawn as 1 in 65,536: what is kept grows by that, not by 1e5."""
    expert = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1 << 18, 4).contiguous()
    options = {"density": 0.5, "epsilon": 0.5 - 1e-5, "scaling": 1.0, "rank": "row"}
    rare = merged("della_linear", torch.zeros_like(expert), [expert], **options)[:, 0]
    assert set(rare.unique().tolist()) == {0.0, 65536.0}


def test_fisher_information_beyond_float32s_squares():
    """Shares of 1e37 and 3e37 times values of 1e3 are beyond float32, those of 1e-30 times 1e-9 are below it."""
    for size, weight in ((1e37, [1.0, 1.0]), (0.0, [1.0, 1e-9])):
        statistics = [Statistic(MemoryReader(torch.full((4,), size * (i * 2 + 1)))) for i in range(2)]
        experts = [torch.full((4,), 1e3), torch.full((4,), -1e3)]
        tensors = Tensors("t", None, list(map(MemoryReader, experts)), statistics=statistics)
        with torch.inference_mode():
            merge = fisher(tensors, weight=weight, floor=1e-30, normalize=False)
            [(_, got)] = merge_tensors(tensors, merge)
        share = 0.75 if size else 1e-9
        close(got, torch.full((4,), 1e3 * (1 - 2 * share), dtype=torch.float64), experts)


def test_emr_of_a_task_that_agrees_nowhere_is_the_base():
    assert merged("emr", V, [V + 1, V - 3], expert=1).equal(V)
    close(merged("emr", V, [V + 1, V - 3], expert=2), V - 3, [V, V + 1, V - 3])


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_wudi_stays_at_its_minimum(shape):
    """One expert is its own optimum: Adam would walk along what float32 leaves of a gradient that is 0."""
    base, expert = random(2, *shape)
    moved = (merged("wudi", base, [expert], steps=300, learning_rate=1e-5) - expert).abs().max()
    assert moved <= 1e-5 + 2 * torch.finfo(torch.float32).eps * max(base.abs().max(), expert.abs().max())  # one step


def test_arcee_fusion_of_the_base_is_the_base():
    assert merged("arcee_fusion", V, [V.clone()]).equal(V)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_states_are_refused(value):
    """The expert is named, as for files."""
    states = [{"w": V.clone()} for _ in range(3)]
    states[2]["w"][0, 1] = value
    for method in ("linear", "ties", "magnitude", "breadcrumbs", "dare_ties", "della", "sce", "model_stock"):
        with pytest.raises(FusionError, match="w of expert 2 has NaN or Inf"):
            merge_states(method, states[0], states[1:])
    with pytest.raises(FusionError, match="w becomes NaN or Inf"):
        merge_states("linear", None, [{"w": V * 1e37}], weight=1e5, normalize=False)
