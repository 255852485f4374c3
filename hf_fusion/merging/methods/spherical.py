"""SLERP, NuSLERP, Multi-SLERP, Karcher mean and NearSwap: interpolation along great circles instead of lines.

Each result is a weighted sum of the inputs, with weights that follow from their inner products: tensors are read in
chunks, twice.
"""

from __future__ import annotations

from typing import Annotated

import torch

from hf_fusion.merging.engine.grouped_sums import combination, grams
from hf_fusion.merging.engine.tensors import Chunk, Combination, Merged, Tensors
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.schema import EachNumber, Per, Range

__all__ = ["karcher", "multislerp", "nearswap", "nuslerp", "slerp"]


@merge_method(
    "SLERP",
    base="",
    needs="norms",
    experts=(2, 2),
    paper="https://doi.org/10.1145/325165.325242",
    mergekit={"t": mk.MergekitParameter("t")},
)
def slerp(tensors: Tensors, *, t: Annotated[float, Range(0, 1)] = 0.5) -> Merged:
    """sin((1 - t) α) / sin α θ1 + sin(t α) / sin α θ2, α being the angle between the two (Shoemake, 1985).

    For nearly collinear tensors, |cos α| > 0.9995, it is (1 - t) θ1 + t θ2: fine-tunes of one base mostly are, and
    between opposite directions no great circle is distinguished. A tensor with norm below 1e-8 counts as orthogonal to
    any other: between 0 and θ2 lies sin(t π/2) θ2. As in mergekit, whose ``base_model`` is the first expert, and in
    fusion_bench.

    Args:
        tensors: two experts.
        t: position between the first (0) and the second (1).
    """
    cosine = _cosines(grams(tensors, False, "tensor"))
    return combination("tensor", torch.zeros(1), _arc_weights(cosine, cosine.abs() > 0.9995, t))


@merge_method(
    "NuSLERP",
    base="optional",
    needs="norms",
    experts=(2, 2),
    paper="https://doi.org/10.1145/325165.325242",
    mergekit={
        **mk.WEIGHT,
        "nuslerp_flatten": mk.flag("per", True, on="tensor", off="row"),
        "nuslerp_row_wise": mk.flag("per", False, on="column", off="row"),
    },
)
def nuslerp(tensors: Tensors, *, weight: EachNumber = (1.0,), per: Per = "tensor") -> Merged:
    """SLERP of two experts, or of their task vectors if there is a base, with t = w_2 / (w_1 + w_2).

    As mergekit's ``nuslerp``: it is linear only if the angle is indistinguishable from 0 or 180°, sin α < 1e-3
    (mergekit: 1e-8, below the precision of float32, which amplifies rounding errors near 180°). A norm below 1e-8
    counts as orthogonal, as in `slerp`.

    Args:
        tensors: two experts, and a base or none.
        weight: w_i; t is 0.5 if they sum to 0.
        per: one angle for the whole tensor, per row, or per column. mergekit's ``nuslerp_flatten: false``
            is "row", and "column" with ``nuslerp_row_wise: true``.
    """
    if len(tensors) == 1:  # the other lacks this tensor
        return Combination(0.0, [1.0])
    has_base, total = tensors.base is not None, sum(weight)
    cosine = _cosines(grams(tensors, has_base, per))
    t = weight[1] / total if abs(total) > 1e-6 else 0.5
    weights = _arc_weights(cosine, (1 - cosine * cosine).sqrt() < 1e-3, t)
    return combination(per, 1 - weights.sum(0) if has_base else torch.zeros_like(cosine), weights)


@merge_method(
    "Multi-SLERP",
    base="optional",
    needs="norms",
    experts=(2, None),
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    mergekit=mk.WEIGHT | {"normalize_weights": mk.flag("normalize", True)},
)
def multislerp(tensors: Tensors, *, weight: EachNumber = (1.0,), normalize: bool = True) -> Combination:
    """(Σ w_i ‖v_i‖) m / ‖m‖ with m = Σ w_i v_i / ‖v_i‖: the weighted mean direction, with the weighted mean norm.

    v_i are the experts, or their task vectors if there is a base, to which the result is then added. Equivalent to
    mergekit's ``multislerp``, which takes one more step in the tangent space at m / ‖m‖: that step,
    Σ w_i (u_i - ⟨u_i, m⟩ m / ‖m‖²) with u_i = v_i / ‖v_i‖, is m - m = 0. A v_i of 0 has no direction; if all are 0,
    nothing is added (mergekit raises an error for more than two).
    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

    Args:
        tensors: two experts or more, and a base or none.
        weight: w_i.
        normalize: divide the weights by their sum; mergekit's ``normalize_weights``.

    Raises:
        ValueError: the weights sum to 0 with normalize, or more than two directions cancel (with two, the result is
            Σ w_i v_i, as in mergekit).
    """
    has_base, total = tensors.base is not None, sum(weight)
    if normalize and abs(total) < 1e-8:
        raise ValueError(f"the weights of {tensors.name} sum to 0 (use normalize: false)")
    weights = torch.tensor(weight, dtype=torch.float64) / (total if normalize else 1.0)
    gram = tensors.gram(deltas=has_base)
    lengths = gram.diagonal().sqrt()
    shares = torch.where(lengths > 0, weights / lengths, 0.0)  # m = Σ shares_i v_i
    mean = _norm(shares, gram)
    if mean > 1e-3 * weights.abs().sum() or mean.isnan():  # below, the direction is a rounding error
        numbers = shares * (weights @ lengths) / mean
    elif len(tensors) == 2 or not bool(lengths.any()):
        numbers = weights
    else:
        raise ValueError(f"the directions of {tensors.name} cancel with these weights: choose others")
    return Combination(1.0 - float(numbers.sum()) if has_base else 0.0, numbers.tolist())


@merge_method(
    "Karcher mean",
    base="",
    needs="norms",
    experts=(2, None),
    paper="https://doi.org/10.1002/cpa.3160300502",
    mergekit={"max_iter": mk.MergekitParameter("max_iter", 10, int), "tol": mk.MergekitParameter("tol", 1e-05)},
)
def karcher(
    tensors: Tensors, *, max_iter: Annotated[int, Range(0)] = 10, tol: Annotated[float, Range(0)] = 1e-5
) -> Combination:
    """The direction with the least squared angles to all experts' directions, with their mean norm (Karcher mean).

    Starting from the normalized mean u of the directions u_i: T = mean of α_i / sin α_i (u_i - cos α_i u), in the
    tangent space at u, then u ← cos ‖T‖ u + sin ‖T‖ T / ‖T‖, until ‖T‖ < tol (Karcher, 1977). As in mergekit: experts
    with a norm below tol have no direction, but count for the mean norm; if all are, the result is 0. If directions
    cancel (their mean has a norm below tol), it starts at the first expert's direction, and stays there if the others
    are opposite to it: all points between are equally near.

    Args:
        tensors: two experts or more.
        max_iter: maximum number of steps.
        tol: convergence threshold for the step, in radians.
    """
    gram = tensors.gram(deltas=False)
    lengths = gram.diagonal().sqrt()
    seen = lengths > tol
    if not bool(seen.any()):
        return Combination(0.0, [0.0] * len(tensors))
    cosines = (gram[seen][:, seen] / (lengths[seen, None] * lengths[seen])).clamp(-1, 1)
    # points and steps are stored as coefficients of the u_i
    u = torch.ones(len(cosines), dtype=torch.float64) / len(cosines)
    if _norm(u, cosines) < tol:
        u = torch.zeros_like(u)
        u[0] = 1
    for _ in range(max_iter):
        u = u / _norm(u, cosines)
        cosine = (cosines @ u).clamp(-1, 1)
        angle, sine = cosine.arccos(), (1 - cosine * cosine).sqrt()
        # at the antipode the direction is undefined: such an expert is ignored
        pulls = (angle >= tol) & ((sine > 1e-3) | (cosine > 0))
        stretch = torch.where(pulls, angle / sine, 0.0) / len(cosines)
        step = stretch - (stretch @ cosine) * u
        size = _norm(step, cosines)
        if size < tol:
            break
        u = size.cos() * u + size.sin() / size * step
    numbers = torch.zeros_like(lengths)
    numbers[seen] = lengths.mean() * u / _norm(u, cosines) / lengths[seen]
    return Combination(0.0, numbers.tolist())


@merge_method(
    "NearSwap",
    base="needed",
    needs="chunks",
    experts=(1, 1),
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    mergekit={"t": mk.MergekitParameter("t")},
)
def nearswap(tensors: Tensors, *, t: Annotated[float, Range(0)] = 1e-3) -> Merged:
    """θ0 + min(t, |τ|) sign τ: each value moves to the expert's, by at most t.

    The interpolation with weight min(1, t / |τ|) of mergekit's ``nearswap`` and of
    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.

    Args:
        tensors: a base and one expert.
        t: maximum change of a value.
    """

    def merged(chunk: Chunk) -> torch.Tensor:
        delta = chunk.delta(0)
        near = delta.clamp(-t, t).add_(chunk.base)
        return near.add_(delta.mul_(0))  # propagates Inf and NaN

    return merged


def _cosines(gram: torch.Tensor) -> torch.Tensor:
    """Cosines between the first two inputs, (G, K, K) -> (G,); norms below 1e-8 count as 1, which gives 0."""
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = torch.where(lengths > 1e-8, lengths, 1.0)
    return (gram[:, 0, 1] / (lengths[:, 0] * lengths[:, 1])).clamp(-1, 1)


def _arc_weights(cosine: torch.Tensor, is_line: torch.Tensor, t: float) -> torch.Tensor:
    """The weights of two inputs at position t of the arc, from the cosines between them: (G,) -> (2, G)."""
    shares = torch.tensor([[1 - t], [t]], dtype=torch.float64)
    angle = cosine.arccos()
    return torch.where(is_line, shares, (shares * angle).sin() / angle.sin())


def _norm(weights: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The norm of a weighted sum of vectors, from the weights and the Gram matrix of the vectors."""
    return (weights @ gram @ weights).clamp(min=0).sqrt()
