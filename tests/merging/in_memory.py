"""A merging method run on tensors in memory, through the same readers, parameters and chunks as on files."""

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
    """Tensors that methods stumble over, by what is odd about them: a base, and experts relative_path to it."""
    generator = torch.Generator().manual_seed(experts)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def relative_path(base: torch.Tensor, distance: float = 0.3) -> list[torch.Tensor]:
        return [base + distance * random(*base.shape) * base.abs().max() for _ in range(experts)]

    base, other = random(13, 9), random(13, 9)
    step, coarse = random(13, 9), random(40, 30)
    vector, wide, kernel = random(77), random(9, 40), random(4, 3, 5, 2)
    long = random(601, 877)  # two chunks and a rest, the edges of chunks within rows
    return {
        "random": (base, relative_path(base)),
        "close": (base, relative_path(base, 1e-3)),
        "zeros": (torch.zeros(6, 5), [torch.zeros(6, 5) for _ in range(experts)]),
        "one is zero": (base, [torch.zeros(13, 9), *relative_path(base)[1:]]),
        "one stayed": (base, [base.clone(), *relative_path(base)[1:]]),
        "equal": (base, [other.clone() for _ in range(experts)]),
        "opposite": (torch.zeros(13, 9), [other * (-1) ** i for i in range(experts)]),
        "opposite deltas": (base, [base + step * (-1) ** i for i in range(experts)]),
        "one element": (random(1), [random(1) for _ in range(experts)]),
        "a number": (random(), [random() for _ in range(experts)]),
        "huge": (base * 1e30, [e * 1e30 for e in relative_path(base)]),
        "tiny": (base * 1e-18, [e * 1e-18 for e in relative_path(base)]),
        "bf16": (coarse.bfloat16(), [e.bfloat16() for e in relative_path(coarse, 0.02)]),
        "vector": (vector, relative_path(vector)),
        "wide": (wide, relative_path(wide)),
        "4-D": (kernel, relative_path(kernel)),
        "chunks": (long, relative_path(long, 0.01)),
    }


def product(cases: Iterable[str], *options: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every case with every choice of options; those of many chunks, which take long, with the last choice alone."""
    choices = list(itertools.product(*options))
    return [(case, *c) for case in cases for c in (choices[-1:] if "chunks" in case else choices)]
