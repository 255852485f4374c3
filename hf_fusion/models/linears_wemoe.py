"""Up-scaled linears: a base weight, K task vectors, and a product with weights merged per sample.

θ_b = θ0 + Σ_k w_bk τ_k is never stored for a whole linear: a block of its rows is merged for several samples by one
matrix product, used while it is in cache, and overwritten, without loops over samples or experts. The backward pass,
which only the coefficients need, merges the blocks again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import maybe_autocast

from .configuration_wemoe import LOW_RANK

# Elements of θ0 in a block, and samples merged at a time. On a CPU a block must fit into the cache and have enough rows
# for a fast product (tests/benchmarks/wemoe.py); an accelerator needs few large calls.
BLOCK, SAMPLES = 3 * 2**15, 8
BLOCK_ELSEWHERE, SAMPLES_ELSEWHERE = 2**22, 32
# Whether this CPU has instructions for bfloat16 products (AMX includes them); without them fp32 is faster.
CPU_HAS_BFLOAT16 = bool(torch.cpu._is_avx512_bf16_supported())


class UpscaledLinear(nn.Module):
    """A linear layer with K task vectors.

    Weights are stored as (R, C), the rows along the wider side: (d_out, d_in), or (d_in, d_out) if d_in is larger. A
    block then has enough rows for a fast product, which either fills a slice of the output or adds to all of it.

    Parameters, all frozen (ΣR is the sum of the experts' ranks here, n the number of kept entries):
        base: (R, C), θ0; for low rank (d_out, d_in).
        vectors: (K, R, C), task vectors ("exact"); (K · R · C,), block after block, each (K, rows · C), as the bits of
            int16, which no loader casts ("bfloat16").
        index: (n,), positions of the kept entries within their block ("sparse").
        values: (n,), the kept entries ("sparse").
        counts: (blocks,), number of kept entries in each block ("sparse").
        lora_A: (ΣR, d_in), rows orthonormal within an expert; as bits of int16 too for "low-rank-bfloat16".
        lora_B: (ΣR, d_out), or (ΣR + K, d_out) with a bias, whose task vectors come last, so that one product adds
            both; rounded like lora_A.
        biases: (K+1, d_out), θ0 and the task vectors; (1, d_out) for low rank; None without a bias.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        experts: K.
        kind: one of `configuration_wemoe.TASK_VECTORS`.
        has_bias: whether the layer has a bias.
        size: low rank: rank of each expert; "sparse": number of kept entries; "bfloat16": rows of a block, from
            `rows_of_block`; otherwise unused.
        like: dtype and device.
        conv1d: the dense layer is GPT-2's Conv1D, which stores its weight transposed.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        experts: int,
        kind: str,
        has_bias: bool,
        size: Any,
        like: dict[str, Any],
        conv1d: bool = False,
    ) -> None:
        super().__init__()
        self.conv1d = conv1d
        self.in_features, self.out_features, self.experts, self.kind = d_in, d_out, experts, kind
        self.by_input = d_in > d_out
        self.rows, self.columns = (d_in, d_out) if self.by_input else (d_out, d_in)
        self.unit: Any = None  # set by its `Unit`
        self.is_low_rank = kind in LOW_RANK
        integers = {**like, "dtype": torch.int32}
        stored = {**like, "dtype": torch.int16} if kind.endswith("bfloat16") else like
        if self.is_low_rank:
            self.ranks = list(size)
            self.base = _frozen(d_out, d_in, **like)
            self.lora_A = _frozen(sum(self.ranks), d_in, **stored)
            self.lora_B = _frozen(sum(self.ranks) + has_bias * experts, d_out, **stored)
        else:
            self.base = _frozen(self.rows, self.columns, **like)
        if kind == "exact":
            self.vectors = _frozen(experts, self.rows, self.columns, **stored)
        elif kind == "bfloat16":
            self.step = size  # rows of a stored block
            self.vectors = _frozen(experts * self.rows * self.columns, **stored)
        elif kind == "sparse":
            self.step = _rows(self.rows, self.columns, BLOCK)
            self.index = _frozen(size, **integers)
            self.values = _frozen(size, **like)
            self.counts = _frozen(math.ceil(self.rows / self.step), **integers)
        self.biases = _frozen(1 if self.is_low_rank else experts + 1, d_out, **like) if has_bias else None

    def check(self, path: str) -> None:
        """Checks loaded weights: sizes from the config, and the positions of sparse entries; `path` is for errors.

        Raises:
            ValueError: a size or position is out of range; the message names the linear.
        """
        if self.kind in ("bfloat16", "sparse") and not 1 <= self.step <= self.rows:
            raise ValueError(
                f"config.json: the size of {path} is {self.step}; it must be at most {self.rows}, its rows"
            )
        if self.kind == "sparse" and not self.index.is_meta and self.index.numel():
            most = self.experts * self.step * self.columns
            is_counted = int(self.counts.min()) >= 0 and int(self.counts.sum()) == self.index.numel()
            if not is_counted or not 0 <= int(self.index.min()) <= int(self.index.max()) < most:
                raise ValueError(f"{path}: index or counts are out of range for its task vectors")

    @property
    def weight(self) -> torch.Tensor:
        """θ0 as in nn.Linear, (d_out, d_in): some models read its dtype."""
        weight = self.base.t() if self.by_input and not self.is_low_rank else self.base
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps transformers from initialising it
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ..., d_in) -> (N, ..., d_out), with the coefficients of this linear's unit."""
        w = self.unit.coefficients(self, x)  # (B, K), N a multiple of B; SMILE has none
        if self.is_low_rank:
            return self._low_rank(x, w)
        w = w.to(x.dtype)
        rows = x.reshape(w.shape[0], -1, self.in_features)  # (B, n, d_in)
        kept = self.unit.kept(self, w)
        if kept is not None or torch.compiler.is_dynamo_compiling():
            merged = kept if kept is not None else self.merge(w)  # (B, R, C)
            y = torch.bmm(rows, merged if self.by_input else merged.transpose(1, 2))
            bias = self._bias(w)
            y = y if bias is None else y + bias[:, None]
        elif groups := _repeated(w):
            parts = [self._product(rows[group].flatten(1, 2), w[group[:, 0]]) for group in groups]
            order = torch.cat([group.flatten() for group in groups]).argsort()
            y = torch.cat([part.view(-1, rows.shape[1], self.out_features) for part in parts])[order]
        else:
            y = self._product(rows, w)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(B, n, d_in) and (B, K) -> (B, n, d_out)."""
        with maybe_autocast(rows.device.type, enabled=False):
            product: torch.Tensor = _MergedProduct.apply(rows, w, self._bias(w), self)
        return product

    def _bias(self, w: torch.Tensor) -> torch.Tensor | None:
        """Merged biases (B, d_out), in the dtype of w, which is the narrower one under autocast."""
        biases = None if self.biases is None else self.biases.to(w.dtype)
        return None if biases is None else torch.addmm(biases[0], w, biases[1:])

    def _low_rank(self, x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        """x W0ᵀ + ((x Aᵀ) · w) B, the experts' A and B side by side."""
        kept = (
            self.unit.kept(self, w) if w is not None and len(w) == 1 else None
        )  # for several samples the factors take less memory
        if w is not None and kept is not None:
            bias = None
            if self.biases is not None:
                base, changes = self._bias_rows()
                bias = torch.addmv(base.to(x.dtype), changes.t().to(x.dtype), w[0].to(x.dtype))
            return F.linear(x, kept[0], bias)
        dtype = x.dtype
        if self.multiplies_bfloat16(x):
            dtype = torch.bfloat16  # for the update alone: a relative rounding error of 2^-9
        lora_a, lora_b = _values(self.lora_A).to(dtype), _values(self.lora_B).to(dtype)
        hidden = F.linear(x.to(dtype), lora_a)  # (N, ..., ΣR)
        if w is None:
            w = self.unit.gates(hidden, self.ranks)  # (N, ..., K)
        else:
            w = w.to(x.dtype).repeat_interleave(x.shape[0] // w.shape[0], 0)
            w = w.view(x.shape[0], *(1 for _ in x.shape[1:-1]), -1)  # (N, 1, ..., K)
        hidden = hidden * w.index_select(-1, self._owners(x.device))
        if self.biases is not None:
            hidden = torch.cat([hidden, w.expand(*x.shape[:-1], -1)], -1)
        hidden = hidden.to(dtype)
        y = F.linear(x, self.base, None if self.biases is None else self.biases[0])
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return y + (hidden @ lora_b).to(y.dtype)
        if hidden.dtype is not y.dtype:
            return y.add_(hidden @ lora_b)
        y.view(-1, self.out_features).addmm_(hidden.view(-1, hidden.shape[-1]), lora_b)
        return y

    def multiplies_bfloat16(self, x: torch.Tensor) -> bool:
        """Whether the update of the dense output may be computed in bfloat16, and is faster that way."""
        fast = CPU_HAS_BFLOAT16 or x.device.type != "cpu"
        return self.kind.endswith("bfloat16") and x.dtype is not torch.float64 and fast

    def _owners(self, device: torch.device) -> torch.Tensor:
        """The expert of each row of the factors (ΣR,); cached, since a copy to a device synchronises."""
        cached: torch.Tensor | None = getattr(self, "_cached_owners", None)
        if cached is None or cached.device != device:
            owners = [expert for expert, rank in enumerate(self.ranks) for _ in range(rank)]
            cached = self._cached_owners = torch.tensor(owners, device=device)
        return cached

    # ---------------------------------------------------------------- merging

    def steps(self, samples: int, device: str) -> tuple[int, int]:
        """Number of rows of a block, and number of samples merged at a time."""
        elements = (BLOCK if samples > 1 else 2 * BLOCK) if device == "cpu" else BLOCK_ELSEWHERE
        rows = _rows(self.rows, self.columns, elements)
        if self.kind == "bfloat16" and device == "cpu" and samples == 1:
            rows = self.step  # so that a block is one stored block
        if self.kind == "sparse":  # only whole stored blocks
            rows = min(self.rows, (rows // self.step if device != "cpu" else 1) * self.step)
        return rows, min(samples, SAMPLES if device == "cpu" else SAMPLES_ELSEWHERE)

    def block(self, start: int, stop: int, scratch: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The task vectors of some rows, (K, rows · C). `scratch` is a buffer that several calls share."""
        if self.kind == "exact":
            return self.vectors[:, start:stop].flatten(1).to(dtype)
        size = (stop - start) * self.columns
        if not scratch:
            scratch.append(self.base.new_empty(self.experts * size, dtype=dtype))
        flat = scratch[0][: self.experts * size]
        block = flat.view(self.experts, size)
        if self.kind == "bfloat16":
            parts = self.parts(start, stop)
            return block.copy_(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        positions, values = self._entries(start, stop)
        flat.zero_().index_copy_(0, positions, values.to(dtype))
        return block

    def parts(self, start: int = 0, stop: int | None = None) -> list[torch.Tensor]:
        """Task vectors of some rows as bfloat16, (K, rows · C) for each of the blocks that store them."""
        values, row_size = _values(self.vectors), self.experts * self.columns
        stop = self.rows if stop is None else stop
        parts = []
        for first in range(start // self.step * self.step, stop, self.step):
            block = values[first * row_size : min(first + self.step, self.rows) * row_size].view(self.experts, -1)
            parts.append(block[:, max(start - first, 0) * self.columns : (stop - first) * self.columns])
        return parts

    def merges_by_embedding_bag(self, w: torch.Tensor) -> bool:
        """Whether a block is merged as a weighted sum of bfloat16 rows by `embedding_bag`: one sample on a CPU.

        It is the only operation that reads each entry once without a copy in float32. It adds in float32 and rounds the
        sum to bfloat16, with a relative error of 2^-9, like that of task vectors and coefficients.
        """
        return self.kind == "bfloat16" and len(w) == 1 and w.device.type == "cpu" and w.dtype is not torch.float64

    def _entries(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in (K, rows · C) and values of the kept entries of some rows, which make up whole stored blocks."""
        first, last = start // self.step, math.ceil(stop / self.step)
        starts = [] if last - first == len(self.counts) else self._starts()
        entries = slice(starts[first], starts[last]) if starts else slice(None)
        positions, values = self.index[entries].long(), self.values[entries]
        if last - first > 1:
            counts = self.counts[first:last]
            block = torch.arange(len(counts), device=counts.device)
            block = block.repeat_interleave(counts, output_size=len(positions))
            size = (stop - start - block * self.step).clamp(max=self.step) * self.columns  # of an expert's rows
            expert, position = positions // size, positions % size
            positions = expert * (stop - start) * self.columns + block * self.step * self.columns + position
        return positions, values

    def _starts(self) -> list[int]:
        """Index of each block's first entry; cached, since reading it synchronises with the device."""
        if not hasattr(self, "_cached_starts"):
            self._cached_starts = [0, *self.counts.cumsum(0).tolist()]
        return self._cached_starts

    def merge(self, w: torch.Tensor) -> torch.Tensor:
        """Complete merged weights (B, R, C) from coefficients (B, K); low rank: (1, d_out, d_in) from (1, K)."""
        if self.is_low_rank:
            scale = w[0].index_select(0, self._owners(w.device))
            factor = _values(self.lora_B)[: len(scale)].t().to(w.dtype) * scale
            return torch.addmm(self.base.to(w.dtype), factor, _values(self.lora_A).to(w.dtype))[None]
        if self.merges_by_embedding_bag(w) and not (
            torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() and w.requires_grad
        ):
            return torch.cat([block.clone() for *_, block in _blocks(self, w, read=False)], 1)
        if self.kind == "exact":
            change = w @ self.vectors.flatten(1).to(w.dtype)
        elif self.kind == "bfloat16":
            change = torch.cat([w @ part.to(w.dtype) for part in self.parts()], 1)
        else:
            scratch: list[torch.Tensor] = []
            step, _ = self.steps(len(w), w.device.type)
            starts = range(0, self.rows, step)
            blocks = (self.block(start, min(start + step, self.rows), scratch, w.dtype) for start in starts)
            change = torch.cat([w @ block for block in blocks], 1)
        return change.view(-1, self.rows, self.columns) + self.base.to(w.dtype)

    @torch.no_grad()
    def dense(self, w: torch.Tensor) -> nn.Module:
        """A plain linear, merged by coefficients (K,)."""
        like = self.weight
        w = w.to(like.device, torch.float32)
        weight = self.merge(w[None])[0]
        weight = weight.t() if self.by_input and not self.is_low_rank else weight
        sizes = self.in_features, self.out_features
        linear: Any
        if self.conv1d:
            linear, weight = Conv1D(*sizes[::-1]), weight.t()
        else:
            linear = nn.Linear(*sizes, bias=self.biases is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(like.dtype).contiguous())
        if self.biases is not None:
            base, change = self._bias_rows()
            linear.bias = nn.Parameter((base.float() + w @ change.float()).to(like.dtype))
        return linear

    @torch.no_grad()
    def fill_biases(self, base: torch.Tensor, vectors: Sequence[torch.Tensor | None]) -> None:
        """Stores the bias of the base (d_out,) and its task vectors (d_out,), None for zeros."""
        base_row, changes = self._bias_rows()
        base_row.copy_(base)
        for change, vector in zip(changes, vectors, strict=True):
            if vector is not None:
                change.copy_(vector)

    def _bias_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the bias of the base (d_out,) and of its task vectors (K, d_out)."""
        assert self.biases is not None
        vectors = _values(self.lora_B)[-self.experts :] if self.is_low_rank else self.biases[1:]
        return self.biases[0], vectors

    @torch.no_grad()
    def fill(self, base: torch.Tensor, vectors: Any) -> None:
        """Stores θ0 and the K task vectors, which are read from an iterator one at a time to save memory.

        Args:
            base: θ0, (d_out, d_in).
            vectors: iterator over task vectors (d_out, d_in); low rank: over pairs of A (r, d_in) and B (r, d_out);
                sparse: over pairs of flat positions in (d_out, d_in) and entries.
        """
        orient = self._oriented
        self.base.copy_(base if self.is_low_rank else orient(base))
        if self.kind == "exact":
            for stored, vector in zip(self.vectors, vectors, strict=True):
                stored.copy_(orient(vector))
        elif self.kind == "bfloat16":
            parts = self.parts()
            for expert, vector in zip(range(self.experts), vectors, strict=True):
                for part, rows in zip(parts, orient(vector).split(self.step), strict=True):
                    part[expert].copy_(rows.flatten())
        elif self.is_low_rank:
            pairs = list(vectors)
            _values(self.lora_A).copy_(torch.cat([a for a, _ in pairs]))
            _values(self.lora_B)[: sum(self.ranks)].copy_(torch.cat([b for _, b in pairs]))
        else:
            self._fill_sparse(list(vectors))

    def _oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (d_out, d_in) as (R, C)."""
        return weight.t() if self.by_input else weight

    def _fill_sparse(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Stores sparse task vectors, sorted by block, expert and position."""
        positions, entries, blocks = [], [], []
        for expert, (flat, values) in enumerate(pairs):
            out, inner = flat // self.in_features, flat % self.in_features
            row, column = (inner, out) if self.by_input else (out, inner)
            block = row // self.step
            height = (self.rows - block * self.step).clamp(max=self.step)
            positions.append((expert * height + row % self.step) * self.columns + column)
            entries.append(values)
            blocks.append(block)
        position, block = torch.cat(positions), torch.cat(blocks)
        order = (block * (self.experts * self.step * self.columns) + position).argsort()
        self.index.copy_(position[order])
        self.values.copy_(torch.cat(entries)[order])
        self.counts.copy_(block.bincount(minlength=len(self.counts)))

    def extra_repr(self) -> str:
        """Its sizes, for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, experts={self.experts}, task_vectors={self.kind}"


def rows_of_block(d_in: int, d_out: int) -> int:
    """Number of rows of a stored block of bfloat16 task vectors: the fastest for merging one sample."""
    return _rows(max(d_in, d_out), min(d_in, d_out), 2 * BLOCK)


def _rows(rows: int, columns: int, elements: int) -> int:
    """Number of rows of a block of about this number of elements."""
    return min(rows, max(16, elements // columns // 16 * 16))


def _repeated(w: torch.Tensor) -> list[torch.Tensor]:
    """Indices of samples with equal coefficients, (groups, size) for every size of group.

    Empty if there are more groups than half the samples, which would not repay a copy of the inputs; if gradients are
    required, which differ; and on an accelerator, where it would synchronise.
    """
    if len(w) == 1 or w.requires_grad or w.device.type != "cpu":
        return []
    distinct, which, counts = w.unique(dim=0, return_inverse=True, return_counts=True)
    if 2 * len(distinct) > len(w):
        return []
    order, starts = which.argsort(stable=True), counts.cumsum(0) - counts
    return [order[starts[counts == size, None] + torch.arange(size)] for size in counts.unique().tolist()]


def _values(stored: torch.Tensor) -> torch.Tensor:
    """A stored tensor, with bits of int16 read as bfloat16."""
    return stored.view(torch.bfloat16) if stored.dtype is torch.int16 else stored


def _frozen(*size: int, **like: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*size, **like), requires_grad=False)


class _MergedProduct(torch.autograd.Function):
    """y_b = x_b θ_bᵀ + bias_b with θ_b = θ0 + Σ_k w_bk τ_k.

    With G_b = ∂L/∂θ_b = (∂L/∂y_b)ᵀ x_b, the coefficients' gradient is ∂L/∂w_bk = ⟨G_b, τ_k⟩; G is computed block by
    block, like θ.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, linear: Any) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.linear = linear
        samples, tokens, _ = x.shape
        y = x.new_empty(samples, tokens, linear.out_features)
        for start, stop, group, _, merged in _blocks(
            linear, w, read=ctx.needs_input_grad[1] or not linear.merges_by_embedding_bag(w)
        ):
            if linear.by_input:
                into = y[group]
                if start == 0 and bias is not None:
                    into.copy_(bias[group, None])
                into.baddbmm_(x[group, :, start:stop], merged, beta=0 if start == 0 and bias is None else 1)
            else:
                into = y[group, :, start:stop]
                torch.bmm(x[group], merged.transpose(1, 2), out=into)
                if bias is not None:
                    into.add_(bias[group, None, start:stop])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x, w), linear, (grad,) = ctx.saved_tensors, ctx.linear, grads
        grad = grad.contiguous()
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for start, stop, group, vectors, merged in _blocks(linear, w, merge=grad_x is not None):
            side = slice(start, stop)
            if linear.by_input:
                inputs, outputs = x[group, :, side], grad[group]
                if grad_x is not None:
                    torch.bmm(outputs, merged.transpose(1, 2), out=grad_x[group, :, side])
                left, right = inputs, outputs
            else:
                inputs, outputs = x[group], grad[group, :, side]
                if grad_x is not None:
                    grad_x[group].baddbmm_(outputs, merged)
                left, right = outputs, inputs
            if grad_w is not None:
                weight_grad = torch.bmm(left.transpose(1, 2), right)  # (b, rows, C)
                grad_w[group].addmm_(weight_grad.flatten(1), vectors.t())
        grad_bias = grad.sum(1) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None


def _blocks(linear: UpscaledLinear, w: torch.Tensor, merge: bool = True, read: bool = True) -> Any:
    """Yields blocks of rows for groups of samples.

    Args:
        linear: whose rows.
        w: coefficients (B, K).
        merge: whether to yield θ.
        read: whether to yield τ; if not, `embedding_bag` merges θ.

    Yields:
        Start and stop of the rows, slice of the samples, τ (K, rows · C) or None, and θ (b, rows, C). Each step
        overwrites τ and θ of the one before.
    """
    step, count = linear.steps(len(w), w.device.type)
    scratch: list[torch.Tensor] = []
    room = w.new_empty(count * step * linear.columns) if merge else w
    base = linear.base.to(w.dtype)
    if not read:  # arguments of embedding_bag: rows, start of their bag, and weights
        rows, begin, weights = torch.arange(linear.experts), torch.zeros(1, dtype=torch.long), w[0].bfloat16()
    for start in range(0, linear.rows, step):
        stop = min(start + step, linear.rows)
        vectors = linear.block(start, stop, scratch, w.dtype) if read else None
        for first in range(0, len(w), count):
            group = slice(first, min(first + count, len(w)))
            size = group.stop - first, (stop - start) * linear.columns
            if not merge:
                yield start, stop, group, vectors, room
                continue
            into = room[: size[0] * size[1]].view(size)
            if vectors is not None:
                torch.addmm(base[start:stop].flatten(), w[group], vectors, out=into)
            else:
                (table,) = linear.parts(start, stop)
                change = F.embedding_bag(rows, table, begin, mode="sum", per_sample_weights=weights)
                into.copy_(change).add_(base[start:stop].flatten())
            yield start, stop, group, vectors, into.view(size[0], stop - start, linear.columns)


__all__ = ["UpscaledLinear", "rows_of_block"]
