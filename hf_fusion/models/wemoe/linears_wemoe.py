"""Up-scaled linears: a base weight, K task vectors, and a product with weights merged anew for every sample.

θ_b = θ0 + Σ_k w_bk τ_k is never held for all of a linear: a block of its rows is merged for several samples by one
matrix product, used while it is in cache, and overwritten. Nothing loops over samples or experts. The backward pass,
which only the coefficients need, merges the blocks again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Merged weights at a time, in elements, and samples that share a block: measured by tests/benchmarks/wemoe.py. On a CPU
# a block has to stay in cache; on an accelerator it has to fill it.
BLOCK = {"cpu": 2**20}
SAMPLES = {"cpu": 8}
BLOCK_ELSEWHERE, SAMPLES_ELSEWHERE = 2**27, 1024
SPARSE_BLOCK = 2**17  # elements of a base's rows that one block of a pruned linear covers; fixed when it is stored


class UpscaledLinear(nn.Module):
    """A linear layer with K task vectors.

    Weights lie as (R, C), the rows along the wider side: (d_out, d_in), or (d_in, d_out) where d_in is wider. A block
    of rows is then long enough to multiply well, and either fills its own part of the output or adds to all of it.

    Parameters, all frozen (ΣR is the sum of the experts' ranks here, n the number of kept entries):
        stack: (K+1, R, C), θ0 and the task vectors ("exact").
        base: (R, C), θ0 (all others); for low rank (d_out, d_in).
        vectors: (K, R, C), bfloat16 as the bits of int16, which no loader casts ("bfloat16").
        index, values, counts: (n,), (n,), (blocks,): places within a block, entries, entries of each block ("sparse").
        lora_A, lora_B: (ΣR, d_in), (ΣR, d_out) ("low-rank"); rows of A are orthonormal within an expert.
        biases: (K+1, d_out), or None.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        experts: K.
        kind: one of `configuration_wemoe.TASK_VECTORS`.
        has_bias: whether there is one.
        size: "low-rank": rank of each expert; "sparse": number of kept entries; else not used.
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
        bits = {**like, "dtype": torch.int16}
        numbers = {**like, "dtype": torch.int32}
        if kind == "exact":
            self.stack = _frozen(experts + 1, self.rows, self.columns, **like)
        elif kind == "low-rank":
            self.ranks = list(size)
            self.base = _frozen(d_out, d_in, **like)
            self.lora_A = _frozen(sum(self.ranks), d_in, **like)
            self.lora_B = _frozen(sum(self.ranks), d_out, **like)
        else:
            self.base = _frozen(self.rows, self.columns, **like)
            if kind == "bfloat16":
                self.vectors = _frozen(experts, self.rows, self.columns, **bits)
            else:
                self.step = min(self.rows, max(1, SPARSE_BLOCK // self.columns))
                self.index = _frozen(size, **numbers)
                self.values = _frozen(size, **like)
                self.counts = _frozen(math.ceil(self.rows / self.step), **numbers)
        self.biases = _frozen(experts + 1, d_out, **like) if has_bias else None

    @property
    def weight(self) -> torch.Tensor:
        """θ0 as nn.Linear has it, (d_out, d_in): some models look at its dtype."""
        weight = self.stack[0] if self.kind == "exact" else self.base
        weight = weight.t() if self.by_input and self.kind != "low-rank" else weight
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # a model that fills its linears leaves it alone
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ..., d_in) -> (N, ..., d_out), with the coefficients of this linear's unit."""
        w = self.unit.coefficients(self, x)  # (B, K), N a multiple of B; SMILE has none
        if self.kind == "low-rank":
            return self._low_rank(x, w)
        rows = x.reshape(w.shape[0], -1, self.in_features)  # (B, n, d_in)
        w = F.pad(w.to(x.dtype), (1, 0), value=1.0)  # (B, K+1): θ0 counts once
        bias = None if self.biases is None else w @ self.biases.to(x.dtype)  # (B, d_out)
        kept = self.unit.kept(self, w)
        if kept is not None or torch.compiler.is_compiling():
            merged = kept if kept is not None else self.merge(w)  # (B, R, C)
            y = torch.bmm(rows, merged if self.by_input else merged.transpose(1, 2))
            y = y if bias is None else y + bias[:, None]
        else:
            y = _MergedProduct.apply(rows, w, bias, self)
        return y.view(*x.shape[:-1], self.out_features)

    def _low_rank(self, x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        """x W0ᵀ + ((x Aᵀ) · w) B, the experts' A and B side by side."""
        hidden = F.linear(x, self.lora_A)  # (N, ..., ΣR)
        if w is None:
            w = self.unit.gates(hidden, self.ranks)  # (N, ..., K)
        else:
            w = w.to(x.dtype).repeat_interleave(x.shape[0] // w.shape[0], 0)
            w = w.view(x.shape[0], *(1 for _ in x.shape[1:-1]), -1)  # (N, 1, ..., K)
        hidden = hidden * w.repeat_interleave(self._ranks_on(x.device), -1)
        bias = None
        if self.biases is not None:
            bias = self.biases[0] + w @ self.biases[1:]
        y = F.linear(x, self.base)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            y = y + hidden @ self.lora_B
            return y if bias is None else y + bias
        flat = y.view(-1, self.out_features)
        flat.addmm_(hidden.view(-1, hidden.shape[-1]), self.lora_B)
        return y if bias is None else y.add_(bias)

    def _ranks_on(self, device: torch.device) -> int | torch.Tensor:
        """The experts' ranks as `repeat_interleave` takes them."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else torch.tensor(self.ranks, device=device)

    # ---------------------------------------------------------------- merging

    def steps(self, samples: int, device: str) -> tuple[int, int]:
        """Rows of a block, and samples merged at a time."""
        count = min(samples, SAMPLES.get(device, SAMPLES_ELSEWHERE))
        if self.kind == "sparse":
            return self.step, count
        rows = BLOCK.get(device, BLOCK_ELSEWHERE) // (count * self.columns)
        return min(self.rows, max(16, rows // 16 * 16)), count

    def block(self, start: int, stop: int, scratch: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """θ0 and the task vectors of some rows, (K+1, rows · C). `scratch` is reused from call to call."""
        if self.kind == "exact":
            return self.stack[:, start:stop].flatten(1)
        size = (stop - start) * self.columns
        if not scratch:
            scratch.append(self.base.new_empty(self.experts + 1, size, dtype=dtype))
        block = scratch[0].view(-1)[: (self.experts + 1) * size].view(self.experts + 1, size)
        block[0].copy_(self.base[start:stop].flatten())
        if self.kind == "bfloat16":
            block[1:].copy_(self.vectors.view(torch.bfloat16)[:, start:stop].flatten(1))
            return block
        number = start // self.step
        first = self._starts()[number]
        entries = slice(first, self._starts()[number + 1])
        rest = block[1:].view(-1)
        rest.zero_()
        rest.index_copy_(0, self.index[entries].long(), self.values[entries].to(dtype))
        return block

    def _starts(self) -> list[int]:
        """Where each block's entries begin; read once, for a call that asks the device would wait for it."""
        if not hasattr(self, "_known_starts"):
            self._known_starts = [0, *self.counts.cumsum(0).tolist()]
        return self._known_starts

    def merge(self, w: torch.Tensor) -> torch.Tensor:
        """Merged weights (B, R, C), whole, from coefficients (B, K+1) that begin with 1."""
        if self.kind == "exact":
            return (w @ self.stack.flatten(1).to(w.dtype)).view(-1, self.rows, self.columns)
        if self.kind == "bfloat16":
            change = w[:, 1:] @ self.vectors.view(torch.bfloat16).flatten(1).to(w.dtype)
            return (self.base + change.view(-1, self.rows, self.columns)).to(w.dtype)
        step, _ = self.steps(1, "")
        scratch: list[torch.Tensor] = []
        starts = range(0, self.rows, step)
        parts = [w @ self.block(start, min(start + step, self.rows), scratch, w.dtype) for start in starts]
        return torch.cat(parts, 1).view(-1, self.rows, self.columns)

    @torch.no_grad()
    def dense(self, w: torch.Tensor) -> nn.Module:
        """The plain linear that coefficients (K,) stand for."""
        like = self.weight
        one = F.pad(w.to(like.device, torch.float32), (1, 0), value=1.0)
        if self.kind == "low-rank":
            scale = one[1:].repeat_interleave(torch.tensor(self.ranks, device=like.device))
            weight = self.base.float() + (self.lora_B.t().float() * scale) @ self.lora_A.float()
        else:
            weight = self.merge(one[None])[0]
            weight = weight.t() if self.by_input else weight
        sizes = self.in_features, self.out_features
        linear: Any
        if self.conv1d:
            linear, weight = Conv1D(*sizes[::-1]), weight.t()
        else:
            linear = nn.Linear(*sizes, bias=self.biases is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(like.dtype).contiguous())
        if self.biases is not None:
            linear.bias = nn.Parameter((one @ self.biases.float()).to(like.dtype))
        return linear

    @torch.no_grad()
    def fill(self, base: torch.Tensor, vectors: Any) -> None:
        """Takes θ0 (d_out, d_in) and K task vectors in turn, each made, kept in this linear's way and dropped.

        Args:
            vectors: iterator over task vectors (d_out, d_in) as plain tensors; low rank: pairs A (r, d_in) and
                B (r, d_out); sparse: flat places in (d_out, d_in) and entries.
        """
        turn = self._turned
        if self.kind == "exact":
            self.stack[0].copy_(turn(base))
            for index, vector in enumerate(vectors, 1):
                self.stack[index].copy_(turn(vector))
            return
        self.base.copy_(base if self.kind == "low-rank" else turn(base))
        if self.kind == "bfloat16":
            for index, vector in enumerate(vectors):
                self.vectors.view(torch.bfloat16)[index].copy_(turn(vector))
        elif self.kind == "low-rank":
            pairs = list(vectors)
            self.lora_A.copy_(torch.cat([a for a, _ in pairs]))
            self.lora_B.copy_(torch.cat([b for _, b in pairs]))
        else:
            self._fill_sparse(list(vectors))

    def _turned(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.by_input else weight

    def _fill_sparse(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Sorts entries by block, expert and place."""
        places, entries, blocks = [], [], []
        for expert, (flat, values) in enumerate(pairs):
            out, inner = flat // self.in_features, flat % self.in_features
            row, column = (inner, out) if self.by_input else (out, inner)
            block = row // self.step
            height = (self.rows - block * self.step).clamp(max=self.step)
            places.append((expert * height + row % self.step) * self.columns + column)
            entries.append(values)
            blocks.append(block)
        place, block = torch.cat(places), torch.cat(blocks)
        order = (block * (self.experts * self.step * self.columns) + place).argsort()
        self.index.copy_(place[order])
        self.values.copy_(torch.cat(entries)[order])
        self.counts.copy_(block.bincount(minlength=len(self.counts)))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features} -> {self.out_features}, experts={self.experts}, task_vectors={self.kind}"


def _frozen(*size: int, **like: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*size, **like), requires_grad=False)


class _MergedProduct(torch.autograd.Function):
    """y_b = x_b θ_bᵀ + bias_b with θ_b = Σ_k w_bk S_k, S the stack of θ0 and the task vectors.

    With G_b = ∂L/∂θ_b = (∂L/∂y_b)ᵀ x_b, the coefficients' gradient is ∂L/∂w_bk = ⟨G_b, S_k⟩; G is made block by block,
    as θ is.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, linear: Any) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.linear = linear
        samples, tokens, _ = x.shape
        y = x.new_empty(samples, tokens, linear.out_features)
        for start, stop, group, _, merged in _blocks(linear, w):
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
        for start, stop, group, stack, merged in _blocks(linear, w, merge=grad_x is not None):
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
                grad_w[group].addmm_(weight_grad.flatten(1), stack.t())
        grad_bias = grad.sum(1) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None


def _blocks(linear: UpscaledLinear, w: torch.Tensor, merge: bool = True) -> Any:
    """Row blocks for groups of samples: (start, stop, samples, (K+1, rows · C), (b, rows, C)).

    What is yielded is overwritten by the next one.
    """
    step, count = linear.steps(len(w), w.device.type)
    scratch: list[torch.Tensor] = []
    room = w.new_empty(count * step * linear.columns) if merge else w
    for start in range(0, linear.rows, step):
        stop = min(start + step, linear.rows)
        stack = linear.block(start, stop, scratch, w.dtype)
        for first in range(0, len(w), count):
            group = slice(first, min(first + count, len(w)))
            size = group.stop - first, (stop - start) * linear.columns
            if not merge:
                yield start, stop, group, stack, room
                continue
            into = room[: size[0] * size[1]].view(size)
            torch.mm(w[group], stack, out=into)
            yield start, stop, group, stack, into.view(size[0], stop - start, linear.columns)


__all__ = ["UpscaledLinear"]
