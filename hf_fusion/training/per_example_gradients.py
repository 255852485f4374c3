"""Sums of squared per-example gradients, from which Fisher information is computed.

The gradient of a linear layer's weight for one example is Σ_t g_t x_tᵀ over its tokens t, with inputs x and output
gradients g. Examples of a batch are independent, so one backward pass gives the g of all of them. Norms and embeddings
work the same way; a model with parameters in any other module needs one backward pass per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fusion.training.batches import equal_length_batches
from hf_fusion.training.expert_statistics import run_with

BATCH_SIZE = 16  # default maximum
BLOCK = 1 << 18  # elements of one example's gradient that are computed at once: they fit in the CPU's cache
Inputs = Mapping[str, torch.Tensor]
Terms = Callable[[torch.Tensor, Inputs], torch.Tensor]
Outputs = Callable[[Callable[..., Any], Inputs], torch.Tensor]
Calls = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]  # path of a module -> (input, output) of each call


@dataclass(frozen=True)
class _Objective:
    """The function to differentiate: see `squared_gradients`."""

    model: nn.Module
    tensors: Mapping[str, torch.Tensor]
    outputs: Outputs
    terms: Terms

    def compute(self, tensors: Mapping[str, torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """The terms of a batch, (M, B)."""
        return self.terms(self.outputs(partial(run_with, self.model, tensors), inputs), inputs)

    def zeros(self) -> dict[str, torch.Tensor]:
        """Initial sums for every parameter, float64."""
        return {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.tensors.items()}


def squared_gradients(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    rows: list[Any],
    read: Callable[[list[Any]], Inputs],
    outputs: Outputs,
    terms: Terms,
    batch_size: int = BATCH_SIZE,
) -> dict[str, torch.Tensor]:
    """Σ (∇ t)² over examples and their terms t, for every parameter.

    Whether batches work for a model is tested on two rows, against autograd's gradient of each.

    Args:
        model: in evaluation mode.
        tensors: its parameters, or replacements of them, fp32.
        rows: the examples.
        read: rows → model inputs, with ``labels``; called with rows of equal lengths.
        outputs: (model, inputs) → outputs from which the terms are computed, (B, …).
        terms: (outputs, inputs) → (M, B): M terms per example, with one backward pass for each of the M.
        batch_size: maximum examples per batch.

    Returns:
        Name → sum, in the parameter's shape, float64.
    """
    modules = _find_modules(model, tensors) if batch_size > 1 else {}
    objective = _Objective(model, tensors, outputs, terms)
    totals = objective.zeros()
    in_batches = bool(modules) and _batches_agree(objective, modules, next(equal_length_batches(rows, 2)), read)
    for batch in equal_length_batches(rows, batch_size if in_batches else 1):
        if in_batches:
            _add_batch(objective, modules, totals, read(batch))
        else:
            _add_example(objective, totals, read(batch))
    return totals


def _add_example(objective: _Objective, totals: Mapping[str, torch.Tensor], inputs: Inputs) -> None:
    """Adds the squared gradients of one example, by autograd."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in objective.tensors.items()}
    terms = objective.compute(leaves, inputs)  # (M, 1)
    for index, term in enumerate(terms):
        keep = index + 1 < len(terms)
        grads = torch.autograd.grad(term.sum(), list(leaves.values()), retain_graph=keep, allow_unused=True)
        for total, grad in zip(totals.values(), grads, strict=True):
            if grad is None:
                continue
            if grad.is_sparse:  # an embedding: only the rows of tokens in the input
                grad = grad.coalesce()
                total.index_add_(0, grad.indices()[0], grad.values().double().square_())
            else:
                total.add_(grad.double().square_())


def _add_batch(
    objective: _Objective, modules: Mapping[str, nn.Module], totals: Mapping[str, torch.Tensor], inputs: Inputs
) -> None:
    """Adds the squared gradients of a batch, from the inputs of its modules and the gradients of their outputs."""
    count = len(inputs["labels"])
    with _recording(modules, count) as calls:
        terms = objective.compute(objective.tensors, inputs)  # (M, B)
    flat = [(path, x, output) for path, pairs in calls.items() for x, output in pairs]
    outputs = [output for _, _, output in flat]
    for index, term in enumerate(terms):
        grads = torch.autograd.grad(term.sum(), outputs, retain_graph=index + 1 < len(terms), allow_unused=True)
        found: Calls = {}
        for (path, x, _), grad in zip(flat, grads, strict=True):
            if grad is not None:
                found.setdefault(path, []).append((x, grad))
        with torch.no_grad():
            for path, pairs in found.items():
                module = modules[path]
                x = torch.cat([_by_example(values, count) for values, _ in pairs], 1)
                g = torch.cat([_by_example(values, count) for _, values in pairs], 1)
                sums = {name: totals[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
                ADD_SQUARES[type(module)](module, x, g, **sums)


@contextmanager
def _recording(modules: Mapping[str, nn.Module], count: int) -> Iterator[Calls]:
    """Within this context the inputs and outputs of modules are recorded; outputs require gradients."""
    calls: Calls = {}

    def keep(path: str, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].detach()
        if len(output) == 1 < count:  # position embeddings, shared by the batch
            x, output = x.expand(count, *x.shape[1:]), output.expand(count, *output.shape[1:])
        is_first = not output.requires_grad
        kept = output.detach().clone().requires_grad_() if is_first else output
        calls.setdefault(path, []).append((x, kept))
        return kept.clone() if is_first else kept  # a leaf must not be changed in place

    handles = [module.register_forward_hook(partial(keep, path)) for path, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _by_example(values: torch.Tensor, count: int) -> torch.Tensor:
    """(B, …, d) -> (B, T, d); integer inputs of an embedding (B, …) -> (B, T)."""
    return values.reshape(count, -1, *values.shape[-1:] if values.is_floating_point() else ())


# ---------------------------------------------------------------- squared gradients by type of module


def _add_linear(
    module: nn.Module, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, **bias: torch.Tensor
) -> None:
    """x (B, T, d_in) and g (B, T, d_out): adds Σ_b (Σ_t g_bt x_btᵀ)², in blocks of rows."""
    _add_bias(g, **bias)
    is_used = g.abs().amax((0, 2)) > 0  # if the loss reads one token of the last layer, other gradients are 0
    x, g = x[:, is_used], g[:, is_used]
    rows, columns = (x, g) if isinstance(module, Conv1D) else (g, x)
    if rows.shape[1] == 1:
        weight.addmm_(rows[:, 0].double().square_().T, columns[:, 0].double().square_())
        return
    step = max(1, BLOCK // columns.shape[-1])
    for start in range(0, rows.shape[-1], step):
        total = weight[start : start + step]
        gradient, exact = g.new_empty(total.shape), torch.empty_like(total)
        for row, column in zip(rows[..., start : start + step], columns, strict=True):
            torch.mm(row.T, column, out=gradient)
            total.addcmul_(exact.copy_(gradient), exact)


def _add_norm(
    module: nn.LayerNorm, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, **bias: torch.Tensor
) -> None:
    """x and g (B, T, d): adds Σ_b (Σ_t g_bt ⊙ LN(x_bt))², LN without affine parameters."""
    _add_bias(g, **bias)
    normed = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    weight.add_((g * normed).sum(1).double().square_().sum(0))


def _add_bias(g: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    if bias is not None:
        bias.add_(g.sum(1).double().square_().sum(0))


def _add_embedding(module: nn.Embedding, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
    """Token ids x (B, T) and g (B, T, d): adds Σ_b (Σ g_bt over the t with the same token id)²."""
    examples = torch.arange(len(x), device=x.device)[:, None].expand_as(x)
    tokens, which = torch.stack([examples, x]).flatten(1).unique(dim=1, return_inverse=True)
    sums = g.new_zeros(tokens.shape[1], g.shape[-1]).index_add_(0, which, g.flatten(0, 1))
    if module.padding_idx is not None:
        sums[tokens[1] == module.padding_idx] = 0
    weight.index_add_(0, tokens[1], sums.double().square_())


# (module, x, g, sum of each parameter by its name): adds to the sums
ADD_SQUARES: dict[type, Callable[..., None]] = {
    nn.Linear: _add_linear,
    Conv1D: _add_linear,
    nn.LayerNorm: _add_norm,
    nn.Embedding: _add_embedding,
}


# ---------------------------------------------------------------- whether batches work for a model


def _find_modules(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """Path -> module with parameters; empty if one has an unsupported type, or if parameters are shared."""
    modules = {path: module for path, module in model.named_modules() if list(module.named_parameters(recurse=False))}
    names = [f"{path}.{name}" for path, module in modules.items() for name, _ in module.named_parameters(recurse=False)]
    tied = len(list(model.named_parameters(remove_duplicate=False))) != len(names)
    has_types = all(type(module) in ADD_SQUARES for module in modules.values())
    return modules if has_types and set(names) == set(tensors) and not tied else {}


def _batches_agree(
    objective: _Objective, modules: Mapping[str, nn.Module], rows: list[Any], read: Callable[[list[Any]], Inputs]
) -> bool:
    """Whether a batch of two rows agrees with autograd: a model may use parameters without calling their module."""
    rows = (rows * 2)[:2]

    def random_term(outputs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        flat = outputs.flatten(1)
        factors = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0))
        return (flat * factors.to(flat)).sum(1)[None]

    objective = replace(objective, terms=random_term)
    slow, fast = objective.zeros(), objective.zeros()
    for row in rows:
        _add_example(objective, slow, read([row]))
    try:
        _add_batch(objective, modules, fast, read(rows))
    except (RuntimeError, IndexError):  # the batch is not the first dimension, or inputs are keyword arguments
        return False
    floor = 1e-10 * max(float(total.norm()) for total in slow.values())  # for totals that are 0 up to rounding
    return all(float((fast[name] - total).norm()) <= 1e-3 * float(total.norm()) + floor for name, total in slow.items())
