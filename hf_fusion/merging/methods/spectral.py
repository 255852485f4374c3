"""TSV-Merge, Iso-C and Iso-CTS, which decompose task vectors by their singular values; and WUDI, on the same products.

No tensor is decomposed directly: the right singular vectors of τ are the eigenvectors of τᵀτ, which is summed over
blocks of rows, and the left ones are τ V Σ⁻¹. The update is then computed a few rows at a time, as products with square
matrices of the smaller dimension, so that large embeddings are never in memory. Computations are in float64, since
squaring halves the precision. Singular values below 1e-6 of the largest are rounding errors with arbitrary vectors: the
released codes merge them, here they are dropped. LoRA experts have many.

Tensors that are not matrices are merged as in the released codes: θ0 + λ mean τ_i.
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
RowUpdate = Callable[[torch.Tensor], torch.Tensor]
"""Computes rows of the update from rows of the K task vectors: (K, rows, n) -> (rows, n)."""

_MAX_WIDTH = 1 << 15
"""Maximum size of square matrices in memory."""


@merge_method("TSV-Merge", base="needed", needs="whole", paper="2412.00081", matrices_only=True)
def tsv_m(tensors: Tensors, *, scaling: Annotated[float, Range()] = 1.0, weight: EachNumber = (1.0,)) -> Result:
    """θ0 + λ U⊥ Σ V⊥ᵀ (TSV-Merge, arXiv 2412.00081, algorithm 1).

    The first ⌊r / K⌋ singular triplets of each w_i τ_i = U_i Σ_i V_iᵀ are kept, where r is the smaller dimension;
    U = [U_1 … U_K] and V are replaced by the nearest orthogonal matrices U⊥ = U (UᵀU)^-½ and V⊥. If U is rank-deficient
    (equal experts), missing directions are left out; the released code completes them arbitrarily, by its SVD. Matrices
    with fewer rows or columns than experts, of which that code keeps nothing, are averaged.

    Args:
        tensors: a base and one expert or more.
        scaling: λ; fusion_bench's single alpha.
        weight: w_i; fusion_bench's list of alphas.
    """
    count = len(tensors)
    if not _is_matrix(tensors) or min(tensors.shape) < count:
        return _mean(tensors, scaling, weight)
    deltas = _TaskVectors(tensors)
    share = deltas.width // count
    found = [_right_singular(gram, share) for gram in deltas.grams()]
    values = torch.cat([w * sigma for w, (sigma, _) in zip(weight, found, strict=True)])
    rights = torch.cat([v for _, v in found], 1)
    lefts = torch.stack([v * _inverse(sigma) for sigma, v in found])
    return deltas.merge(_orthogonal_update(deltas, lefts, None, scaling * values, rights))


@merge_method("Iso-C", base="needed", needs="whole", paper="2502.04959", matrices_only=True)
def iso_c(tensors: Tensors, *, scaling: Annotated[float, Range()] = 1.0) -> Result:
    """θ0 + λ σ̄ U Vᵀ, where Σ τ_i = U Σ Vᵀ and σ̄ is the mean of its singular values (Iso-C, arXiv 2502.04959).

    Args:
        tensors: a base and one expert or more.
        scaling: λ.
    """
    if not _is_matrix(tensors):
        return _mean(tensors, scaling)
    deltas = _TaskVectors(tensors, summed=True)
    sigma, v = _right_singular(deltas.grams()[0], deltas.width)
    factor = scaling * sigma.mean() * (v * _inverse(sigma)) @ v.T  # U Vᵀ = (Σ τ_i) V Σ⁻¹ Vᵀ
    return deltas.merge(lambda block: block[0] @ factor)


@merge_method("Iso-CTS", base="needed", needs="whole", paper="2502.04959", matrices_only=True)
def iso_cts(
    tensors: Tensors,
    *,
    scaling: Annotated[float, Range()] = 1.0,
    common_space_fraction: Annotated[float, Range(0, 1)] = 0.8,
) -> Result:
    """θ0 + λ σ̄ U⊥ V⊥ᵀ of common and task-specific directions (Iso-CTS, arXiv 2502.04959, algorithm 2).

    Common directions are the first k singular triplets of Σ τ_i; those of task i are the first (r - k) / K triplets of
    τ_i - U_k U_kᵀ τ_i. They are orthogonalised as in `tsv_m`, and σ̄ is the mean of their singular values.

    Args:
        tensors: a base and one expert or more.
        scaling: λ.
        common_space_fraction: k / r; rounded so that K divides r - k.
    """
    if not _is_matrix(tensors):
        return _mean(tensors, scaling)
    count, deltas = len(tensors), _TaskVectors(tensors)
    share = round((deltas.width - int(deltas.width * common_space_fraction)) / count)
    share = min(share, deltas.width // count)
    common = deltas.width - share * count
    grams = deltas.grams()
    products = deltas.grams("sum" if deltas.is_transposed else "cross")
    sigma, v = _right_singular(products.sum(0), common)
    z = v * _inverse(sigma)  # U_k = (Σ τ_j) z
    left = torch.eye(deltas.width, dtype=v.dtype, device=v.device) - v @ v.T if deltas.is_transposed else None
    values, rights, specific, shared = [], [], [], []
    for index, gram in enumerate(grams):
        if left is not None:  # transposed: U_k are right singular vectors, and τ_i U_k U_kᵀ is subtracted
            sigma_i, v_i = _right_singular(left @ gram @ left, share, reference=gram)
            specific.append(left @ v_i * _inverse(sigma_i))
            shared.append(torch.zeros_like(v_i))
        else:
            projected = z.T @ products[index]  # U_kᵀ τ_i
            sigma_i, v_i = _right_singular(gram - projected.T @ projected, share, reference=gram)
            specific.append(v_i * _inverse(sigma_i))
            shared.append(-z @ (projected @ specific[-1]))
        values.append(sigma_i)
        rights.append(v_i)
    mean = scaling * torch.cat([*values, sigma]).mean().expand(deltas.width)
    lefts, all_rights = torch.cat([*shared, z], 1), torch.cat([*rights, v], 1)
    return deltas.merge(_orthogonal_update(deltas, torch.stack(specific), lefts, mean, all_rights))


@merge_method("WUDI", base="needed", needs="whole", paper="2503.08099", matrices_only=True)
def wudi(
    tensors: Tensors,
    *,
    scaling: Annotated[float, Range()] = 1.0,
    steps: Annotated[int, Range(0)] = 300,
    learning_rate: Annotated[float, Range(0)] = 1e-5,
) -> Result:
    """θ0 + λ τ, where Adam minimises Σ ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖² over τ, from Σ τ_i (WUDI, arXiv 2503.08099).

    The gradient is 2 (τ Σ G_i - Σ τ_i G_i) with G_i = τ_iᵀτ_i / ‖τ_i‖²: rows of τ are independent, so tall matrices are
    optimised in blocks of rows, with one product per step. Adam as in the released code, β 0.9 and 0.999, ε 1e-8; in
    float64, since Adam takes full-size steps along the rounding errors of a zero gradient. Experts with a zero task
    vector are ignored (the released code divides by their norm).

    Args:
        tensors: a base and one expert or more.
        scaling: λ; 1 in the released code.
        steps: of Adam; 300 in the paper.
        learning_rate: of Adam.
    """
    if not _is_matrix(tensors):
        return _mean(tensors, scaling)
    deltas = _TaskVectors(tensors, transpose=False)
    norms = tensors.gram().diagonal()
    shares = torch.where(norms > 0, 1 / norms, 0.0)[:, None, None].to(deltas.device)
    is_wide = deltas.rows < deltas.width
    if is_wide:  # the G_i have more elements than the τ_i: only their sum is stored
        whole = tensors.whole_deltas().to(deltas.device).double()
        scaled = whole * shares.sqrt()
        total = scaled.view(-1, deltas.width).T @ scaled.view(-1, deltas.width)
    else:
        grams = deltas.grams() * shares
        total = grams.sum(0)

    def optimize(block: torch.Tensor) -> torch.Tensor:
        """(K, rows, columns) -> (rows, columns)."""
        target = torch.bmm(torch.bmm(block, scaled.mT), scaled) if is_wide else torch.bmm(block, grams)
        target, tau = target.sum(0), block.sum(0)
        mean, square, size = torch.zeros_like(tau), torch.zeros_like(tau), torch.empty_like(tau)
        for step in range(1, steps + 1):
            gradient = torch.addmm(target, tau, total, beta=-2, alpha=2)
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            torch.sqrt(square, out=size).mul_((1 - 0.999**step) ** -0.5).add_(1e-8)
            tau.addcdiv_(mean, size, value=-learning_rate / (1 - 0.9**step))
        return tau.mul_(scaling)

    if is_wide:  # all rows at once: in blocks, every step would read the large sum again for each block
        return tensors.whole(tensors.required_base).add_(optimize(whole).float().cpu())
    return lambda chunk: deltas.update_chunk(chunk, optimize)


class _TaskVectors:
    """Task vectors as matrices that are at least as tall as wide, in blocks of rows.

    Args:
        tensors: the inputs.
        summed: use the sum of the task vectors as the only one.
        transpose: transpose wide matrices, which reads all of them into memory.

    Attributes:
        device: of the blocks.
        is_transposed: whether rows are the tensor's columns.
        rows: number of rows.
        width: number of columns, n below.
    """

    def __init__(self, tensors: Tensors, summed: bool = False, transpose: bool = True) -> None:
        self.tensors, self._summed, self.device = tensors, summed, compute_device()
        self.rows, self.width = tensors.shape
        self.is_transposed = transpose and self.rows < self.width
        if self.is_transposed:
            self.rows, self.width = self.width, self.rows
            self._transposed = tensors.whole_deltas().mT
        if self.width > _MAX_WIDTH:
            raise ValueError(
                f"{tensors.name} has at least {self.width} rows and columns; this method takes up to {_MAX_WIDTH}"
            )

    def block(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of each, (K, last - first, n) float64."""
        if self.is_transposed:
            block = self._transposed[:, first:last].to(self.device).double()
        else:
            start, size = first * self.width, (last - first) * self.width
            values, base = torch.empty(len(self.tensors), size), torch.empty(size)
            self.tensors.required_base.read(start, base)
            for row, reader in zip(values, self.tensors.experts, strict=True):
                reader.read(start, row)
            block = values.sub_(base).to(self.device).double().view(len(self.tensors), last - first, self.width)
        return block.sum(0, keepdim=True) if self._summed else block

    def blocks(self) -> Iterator[torch.Tensor]:
        """All rows, in order."""
        size = max(1, 4 * CHUNK // self.width)
        for first in range(0, self.rows, size):
            yield self.block(first, min(self.rows, first + size))

    def grams(self, of: Literal["own", "cross", "sum"] = "own") -> torch.Tensor:
        """Products (K, n, n): "own", τ_iᵀτ_i, or "cross", (Σ τ_j)ᵀτ_i; or (1, n, n) of the "sum", (Σ τ_j)ᵀ(Σ τ_j)."""
        total = torch.zeros(())
        for block in self.blocks():
            left = block if of == "own" else block.sum(0, keepdim=True)
            right = left if of == "sum" else block
            total = total + torch.bmm(left.mT.expand(len(right), -1, -1), right)
        return total

    def merge(self, update: RowUpdate) -> Result:
        """θ0 plus the update."""
        if not self.is_transposed:
            return lambda chunk: self.update_chunk(chunk, update)
        merged = self.tensors.whole(self.tensors.required_base)
        first = 0
        for block in self.blocks():
            merged[:, first : first + block.shape[1]] += update(block).T.cpu()
            first += block.shape[1]
        return merged

    def update_chunk(self, chunk: Chunk, update: RowUpdate) -> torch.Tensor:
        """θ0 plus the update for a chunk, computed from the rows that contain it."""
        first, last = chunk.start // self.width, -(-(chunk.start + chunk.size) // self.width)
        rows = update(self.block(first, last)).reshape(-1)
        return chunk.base + rows[chunk.start - first * self.width :][: chunk.size].float().cpu()


def _is_matrix(tensors: Tensors) -> bool:
    return len(tensors.shape) == 2 and tensors.numel > 0


def _mean(tensors: Tensors, scaling: float, weight: EachNumber = (1.0,)) -> Merged:
    """θ0 + λ mean w_i τ_i."""
    count = len(tensors)
    return task_arithmetic(tensors, scaling=scaling / count, weight=list(weight) * (count // len(weight)))


def _right_singular(
    gram: torch.Tensor, count: int, reference: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix τ with right singular vectors; 0 for values that are rounding errors.

    Args:
        gram: τᵀτ, (n, n) float64.
        count: number of values.
        reference: matrix whose norm bounds the rounding errors of `gram`, if it results from a subtraction.

    Returns:
        Values (count,) and vectors (n, count).
    """
    squares, vectors = _eigenvectors(gram)
    squares, vectors = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    is_real = squares > 1e-12 * torch.linalg.matrix_norm(gram if reference is None else reference)
    return torch.where(is_real, squares, 0.0).sqrt(), vectors * is_real


def _eigenvectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN if the input is not finite, so that the engine names the expert."""
    if not bool(gram.isfinite().all()):
        return torch.full_like(gram[0], torch.nan), torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(values > 0, 1 / values, 0.0)


def _orthogonal_update(
    deltas: _TaskVectors,
    specific: torch.Tensor,
    shared: torch.Tensor | None,
    values: torch.Tensor,
    rights: torch.Tensor,
) -> RowUpdate:
    """The update U⊥ diag(values) V⊥ᵀ, with the nearest orthogonal matrices to U and V.

    Args:
        deltas: τ_i.
        specific: (K, n, c), with U = [τ_1 specific_1 … τ_K specific_K 0] + (Σ τ_i) shared.
        shared: (n, R), or None for 0.
        values: (R,).
        rights: V, (n, R).
    """

    def lefts(block: torch.Tensor) -> torch.Tensor:
        """Rows of U: (K, rows, n) -> (rows, R)."""
        rows = torch.bmm(block, specific).transpose(0, 1).reshape(block.shape[1], specific.shape[0] * specific.shape[2])
        return rows if shared is None else pad(rows, (0, len(values) - rows.shape[1])) + block.sum(0) @ shared

    total = values.new_zeros(len(values), len(values))
    for block in deltas.blocks():
        rows = lefts(block)
        total += rows.T @ rows
    inner = (_inverse_root(total) * values) @ _inverse_root(rights.T @ rights) @ rights.T  # (R, n)
    return lambda block: lefts(block) @ inner


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """(AᵀA)^-½ on the row space of A."""
    squares, vectors = _eigenvectors(gram)
    real = squares > 1e-10 * squares[-1:]
    return (vectors * torch.where(real, squares, 1.0).rsqrt() * real) @ vectors.T
