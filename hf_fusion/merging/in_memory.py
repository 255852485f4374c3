"""Static merging of state dicts in memory, for notebooks, parameter searches and benchmarks.

`hf_fusion.merging.merge` merges files, without loading a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_fusion.errors import FusionError
from hf_fusion.merging.engine.open_models import layer_depths
from hf_fusion.merging.engine.stream import not_finite_error
from hf_fusion.merging.engine.tensors import MemoryReader, Statistic, Tensors, WholeModel, merge_tensors
from hf_fusion.merging.methods import METHODS_LISTING, method_named
from hf_fusion.merging.settings import arguments_at, check_settings
from hf_fusion.schema import KeyPath


@torch.no_grad()
def merge_states(
    method: str,
    base: Mapping[str, torch.Tensor] | None,
    experts: Sequence[Mapping[str, torch.Tensor]],
    *,
    by_expert: Sequence[Mapping[str, Any]] = (),
    statistics: Sequence[Mapping[str, Statistic]] = (),
    seed: int = 0,
    memory: dict[str, dict[Any, Any]] | None = None,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merges tensors of the same names and shapes.

    Args:
        method: a key of `hf_fusion.merging.methods.MERGE_METHODS`.
        base: tensors of the model that the experts were fine-tuned from; ignored by methods without a base.
        experts: tensors of each expert: at least those of the base, else of the first.
        by_expert: parameters of single experts (``weight``), one mapping per expert.
        statistics: of each expert, tensor name → its statistic, for methods that need statistics.
        seed: for random draws.
        memory: keeps what is computed of these tensors alone, for further merges of them with other parameters.
        parameters: the method's own, for all experts: values, gradients over the layers or filters by name.

    Returns:
        Name → merged tensor, float32, on the CPU. Tensors that are not floating-point are the first model's.

    Raises:
        FusionError: the method or a parameter is unknown, a value is out of range, or a merged tensor has NaN or Inf.
        ValueError: the method cannot merge a tensor; the message says why.
    """
    row = method_named(method)
    for given in (parameters, *by_expert):
        check_settings(method, row.parameters, given, KeyPath(""))
    start = base if row.base and base is not None else None
    first = start if start is not None else experts[0]
    settings = [[each] for each in by_expert] or [[] for _ in experts]
    floats = [name for name, tensor in first.items() if tensor.is_floating_point()]

    def opened(name: str) -> Tensors:
        readers = [MemoryReader(expert[name].cpu()) for expert in experts]
        measured = [each.get(name) for each in statistics]
        kept = None if memory is None else memory.setdefault(name, {})
        first_reader = None if start is None else MemoryReader(start[name].cpu())
        return Tensors(name, first_reader, readers, seed, whole, measured, kept)

    whole = WholeModel(lambda: [opened(name) for name in floats])
    merged = {name: tensor.clone() for name, tensor in first.items() if not tensor.is_floating_point()}
    for name, depth in layer_depths(dict.fromkeys(floats)).items():
        tensors = opened(name)
        arguments = arguments_at(row.parameters, [parameters], settings, name, depth)
        values = torch.empty(tensors.numel)
        for begin, part in merge_tensors(tensors, row.function(tensors, **arguments)):
            values[begin : begin + len(part)] = part
        if not bool(values.isfinite().all()):
            raise not_finite_error(tensors)
        merged[name] = values.view(tensors.shape)
    return merged


def check_start(method: str, experts: int, parameters: Mapping[str, Any]) -> None:
    """Checks that a method merges whole models without data, as training needs to start from.

    Args:
        method: its name.
        experts: how many models it would merge.
        parameters: its parameters.

    Raises:
        FusionError: it does not, or a parameter is not its own.
    """
    row = method_named(method)
    least, most = row.experts
    reason = (
        "it merges adapters" if row.merges != "models" else
        "it needs statistics of data" if row.statistics else
        "it assembles layers" if row.plans else
        f"it does not merge {experts} models" if not least <= experts <= (most or experts) else
        ""
    )  # fmt: skip
    if reason:
        raise FusionError(f"{method} cannot be what routers start from: {reason}", METHODS_LISTING)
    check_settings(method, row.parameters, parameters, KeyPath(""))


def merge_to_start_from(
    method: str, scaling: float | None, base: Mapping[str, torch.Tensor], experts: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], float]:
    """The static merge that routers or coefficients start from, and the λ that it was made with.

    Args:
        method: see `check_start`.
        scaling: its λ; None for its default, which is 1 for a method without one.
        base: see `merge_states`.
        experts: see `merge_states`.

    Raises:
        FusionError: see `check_start` and `merge_states`.
    """
    given: dict[str, Any] = {} if scaling is None else {"scaling": scaling}
    check_start(method, len(experts), given)
    if scaling is None:
        known = method_named(method).parameters
        scaling = known["scaling"].default if "scaling" in known else 1.0
    return merge_states(method, base, experts, **given), scaling


__all__ = ["check_start", "merge_states", "merge_to_start_from"]
