"""Methods that take task vectors apart into singular directions, and WUDI, which needs the same products.

No tensor is decomposed whole: the right singular vectors of τ are the eigenvectors of τᵀτ, which is summed up from
blocks of rows, and the left ones are τ V Σ⁻¹. What is added to the base are then products with matrices of the narrow
side, made a few rows at a time: an embedding costs what its parameters cost, and is never in memory. All of it is in
float64, since squares lose half of the digits. Singular values below 1e-6 of the largest are rounding, and their
vectors arbitrary: the released codes merge these like any others, here they are left out. LoRA experts have many.

Tensors that are no matrices are merged as in the released codes: θ0 + λ mean τ_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch
from torch.nn.functional import pad

from hf_fusion.merging.engine.tensors import CHUNK, Chunk, Merged, Tensors, compute_device
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.methods.linear import task_arithmetic
from hf_fusion.schema import EachNumber, Range

__all__ = ["iso_c", "iso_cts", "tsv_m", "wudi"]

Result = Merged | torch.Tensor
Moves = Callable[[torch.Tensor], torch.Tensor]
"""What is added to the base: from rows of the K differences to as many rows, (K, rows, n) -> (rows, n)."""

_WIDEST = 1 << 15
"""Columns of which a square matrix may be held."""


@merge_method("TSV-Merge", base="needed", needs="whole", paper="2412.00081", matrices_only=True)
def tsv_m(tensors: Tensors, *, scaling: Annotated[float, Range()] = 1.0, weight: EachNumber = (1.0,)) -> Result:
    """θ0 + λ U⊥ Σ V⊥ᵀ (TSV-Merge, arXiv 2412.00081, algorithm 1).

    Of each w_i τ_i = U_i Σ_i V_iᵀ the first ⌊r / K⌋ triplets are kept, r being the smaller side; U = [U_1 … U_K] and V
    are replaced by the nearest orthogonal matrices U⊥ = U (UᵀU)^-½ and V⊥. Where U has no full rank (experts that are
    equal), directions that it lacks stay out; the released code completes them by whatever its SVD returns. Matrices
    with fewer rows or columns than there are experts, of which that code keeps nothing, are averaged.

    Args:
        tensors: a base and one expert or more.
        scaling: λ; fusion_bench's single alpha.
        weight: w_i; fusion_bench's list of alphas.
    """
    count = len(tensors)
    if not _is_matrix(tensors) or min(tensors.shape) < count:
        return _mean(tensors, scaling, weight)
    deltas = _Deltas(tensors)
    share = deltas.width // count
    found = [_singular(gram, share) for gram in deltas.grams()]
    values = torch.cat([w * sigma for w, (sigma, _) in zip(weight, found, strict=True)])
    rights = torch.cat([v for _, v in found], 1)
    own = torch.stack([v * _inverse(sigma) for sigma, v in found])
    return deltas.merged(_orthogonal(deltas, own, None, scaling * values, rights))


@merge_method("Iso-C", base="needed", needs="whole", paper="2502.04959", matrices_only=True)
def iso_c(tensors: Tensors, *, scaling: Annotated[float, Range()] = 1.0) -> Result:
    """θ0 + λ σ̄ U Vᵀ, where Σ τ_i = U Σ Vᵀ and σ̄ is the mean of its singular values (Iso-C, arXiv 2502.04959).

    Args:
        tensors: a base and one expert or more.
        scaling: λ.
    """
    if not _is_matrix(tensors):
        return _mean(tensors, scaling)
    deltas = _Deltas(tensors, summed=True)
    sigma, v = _singular(deltas.grams()[0], deltas.width)
    factor = scaling * sigma.mean() * (v * _inverse(sigma)) @ v.T  # U Vᵀ = (Σ τ_i) V Σ⁻¹ Vᵀ
    return deltas.merged(lambda block: block[0] @ factor)


@merge_method("Iso-CTS", base="needed", needs="whole", paper="2502.04959", matrices_only=True)
def iso_cts(
    tensors: Tensors,
    *,
    scaling: Annotated[float, Range()] = 1.0,
    common_space_fraction: Annotated[float, Range(0, 1)] = 0.8,
) -> Result:
    """θ0 + λ σ̄ U⊥ V⊥ᵀ of common and task-specific directions (Iso-CTS, arXiv 2502.04959, algorithm 2).

    The common ones are the first k triplets of Σ τ_i; those of task i the first (r - k) / K triplets of
    τ_i - U_k U_kᵀ τ_i. They are made orthogonal as in `tsv_m`, and σ̄ is the mean of their singular values.

    Args:
        tensors: a base and one expert or more.
        scaling: λ.
        common_space_fraction: k / r; rounded so that K divides r - k.
    """
    if not _is_matrix(tensors):
        return _mean(tensors, scaling)
    count, deltas = len(tensors), _Deltas(tensors)
    share = round((deltas.width - int(deltas.width * common_space_fraction)) / count)
    share = min(share, deltas.width // count)
    common = deltas.width - share * count
    grams = deltas.grams()
    products = deltas.grams("sum" if deltas.is_turned else "cross")
    sigma, v = _singular(products.sum(0), common)
    z = v * _inverse(sigma)  # U_k = (Σ τ_j) z
    left = torch.eye(deltas.width, dtype=v.dtype, device=v.device) - v @ v.T if deltas.is_turned else None
    values, rights, own, shared = [], [], [], []
    for index, gram in enumerate(grams):
        if left is not None:  # U_k are the right vectors of what is turned: τ_i U_k U_kᵀ is taken off
            sigma_i, v_i = _singular(left @ gram @ left, share, of=gram)
            own.append(left @ v_i * _inverse(sigma_i))
            shared.append(torch.zeros_like(v_i))
        else:
            seen = z.T @ products[index]  # U_kᵀ τ_i
            sigma_i, v_i = _singular(gram - seen.T @ seen, share, of=gram)
            own.append(v_i * _inverse(sigma_i))
            shared.append(-z @ (seen @ own[-1]))
        values.append(sigma_i)
        rights.append(v_i)
    mean = scaling * torch.cat([*values, sigma]).mean().expand(deltas.width)
    lefts, all_rights = torch.cat([*shared, z], 1), torch.cat([*rights, v], 1)
    return deltas.merged(_orthogonal(deltas, torch.stack(own), lefts, mean, all_rights))


@merge_method("WUDI", base="needed", needs="whole", paper="2503.08099", matrices_only=True)
def wudi(
    tensors: Tensors,
    *,
    scaling: Annotated[float, Range()] = 1.0,
    steps: Annotated[int, Range(0)] = 300,
    learning_rate: Annotated[float, Range(0)] = 1e-5,
) -> Result:
    """θ0 + λ τ with the τ that Adam finds for Σ ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖² from Σ τ_i on (WUDI, arXiv 2503.08099).

    The loss's gradient is 2 (τ Σ G_i - Σ τ_i G_i) with G_i = τ_iᵀτ_i / ‖τ_i‖²: rows of τ do not depend on each other,
    high matrices are optimized block by block, with one product a step. Adam is the released code's, β 0.9 and 0.999,
    ε 1e-8; in float64, since Adam takes steps of full size along what rounding leaves of a gradient that is 0.
    Experts that left a matrix as it was do not count (the released code divides by their norm).

    Args:
        tensors: a base and one expert or more.
        scaling: λ; 1 in the released code.
        steps: of Adam; 300 in the paper.
        learning_rate: of Adam.
    """
    if not _is_matrix(tensors):
        return _mean(tensors, scaling)
    deltas = _Deltas(tensors, turn=False)
    norms = tensors.gram().diagonal()
    shares = torch.where(norms > 0, 1 / norms, 0.0)[:, None, None].to(deltas.device)
    is_wide = deltas.rows < deltas.width
    if is_wide:  # G_i have more elements than τ_i: only their sum is kept
        whole = tensors.whole_deltas().to(deltas.device).double()
        scaled = whole * shares.sqrt()
        total = scaled.view(-1, deltas.width).T @ scaled.view(-1, deltas.width)
    else:
        grams = deltas.grams() * shares
        total = grams.sum(0)

    def optimized(block: torch.Tensor) -> torch.Tensor:
        """(K, rows, columns) -> (rows, columns)."""
        wanted = torch.bmm(torch.bmm(block, scaled.mT), scaled) if is_wide else torch.bmm(block, grams)
        wanted, tau = wanted.sum(0), block.sum(0)
        mean, square, size = torch.zeros_like(tau), torch.zeros_like(tau), torch.empty_like(tau)
        for step in range(1, steps + 1):
            gradient = torch.addmm(wanted, tau, total, beta=-2, alpha=2)
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            torch.sqrt(square, out=size).mul_((1 - 0.999**step) ** -0.5).add_(1e-8)
            tau.addcdiv_(mean, size, value=-learning_rate / (1 - 0.9**step))
        return tau.mul_(scaling)

    if is_wide:  # all rows at once: each step would read the sum, which no cache holds, for every few of them
        return tensors.whole(tensors.required_base).add_(optimized(whole).float().cpu())
    return lambda chunk: deltas.moved(chunk, optimized)


class _Deltas:
    """The experts' differences from the base as matrices that are not wider than high, a block of rows at a time.

    Args:
        tensors: whose.
        summed: takes their sum for the only one.
        turn: turns wide ones on their side, which takes all of them into memory.

    Attributes:
        device: where its blocks are.
        is_turned: whether rows are the tensor's columns.
        rows: how many.
        width: how many columns, n below.
    """

    def __init__(self, tensors: Tensors, summed: bool = False, turn: bool = True) -> None:
        self.tensors, self._summed, self.device = tensors, summed, compute_device()
        self.rows, self.width = tensors.shape
        self.is_turned = turn and self.rows < self.width
        if self.is_turned:
            self.rows, self.width = self.width, self.rows
            self._turned = tensors.whole_deltas().mT
        if self.width > _WIDEST:
            raise ValueError(f"{tensors.name} has {self.width} rows and columns or more: too many for this method")

    def block(self, first: int, last: int) -> torch.Tensor:
        """Some rows of each: (K, last - first, n) in float64."""
        if self.is_turned:
            block = self._turned[:, first:last].to(self.device).double()
        else:
            start, size = first * self.width, (last - first) * self.width
            values, base = torch.empty(len(self.tensors), size), torch.empty(size)
            self.tensors.required_base.read(start, base)
            for own, reader in zip(values, self.tensors.experts, strict=True):
                reader.read(start, own)
            block = values.sub_(base).to(self.device).double().view(len(self.tensors), last - first, self.width)
        return block.sum(0, keepdim=True) if self._summed else block

    def blocks(self) -> Iterator[torch.Tensor]:
        """All rows, in order."""
        size = max(1, 4 * CHUNK // self.width)
        for first in range(0, self.rows, size):
            yield self.block(first, min(self.rows, first + size))

    def grams(self, of: Literal["own", "cross", "sum"] = "own") -> torch.Tensor:
        """Products (K, n, n): each one's "own", τ_iᵀτ_i, or "cross"es, (Σ τ_j)ᵀτ_i; (1, n, n) of their "sum"."""
        total = torch.zeros(())
        for block in self.blocks():
            left = block if of == "own" else block.sum(0, keepdim=True)
            right = left if of == "sum" else block
            total = total + torch.bmm(left.mT.expand(len(right), -1, -1), right)
        return total

    def merged(self, moves: Moves) -> Result:
        """θ0 and what is added to it."""
        if not self.is_turned:
            return lambda chunk: self.moved(chunk, moves)
        merged = self.tensors.whole(self.tensors.required_base)
        first = 0
        for block in self.blocks():
            merged[:, first : first + block.shape[1]] += moves(block).T.cpu()
            first += block.shape[1]
        return merged

    def moved(self, chunk: Chunk, moves: Moves) -> torch.Tensor:
        """θ0 and what is added to it, of a chunk, made from the rows that it lies in."""
        first, last = chunk.start // self.width, -(-(chunk.start + chunk.size) // self.width)
        moved = moves(self.block(first, last)).reshape(-1)
        return chunk.base + moved[chunk.start - first * self.width :][: chunk.size].float().cpu()


def _is_matrix(tensors: Tensors) -> bool:
    return len(tensors.shape) == 2 and tensors.numel > 0


def _mean(tensors: Tensors, scaling: float, weight: EachNumber = (1.0,)) -> Merged:
    """θ0 + λ mean w_i τ_i."""
    count = len(tensors)
    return task_arithmetic(tensors, scaling=scaling / count, weight=list(weight) * (count // len(weight)))


def _singular(gram: torch.Tensor, most: int, of: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first singular values of a matrix and its right singular vectors; both 0 where the value is only rounding.

    Args:
        gram: its product τᵀτ, (n, n) float64.
        most: how many.
        of: what `gram` was made from by subtraction, whose rounding it has.

    Returns:
        (most,) and (n, most).
    """
    squares, vectors = _eigenvectors(gram)
    squares, vectors = squares.flip(0)[:most], vectors.flip(1)[:, :most]
    is_real = squares > 1e-12 * torch.linalg.matrix_norm(gram if of is None else of)
    return torch.where(is_real, squares, 0.0).sqrt(), vectors * is_real


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and vectors; NaN for what is not finite, for the engine to name the expert."""
    if not bool(gram.isfinite().all()):
        return torch.full_like(gram[0], torch.nan), torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(values > 0, 1 / values, 0.0)


def _orthogonal(
    deltas: _Deltas, own: torch.Tensor, shared: torch.Tensor | None, values: torch.Tensor, rights: torch.Tensor
) -> Moves:
    """Makes U⊥ diag(values) V⊥ᵀ, with the nearest orthogonal matrices to U and to V.

    Args:
        deltas: τ_i.
        own: U = [τ_1 own_1 … τ_K own_K 0] + (Σ τ_i) shared: (K, n, c).
        shared: (n, R), or None for 0.
        values: (R,).
        rights: V: (n, R).
    """

    def lefts(block: torch.Tensor) -> torch.Tensor:
        """Rows of U: (K, rows, n) -> (rows, R)."""
        rows = torch.bmm(block, own).transpose(0, 1).reshape(block.shape[1], own.shape[0] * own.shape[2])
        return rows if shared is None else pad(rows, (0, len(values) - rows.shape[1])) + block.sum(0) @ shared

    total = values.new_zeros(len(values), len(values))
    for block in deltas.blocks():
        rows = lefts(block)
        total += rows.T @ rows
    inner = (_inverse_root(total) * values) @ _inverse_root(rights.T @ rights) @ rights.T  # (R, n)
    return lambda block: lefts(block) @ inner


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """(AᵀA)^-½ on the directions that A has."""
    squares, vectors = _eigenvectors(gram)
    real = squares > 1e-10 * squares[-1:]
    return (vectors * torch.where(real, squares, 1.0).rsqrt() * real) @ vectors.T
