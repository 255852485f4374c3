"""Gram matrices of the inputs of an expert's linear layers, for RegMean and RegMean++."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fusion.errors import FusionError
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.merging.engine.open_models import LAYER
from hf_fusion.merging.engine.tensors import MemoryReader, Statistic, Tensors, merge_tensors
from hf_fusion.merging.methods.fisher_regmean import regmean
from hf_fusion.training.batches import Examples
from hf_fusion.training.expert_statistics import Statistics, evaluating, make_batches, read_parameters, run_with
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike


@torch.no_grad()
def measure_gram(
    expert: ExpertLike,
    rows: Dataset | Examples,
    *,
    base: str | Path | PreTrainedModel | None = None,
    examples: int = 256,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
) -> Statistics:
    """XᵀX / N of the inputs X (N, d_in) of every linear layer of an expert on its data, for RegMean (arXiv 2212.09849).

    Linear layers that read the same input share a matrix. Sums are float64, results fp32.

    Args:
        expert: as `load_experts` takes it; an adapter is measured together with its base.
        rows: its data, with the columns of `read_examples`, labels are ignored; or `Examples`.
        base: an adapter's base, if not the one that it records.
        examples: number of rows, sampled at random.
        batch_size: maximum rows per batch; only rows of equal length share a batch, so that nothing is padded.
        max_length: longest sequence, in tokens.
        seed: for the choice of rows.

    Returns:
        A matrix (d_in, d_in) for the weight of every linear layer that ran; ``facts["tokens"]`` has the N of each.

    Raises:
        FusionError: rows that the expert cannot read.
    """
    (loaded,) = load_experts([expert], base=base, gates=False)
    batches = make_batches(loaded, rows, examples, batch_size, max_length, seed)
    found = _gram(loaded, read_parameters(loaded), batches, lambda path: True)
    found.facts["seed"] = seed
    return found


@torch.no_grad()
def measure_gram_merged(
    experts: Sequence[ExpertLike],
    rows: Sequence[Dataset | Examples],
    *,
    base: str | Path | PreTrainedModel | None = None,
    weight: Sequence[float] | None = None,
    off_diagonal: float = 0.95,
    examples: int = 256,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
) -> list[Statistics]:
    """Gram matrices for RegMean++ (arXiv 2508.03121): of inputs that passed through the merged earlier layers.

    Each layer of an expert reads the expert's data as processed by the merged model's earlier layers instead of its
    own. Layers are therefore merged in order; ``regmean`` with these matrices, and the same `weight` and
    `off_diagonal`, gives the same merged layers. Tensors before the first layer (embeddings) are averaged.

    Args:
        experts: of one architecture, as `load_experts` takes them.
        rows: the data of each expert.
        base: the adapters' base, if not the one that they record.
        weight: of each expert; default: equal weights.
        off_diagonal: as for ``regmean``.
        examples, batch_size, max_length, seed: as for `measure_gram`, for each expert.

    Returns:
        One per expert, in order.

    Raises:
        FusionError: `rows` is not one data set per expert, or an expert cannot read its rows.
    """
    if len(rows) != len(experts):
        raise FusionError(f"{len(experts)} experts, but rows for {len(rows)}", "pass one data set per expert, in order")
    loaded = load_experts(list(experts), base=base, gates=False)
    batches = [
        make_batches(expert, dataset, examples, batch_size, max_length, seed)
        for expert, dataset in zip(loaded, rows, strict=True)
    ]
    parameters = [read_parameters(expert) for expert in loaded]
    found = [Statistics("gram", expert.name, 0, {}, {}, {"tokens": {}, "seed": seed}) for expert in loaded]
    merged: dict[str, torch.Tensor] = {}
    for layer, names in _group_by_layer(parameters[0]).items():
        for index, expert in enumerate(loaded if layer else []):
            tensors = parameters[index] | merged  # later layers do not run
            gram = _gram(expert, tensors, batches[index], lambda path, names=names: f"{path}.weight" in names, layer)
            found[index].tensors |= gram.tensors
            found[index].lookup |= gram.lookup
            found[index].facts["tokens"] |= gram.facts["tokens"]
            found[index].examples = gram.examples
        for name in names:
            if all(name in tensors and tensors[name].shape == parameters[0][name].shape for tensors in parameters):
                values = [tensors[name] for tensors in parameters]
                merged[name] = _merge_tensor(name, values, found, list(weight or [1.0] * len(loaded)), off_diagonal)
    return found


def _merge_tensor(
    name: str, values: Sequence[torch.Tensor], found: Sequence[Statistics], weight: list[float], off_diagonal: float
) -> torch.Tensor:
    """Merges one tensor by ``regmean``, with the Gram matrices measured so far."""
    entries = [statistics.lookup.get(name) for statistics in found]
    matrices = [
        Statistic(MemoryReader(statistics.tensors[entry[0]]), entry[1]) if entry else None
        for statistics, entry in zip(found, entries, strict=True)
    ]
    tensors = Tensors(name, None, [MemoryReader(value) for value in values], statistics=matrices)
    with torch.inference_mode():  # as the engine does
        merged = regmean(tensors, weight=weight, off_diagonal=off_diagonal)
        flat = torch.cat([chunk.clone() for _, chunk in merge_tensors(tensors, merged)])
    return flat.view(values[0].shape).to(values[0].device)


def _group_by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups parameters by layer, in the order of the model: path of the layer -> names.

    The key of parameters before all layers is "", that of parameters after a layer "behind PATH".
    """
    found: dict[str, list[str]] = {"": []}
    last = ""
    for name in names:
        match = LAYER.match(name)
        last = f"{match['stack']}.{match['number']}" if match else last
        found.setdefault(last if match or not last else f"behind {last}", []).append(name)
    return found


class _LayerDone(Exception):
    """Ends a forward pass after the last layer that is needed."""


def _gram(
    expert: Expert,
    tensors: Mapping[str, torch.Tensor],
    batches: Iterable[Mapping[str, torch.Tensor]],
    is_wanted: Callable[[str], bool],
    last: str = "",
) -> Statistics:
    """XᵀX / N of the inputs of the selected linear layers.

    Args:
        expert: whose model runs.
        tensors: its parameters, or replacements of them.
        batches: model inputs.
        is_wanted: whether a linear layer is selected, by its path.
        last: path of the module after which the forward pass may end.
    """
    model = expert.model
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    lookup: dict[str, tuple[str, int]] = {}
    previous: list[Any] = [None, ""]  # the last input, and the key of the first layer that read it

    def read(name: str, axis: int, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0] is previous[0]:
            lookup[name] = (previous[1], axis)
            return
        key = lookup.setdefault(name, (name, axis))[0]
        previous[:] = inputs[0], key
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()  # (N, d_in)
        product = (x.T @ x).cpu()
        sums[key] = sums[key].add_(product) if key in sums else product
        counts[key] = counts.get(key, 0) + len(x)

    def stop(*_: object) -> None:
        raise _LayerDone

    handles = [
        module.register_forward_pre_hook(partial(read, f"{path}.weight", 0 if isinstance(module, Conv1D) else 1))
        for path, module in model.named_modules()
        if linear_sizes(module) is not None and is_wanted(path)
    ]
    if last in dict(model.named_modules()):
        handles.append(model.get_submodule(last).register_forward_hook(stop))
    examples = 0
    try:
        with evaluating(model):
            for inputs in batches:
                examples += len(next(iter(inputs.values())))  # embeddings have no labels
                with suppress(_LayerDone):
                    run_with(model, tensors, **{k: v for k, v in inputs.items() if k != "labels"})
                previous[:] = None, ""
    finally:
        for handle in handles:
            handle.remove()
    means = {key: (total / counts[key]).float() for key, total in sums.items()}
    return Statistics("gram", expert.name, examples, means, lookup, {"tokens": counts})


__all__ = ["measure_gram", "measure_gram_merged"]
