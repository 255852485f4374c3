"""Builds a router: checks experts, and copies their tensors into the routed modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration_phatgoose import PhatgooseConfig
from .fused_heads import labels_of
from .points_phatgoose import GatePoint, before_points, prepared
from .routing_phatgoose import ABSENT, RoutedHead, RoutedLinears

# linears of one block that read the same input; a linear with another name forms a group of one
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
CROSS_ATTENTION = re.compile(r"cross|EncDec|encoder_attn")  # cross-attention: keys and values read the encoder's states

Tensors = tuple[torch.Tensor, ...]


@dataclass
class PreparedExpert:
    """A checked expert whose tensors can be copied into a router.

    Attributes:
        row: its row in the config, without its profile.
        lora: module path → gate (d_in,), its bias (), A (r, d_in), B (r, d_out); without the first two, if the gates
            are Gaussian.
        points: path of a gate point → what `GatePoint.slot` gives.
        heads: module path → weight (C, d_in), bias (C,).
        replaced: other saved parameters by name.
    """

    row: dict[str, Any]
    lora: dict[str, Tensors] = field(default_factory=dict)
    points: dict[str, Tensors] = field(default_factory=dict)
    heads: dict[str, Tensors] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)


def check_options(
    experts: Sequence[Any],
    top_k: int = 2,
    temperature: float = 1.0,
    routing: str = "phatgoose",
    missing_gates: str | Mapping[str, str | Path] | None = None,
    **others: Any,
) -> None:
    """Check the arguments of `PhatgooseRouter.from_experts` before anything is loaded.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    if not experts:
        raise ValueError("a router needs at least one expert; the list is empty")
    for name, value, kinds in (("top_k", top_k, int), ("temperature", temperature, (int, float))):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, not a{' whole' * (kinds is int)} number")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; each token needs at least one expert")
    if not temperature > 0:
        raise ValueError(f"the router's temperature is {temperature}; it must be above 0")
    PhatgooseConfig(num_experts_per_tok=top_k, router_temperature=temperature, routing=routing)
    if top_k > len(experts):
        raise ValueError(f"top_k={top_k}, but there are only {len(experts)} experts")
    if missing_gates not in (None, "arrow") and not isinstance(missing_gates, Mapping):
        raise ValueError(f"missing_gates is {missing_gates!r}, neither 'arrow' nor {{expert: folder of its gates}}")


def readers_of(model: Any, is_encoder_decoder: bool) -> list[str]:
    """Paths of the modules that read an input: two towers for text and images, else the encoder or the whole model."""
    towers = ["vision_model", "text_model"]
    if all(hasattr(model, tower) for tower in towers):
        return towers
    reader = model.get_encoder() if is_encoder_decoder else model
    return [next(path for path, module in model.named_modules() if module is reader)]


def linear_sizes(linear: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear, or of a Conv1D of GPT-2, whose weight is transposed."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def module_sets(config: PhatgooseConfig) -> Iterator[tuple[list[str], bool]]:
    """Groups of routed linears that read the same input, and whether the attention mask applies to that input."""
    sets: dict[tuple[str, Any], list[str]] = {}
    for path in dict.fromkeys(path for profile in config.profiles for path in profile["ranks"]):
        parent, _, name = path.rpartition(".")
        names = next((names for names in SHARED_INPUT if name in names), (name,))
        if CROSS_ATTENTION.search(parent) and len(names) == 3:
            names = names[:1] if name == names[0] else names[1:]
        sets.setdefault((parent, names), []).append(path)
    for (parent, names), paths in sets.items():
        in_decoder = config.is_encoder_decoder and "decoder" in parent.split(".")
        reads_encoder = not in_decoder or bool(CROSS_ATTENTION.search(parent) and len(names) == 2)
        yield sorted(paths, key=lambda path: names.index(path.rpartition(".")[2])), reads_encoder


def prepare_experts(
    experts: Sequence[Any], base: Any, config: PhatgooseConfig, taken: Sequence[str]
) -> list[PreparedExpert]:
    """Check loaded experts and prepare their tensors.

    Raises:
        ValueError: an expert does not fit; the message names it and the reason.
    """
    entries = []
    names = list(taken)
    for expert in experts:
        adapter, gates, name = expert.adapter, expert.gates, expert.name
        if adapter is None:
            raise ValueError(f"{name} is a full model; PHATGOOSE routes among LoRA adapters")
        if name in names:
            raise ValueError(f"there are two experts called {name}")
        names.append(name)
        known = config.base.get("id"), config.base.get("revision")
        if adapter.base and known[0] and adapter.base != known[0]:
            raise ValueError(f"{name} adapts {adapter.base}, the others {known[0]}")
        if adapter.base_revision and known[1] and adapter.base_revision != known[1]:
            raise ValueError(f"{name} adapts {adapter.base} at {adapter.base_revision}, the others at {known[1]}")
        if gates is None:
            raise ValueError(
                f"{name} has no gates: train them with hf_fusion.train_gates, or pass missing_gates='arrow' when fusing"
            )
        row = {"name": name, "revision": expert.revision, "license": expert.license, "task": expert.task}
        entry = PreparedExpert({**row, "gates": gates.description, "labels": []})
        entry.points = _points(name, gates, base, config, adapter.lora)
        for path, (a, b) in adapter.lora.items():
            _check_linear(name, path, a, b, base)
            gate = () if entry.points else _gate(name, path, a.shape[1], gates, config.routing)
            entry.lora[path] = (*gate, a, b.t())
        for path, weight, bias in _saved_heads(adapter, base, name, entry.replaced):
            entry.heads[path] = (weight, bias)
            entry.row["labels"] = list(expert.labels)
        entries.append(entry)
    return entries


def _check_linear(name: str, path: str, a: torch.Tensor, b: torch.Tensor, base: Any) -> None:
    try:
        linear = base.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{name} adapts {path}, which the base does not have") from None
    if not isinstance(linear, (nn.Linear, Conv1D)):
        raise ValueError(f"{name} adapts {path}, which is not a linear layer but {type(linear).__name__}")
    sizes, rank = linear_sizes(linear), a.shape[0]
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0]) != sizes or b.shape[1] != rank:
        raise ValueError(f"{name}: A {list(a.shape)} and B {list(b.shape)} of {path} do not fit {sizes[0]}→{sizes[1]}")
    if not 1 <= rank <= max(sizes):
        raise ValueError(f"{name}: rank {rank} of {path} is not within 1 and {max(sizes)}, the width of the linear")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{name} has NaN or Inf in {path}")


def _points(name: str, gates: Any, base: Any, config: PhatgooseConfig, adapted: Collection[str]) -> dict[str, Tensors]:
    """An expert's Gaussian gates; none where every linear has gates.

    Raises:
        ValueError: the expert's gates are of the other kind, or do not fit the base.
    """
    if config.routing != "phatgoose":
        return {}
    if bool(gates.gaussians) != bool(config.gate_points):
        kinds = f"{gates.description} gates", "Gaussian ones" if config.gate_points else "gates of every linear"
        raise ValueError(
            f"{name} has {kinds[0]}, the other experts {kinds[1]}, and their scores cannot be compared: "
            "fit gates of one kind for all (hf-fusion fit gates, --kind gaussian or paper)"
        )
    if config.gate_points and (early := before_points(base, adapted)):
        raise ValueError(f"{name} adapts {early}, before any input of Gaussian gates: fit the paper's gates for all")
    points = {}
    for path in config.gate_points:
        if path not in gates.gaussians:
            raise ValueError(f"{name} has no Gaussian gate at {path}: fit its gates again")
        mean, directions, variances = parts = gates.gaussians[path]
        width = linear_sizes(base.get_submodule(path))[0]
        shapes = (width,), (len(variances), width), (len(variances),)
        if tuple(tuple(part.shape) for part in parts) != shapes or not all(part.isfinite().all() for part in parts):
            raise ValueError(f"{name}: the Gaussian gate at {path} is not made of finite numbers for {width} features")
        points[path] = prepared((mean, directions, variances))
    return points


def _gate(name: str, path: str, width: int, gates: Any, routing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored gate of one linear, and its bias.

    It is standardised (mean and std over d_in) and divided by √d_in, if it is not calibrated already: then it comes
    with an offset. Rules that do not read these gates have no bias either.
    """
    if routing == "uniform" and gates.gaussians:  # draws experts, whatever their gates
        return torch.zeros(width), torch.zeros(())
    gate = gates.vectors.get(path)
    if gate is None:
        raise ValueError(f"{name} has no gate for {path}, which it adapts")
    if gate.shape != (width,) or not gate.isfinite().all():
        raise ValueError(f"{name}: the gate of {path} is {list(gate.shape)}, not {width} finite numbers")
    if routing == "arrow":
        return gate.float(), torch.zeros(())
    if routing == "phatgoose" and path in gates.offsets:
        return gate.float(), torch.tensor(-gates.offsets[path])
    return nn.functional.layer_norm(gate.float(), (width,)) / width**0.5, torch.zeros(())


def _saved_heads(
    adapter: Any, base: Any, name: str, replaced: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Saved linears as (path, weight, bias); other saved parameters are added to `replaced`.

    What is as the base has it counts as not saved, unless it is a head: PEFT saves whole embeddings, and what
    lies under their LoRA, to be on the safe side.
    """
    saved: dict[str, torch.Tensor] = adapter.saved
    parameters: dict[str, torch.Tensor] = dict(base.named_parameters(remove_duplicate=False))
    for key, tensor in saved.items():
        path, _, leaf = key.rpartition(".")
        module = base.get_submodule(path) if key in parameters or path in dict(base.named_modules()) else None
        is_head = isinstance(module, (nn.Linear, RoutedHead))
        known = parameters.get(key)
        is_same = known is not None and known.shape == tensor.shape and torch.equal(known, tensor.to(known.dtype))
        if is_same and (not is_head or path in adapter.lora):
            continue
        if is_head:
            if leaf == "weight":
                bias = saved.get(f"{path}.bias")
                yield path, tensor, tensor.new_zeros(len(tensor)) if bias is None else bias
        elif known is None or known.shape != tensor.shape:
            raise ValueError(f"{name} saves {key}, which the base does not have in this shape")
        else:
            replaced[key] = tensor


def complete_heads(entries: Sequence[PreparedExpert], base: Any) -> None:
    """Give experts without a head that of the base, if other experts have one; check that the rest can be shared.

    An update of a linear that is a head here is folded into the expert's own.

    Raises:
        ValueError: saved parameters differ that are not linears.
    """
    for path in dict.fromkeys(path for entry in entries for path in entry.heads):
        for entry in entries:
            if path not in entry.heads:
                head = base.get_submodule(path)
                if not isinstance(head, nn.Linear):
                    raise ValueError(f"{entry.row['name']} has no {path}, which the other experts bring along")
                bias = head.bias if head.bias is not None else head.weight.new_zeros(len(head.weight))
                entry.heads[path] = (head.weight.detach(), bias.detach())
                entry.row["labels"] = labels_of(base)
            if path in entry.lora:
                *_, a, b = entry.lora.pop(path)
                own_weight, own_bias = entry.heads[path]
                updated = own_weight.float() + b.float().t() @ a.float()
                entry.heads[path] = (updated.to(own_weight.dtype), own_bias)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for name in dict.fromkeys(name for entry in entries for name in entry.replaced):
        values = [entry.replaced[name] if name in entry.replaced else parameters[name] for entry in entries]
        if different := next((i for i, value in enumerate(values) if not torch.equal(value, values[0])), 0):
            raise ValueError(
                f"{entries[0].row['name']} and {entries[different].row['name']} differ in {name}, "
                "which is not a linear and cannot be routed"
            )


def plan_profiles(entries: Sequence[PreparedExpert]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The config's rows of experts, and the distinct profiles."""
    rows, profiles = [], []
    for entry in entries:
        profile = {
            "ranks": {path: len(a) for path, (*_, a, _) in entry.lora.items()},
            "saved": {path: len(weight) for path, (weight, _) in entry.heads.items()},
        }
        if profile not in profiles:
            profiles.append(profile)
        rows.append({**entry.row, "profile": profiles.index(profile)})
    return rows, profiles


def label_union(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Distinct class names of all experts with a head, in order."""
    return list(dict.fromkeys(label for row in rows for label in row["labels"]))


def fill_linears(group: RoutedLinears, paths: Sequence[str], entries: Sequence[PreparedExpert]) -> None:
    """Copy experts into the linears that they adapt; elsewhere their gate bias stays `ABSENT`."""
    if group.gate_bias is not None:
        group.gate_bias.fill_(ABSENT)
    for index, entry in enumerate(entries):
        for member, path in enumerate(paths):
            if path in entry.lora:
                for target, source in zip(group.slot(member, index), entry.lora[path], strict=True):
                    target.copy_(source)


def fill_point(point: GatePoint, path: str, entries: Sequence[PreparedExpert]) -> None:
    """Copy experts' Gaussian gates; an expert of fewer directions leaves the last ones 0."""
    for index, entry in enumerate(entries):
        for target, source in zip(point.slot(index), entry.points[path], strict=True):
            (target if source.dim() == 0 else target[: len(source)]).copy_(source)


def fill_head(
    head: RoutedHead, path: str, entries: Sequence[PreparedExpert], rows_of: Callable[[int, str, int], list[int]]
) -> None:
    """Copy experts' heads into the rows of their labels."""
    head.bias.fill_(ABSENT)
    for index, entry in enumerate(entries):
        rows = rows_of(index, path, head.bias.shape[1])
        weight, bias = entry.heads[path]
        head.weight[index, rows] = weight.to(head.weight.dtype)
        head.bias[index, rows] = bias.to(head.bias.dtype)


__all__ = [
    "PreparedExpert",
    "check_options",
    "prepare_experts",
    "linear_sizes",
    "module_sets",
    "readers_of",
]
