"""Squares of gradients, example by example: what Fisher information is a mean of.

The gradient of a linear's weight for one example is Σ_t g_t x_tᵀ over its tokens, of inputs x and outputs' gradients g.
One backward pass of a batch gives the g of all of its examples, for none has a part in another's. It is alike with
norms and embeddings; a model that has parameters anywhere else is asked one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_fusion.training.batches import equal_lengths

TOGETHER = 16  # examples of a batch, at most
BLOCK = 1 << 18  # elements of one example's gradient at once: what stays in a cache
Inputs = Mapping[str, torch.Tensor]
Terms = Callable[[torch.Tensor, Inputs], torch.Tensor]
Outputs = Callable[[Callable[..., Any], Inputs], torch.Tensor]
Calls = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]  # path of a module -> its inputs and outputs


@dataclass(frozen=True)
class _Asked:
    """What is differentiated: see `squared_gradients`."""

    model: Any
    tensors: Mapping[str, torch.Tensor]
    outputs: Outputs
    terms: Terms

    def rows(self, tensors: Mapping[str, torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """Terms (M, B) of examples."""
        return self.terms(self.outputs(partial(run_with, self.model, tensors), inputs), inputs)

    def zeros(self) -> dict[str, torch.Tensor]:
        """A total for every parameter, float64."""
        return {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.tensors.items()}


def squared_gradients(
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    rows: list[Any],
    read: Callable[[list[Any]], Inputs],
    outputs: Outputs,
    terms: Terms,
    together: int = TOGETHER,
) -> dict[str, torch.Tensor]:
    """Σ (∇ t)² over examples and their terms t, for every parameter.

    Whether a model can be asked in batches is tried: with two rows, against autograd's own gradients.

    Args:
        model: without dropout.
        tensors: its parameters, or others in their place, fp32.
        rows: the examples.
        read: some of them as the model's inputs, with ``labels``; those of equal lengths share a batch.
        outputs: (model, inputs) → what terms are made of, (B, …).
        terms: (outputs, inputs) → (M, B): M terms of each example, one backward pass for each M.
        together: at most so many examples in a batch.

    Returns:
        By name, in the parameters' shapes, float64.
    """
    seen = _seen_modules(model, tensors) if together > 1 else {}
    asked = _Asked(model, tensors, outputs, terms)
    totals = asked.zeros()
    in_batches = bool(seen) and _agrees(asked, seen, next(equal_lengths(rows, 2)), read)
    for own in equal_lengths(rows, together if in_batches else 1):
        if in_batches:
            _add_batch(asked, seen, totals, read(own))
        else:
            _add_one(asked, totals, read(own))
    return totals


def run_with(model: Any, tensors: Mapping[str, torch.Tensor], **inputs: Any) -> Any:
    """A model with other parameters, and its buffers in single precision as well."""
    buffers = {name: own.float() for name, own in model.named_buffers() if own.is_floating_point()}
    return functional_call(model, {**buffers, **tensors}, kwargs=inputs)


def _add_one(asked: _Asked, totals: Mapping[str, torch.Tensor], inputs: Inputs) -> None:
    """Adds the squares of one example, by autograd."""
    learned = {name: tensor.detach().requires_grad_() for name, tensor in asked.tensors.items()}
    rows = asked.rows(learned, inputs)  # (M, 1)
    for number, term in enumerate(rows):
        keep = number + 1 < len(rows)
        grads = torch.autograd.grad(term.sum(), list(learned.values()), retain_graph=keep, allow_unused=True)
        for total, grad in zip(totals.values(), grads, strict=True):
            if grad is None:
                continue
            if grad.is_sparse:  # of an embedding only the rows that were read have a gradient
                grad = grad.coalesce()
                total.index_add_(0, grad.indices()[0], grad.values().double().square_())
            else:
                total.add_(grad.double().square_())


def _add_batch(
    asked: _Asked, seen: Mapping[str, nn.Module], totals: Mapping[str, torch.Tensor], inputs: Inputs
) -> None:
    """Adds the squares of the examples of a batch, from what its modules read and the gradients of what they gave."""
    count = len(inputs["labels"])
    with _watching(seen, count) as calls:
        rows = asked.rows(asked.tensors, inputs)  # (M, B)
    places = [(path, place) for path, own in calls.items() for place in range(len(own))]
    given = [calls[path][place][1] for path, place in places]
    for number, term in enumerate(rows):
        grads = torch.autograd.grad(term.sum(), given, retain_graph=number + 1 < len(rows), allow_unused=True)
        found: Calls = {}
        for (path, place), grad in zip(places, grads, strict=True):
            if grad is not None:
                found.setdefault(path, []).append((calls[path][place][0], grad))
        with torch.no_grad():
            for path, pairs in found.items():
                module = seen[path]
                x = torch.cat([_by_example(own, count) for own, _ in pairs], 1)
                g = torch.cat([_by_example(own, count) for _, own in pairs], 1)
                own = {name: totals[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
                SEEN[type(module)](module, x, g, **own)


@contextmanager
def _watching(modules: Mapping[str, nn.Module], count: int) -> Iterator[Calls]:
    """Within this context inputs and outputs of modules are kept, outputs such that they have gradients."""
    calls: Calls = {}

    def keep(path: str, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].detach()
        if len(output) == 1 < count:  # positions: the same for all
            x, output = x.expand(count, *x.shape[1:]), output.expand(count, *output.shape[1:])
        is_first = not output.requires_grad
        kept = output.detach().clone().requires_grad_() if is_first else output
        calls.setdefault(path, []).append((x, kept))
        return kept.clone() if is_first else kept  # what is the first of all may be added to in place

    handles = [module.register_forward_hook(partial(keep, path)) for path, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _by_example(values: torch.Tensor, count: int) -> torch.Tensor:
    """(B, …, d) -> (B, T, d); of an embedding's inputs, which are no floats, (B, …) -> (B, T)."""
    return values.reshape(count, -1, *values.shape[-1:] if values.is_floating_point() else ())


# ---------------------------------------------------------------- the squares of one kind of module each


def _linear(module: nn.Module, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, **bias: torch.Tensor) -> None:
    """x (B, T, d_in) and g (B, T, d_out): adds Σ_b (Σ_t g_bt x_btᵀ)², a block of rows at a time."""
    _bias(g, **bias)
    speaks = g.abs().amax((0, 2)) > 0  # of a last layer that is read at one token, the others have no gradients
    x, g = x[:, speaks], g[:, speaks]
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


def _norm(module: Any, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, **bias: torch.Tensor) -> None:
    """x and g (B, T, d): adds Σ_b (Σ_t g_bt ⊙ LN(x_bt))², LN without weights."""
    _bias(g, **bias)
    normed = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    weight.add_((g * normed).sum(1).double().square_().sum(0))


def _bias(g: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    if bias is not None:
        bias.add_(g.sum(1).double().square_().sum(0))


def _embedding(module: Any, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
    """Token numbers x (B, T) and g (B, T, d): adds Σ_b (Σ g_bt over the t of the same token)²."""
    examples = torch.arange(len(x), device=x.device)[:, None].expand_as(x)
    tokens, which = torch.stack([examples, x]).flatten(1).unique(dim=1, return_inverse=True)
    sums = g.new_zeros(tokens.shape[1], g.shape[-1]).index_add_(0, which, g.flatten(0, 1))
    if module.padding_idx is not None:
        sums[tokens[1] == module.padding_idx] = 0
    weight.index_add_(0, tokens[1], sums.double().square_())


SEEN: dict[type, Callable[..., None]] = {
    nn.Linear: _linear,
    Conv1D: _linear,
    nn.LayerNorm: _norm,
    nn.Embedding: _embedding,
}


# ---------------------------------------------------------------- whether all of a model is seen


def _seen_modules(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """The modules that have parameters, by path; none where one is of another kind, or a parameter in two."""
    found = {path: own for path, own in model.named_modules() if list(own.named_parameters(recurse=False))}
    names = [f"{path}.{name}" for path, own in found.items() for name, _ in own.named_parameters(recurse=False)]
    tied = len(list(model.named_parameters(remove_duplicate=False))) != len(names)
    is_all = all(type(own) in SEEN for own in found.values()) and set(names) == set(tensors) and not tied
    return found if is_all else {}


def _agrees(asked: _Asked, seen: Mapping[str, nn.Module], rows: list[Any], read: Callable[[list[Any]], Inputs]) -> bool:
    """Whether two rows in a batch give what autograd gives of each: not every module is used by calling it."""
    rows = (rows * 2)[:2]

    def any_term(given: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        flat = given.flatten(1)
        factors = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0))
        return (flat * factors.to(flat)).sum(1)[None]

    asked = replace(asked, terms=any_term)
    slow, fast = asked.zeros(), asked.zeros()
    for row in rows:
        _add_one(asked, slow, read([row]))
    try:
        _add_batch(asked, seen, fast, read(rows))
    except (RuntimeError, IndexError):  # shapes that are not examples first; inputs by name
        return False
    floor = 1e-10 * max(float(own.norm()) for own in slow.values())  # of what is 0 but for rounding
    return all(float((fast[name] - own).norm()) <= 1e-3 * float(own.norm()) + floor for name, own in slow.items())
