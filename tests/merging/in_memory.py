"""Runs a merging method on tensors in memory, through the readers, parameters and chunks that files use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_fusion.merging.engine.tensors import CANCELLATION_LIMIT, MemoryReader, Tensors, merge_tensors
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.settings import arguments_at, check_setting
from hf_fusion.schema import KeyPath

HALF_EPS = torch.finfo(torch.float32).eps / 2


def merged(
    method: str,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    seed: int = 0,
    name: str = "layers.0.weight",
    **parameters: Any,
) -> torch.Tensor:
    """What a method makes of one tensor, float32 in the tensor's shape.

    A parameter of which every expert has its own is one number for all of them, or a list with one for each.
    """
    row = MERGE_METHODS[method]
    known = row.parameters
    own: list[dict[str, Any]] = [{} for _ in experts]
    shared = {}
    for key, value in parameters.items():
        each = value if known[key].per_expert and isinstance(value, (list, tuple)) else None
        if each is None:
            check_setting(known[key], value, KeyPath(method, key))
            shared[key] = value
            continue
        for settings, number in zip(own, each, strict=True):
            check_setting(known[key], number, KeyPath(method, key))
            settings[key] = number
    arguments = arguments_at(known, [shared], [[settings] for settings in own], name, 0.0)
    tensors = Tensors(name, None if base is None else MemoryReader(base), list(map(MemoryReader, experts)), seed)
    with torch.inference_mode():
        pieces = [
            (start, values.clone()) for start, values in merge_tensors(tensors, row.function(tensors, **arguments))
        ]
    assert [start for start, _ in pieces] == [sum(len(v) for _, v in pieces[:i]) for i in range(len(pieces))]
    flat = torch.cat([values for _, values in pieces]) if pieces else torch.empty(0)
    assert flat.dtype == torch.float32
    return flat.view(tensors.shape)


def close(got: torch.Tensor, wanted: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    """Equal but for what float32 rounds off in a sum of n inputs, each times a number.

    Every number, every product and every sum is rounded by half an ε of itself: n + 1 times of any input on its way,
    and the numbers' magnitudes add up to CANCELLATION_LIMIT at most where sums are made in float32.
    """
    size = max(float(x.double().abs().max()) for x in [wanted, *inputs])
    bound = (len(inputs) + 1) * HALF_EPS * CANCELLATION_LIMIT * size
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=bound)


def adversarial(experts: int) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Tensors that methods stumble over, by what is odd about them: a base, and experts near it."""
    generator = torch.Generator().manual_seed(experts)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def near(base: torch.Tensor, distance: float = 0.3) -> list[torch.Tensor]:
        return [base + distance * random(*base.shape) * base.abs().max() for _ in range(experts)]

    base, other = random(13, 9), random(13, 9)
    step, coarse = random(13, 9), random(40, 30)
    vector, wide, kernel = random(77), random(9, 40), random(4, 3, 5, 2)
    long = random(601, 877)  # two chunks and a rest, the edges of chunks within rows
    return {
        "random": (base, near(base)),
        "close": (base, near(base, 1e-3)),
        "zeros": (torch.zeros(6, 5), [torch.zeros(6, 5) for _ in range(experts)]),
        "one is zero": (base, [torch.zeros(13, 9), *near(base)[1:]]),
        "one stayed": (base, [base.clone(), *near(base)[1:]]),
        "equal": (base, [other.clone() for _ in range(experts)]),
        "opposite": (torch.zeros(13, 9), [other * (-1) ** i for i in range(experts)]),
        "opposite deltas": (base, [base + step * (-1) ** i for i in range(experts)]),
        "one element": (random(1), [random(1) for _ in range(experts)]),
        "a number": (random(), [random() for _ in range(experts)]),
        "huge": (base * 1e30, [e * 1e30 for e in near(base)]),
        "tiny": (base * 1e-18, [e * 1e-18 for e in near(base)]),
        "bf16": (coarse.bfloat16(), [e.bfloat16() for e in near(coarse, 0.02)]),
        "vector": (vector, near(vector)),
        "wide": (wide, near(wide)),
        "4-D": (kernel, near(kernel)),
        "chunks": (long, near(long, 0.01)),
    }


def product(cases: Iterable[str], *options: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every case with every choice of options; those of many chunks, which take long, with the last choice alone."""
    choices = list(itertools.product(*options))
    return [(case, *c) for case in cases for c in (choices[-1:] if "chunks" in case else choices)]


def doubles(case: tuple[torch.Tensor, list[torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A case of `adversarial` in float64."""
    base, experts = case
    return base.double(), [expert.double() for expert in experts]


def slices_of(tensor: torch.Tensor, per: str) -> torch.Tensor:
    """The vectors that a parameter ``per`` treats separately, as (count, size)."""
    if per == "tensor" or tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if per == "row" else tensor.reshape(len(tensor), -1).T


def unsliced(rows: torch.Tensor, shape: Sequence[int], per: str) -> torch.Tensor:
    """The tensor that `slices_of` was given."""
    if per == "column" and len(shape) > 1:
        rows = rows.T
    return rows.reshape(tuple(shape))
