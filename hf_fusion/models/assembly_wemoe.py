"""Finds the units to up-scale, and represents experts as differences from their base."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class NoLinearsError(ValueError):
    """The model has no linears to up-scale."""


class UnchangedLinearsError(ValueError):
    """No expert changes a linear to up-scale."""


OWN_HEADS = (
    "classification",
    "segmentation",
)  # last parts of the paths of heads, of which the model has one copy per expert
# linears of a unit by their names in one module, in the order in which they run; the first matching row applies
MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mlp": (
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma
        ("DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),  # T5 1.1, Flan-T5
        ("DenseReluDense.wi", "DenseReluDense.wo"),  # T5
        ("intermediate.dense", "output.dense"),  # BERT, RoBERTa, DeBERTa, older ViT, Swin
        ("mlp.fc1", "mlp.fc2"),  # ViT, CLIP, SigLIP, Phi
        ("mlp.c_fc", "mlp.c_proj"),  # GPT-2, StarCoder2
        ("mlp.fc_in", "mlp.fc_out"),  # GPT-J, CodeGen
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
        ("mlp.up_proj", "mlp.down_proj"),  # Nemotron
        ("mlp.Wi", "mlp.Wo"),  # ModernBERT
        ("ffn.lin1", "ffn.lin2"),  # DistilBERT
        ("fc1", "fc2"),  # BART, OPT
    ),
    "attention": (
        ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, ViT
        ("q_proj", "k_proj", "v_proj", "out_proj"),  # CLIP, BART, OPT
        ("self.query", "self.key", "self.value", "output.dense"),  # BERT
        ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),  # DeBERTa
        ("attention.query_key_value", "attention.dense"),  # GPT-NeoX
        ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
        ("attn.c_attn", "attn.c_proj"),  # GPT-2
        ("q", "k", "v", "o"),  # T5
    ),
}
UNRELATED = 1.0  # an expert at this distance from the base, relative to the base's norm, was not fine-tuned from it


@dataclass
class ExpertSource:
    """An expert as differences from the base.

    Attributes:
        row: its row in the config.
        tensors: name in the model → the expert's tensor.
        lora: path of a linear → A (r, d_in), B (d_out, r): an adapter's updates besides `tensors`.
        distance: ‖τ‖² of all vectors computed so far; size: ‖θ0‖² of the same tensors.
    """

    row: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    distance: float = 0.0
    size: float = 0.0

    @property
    def name(self) -> str:
        """The expert's name."""
        return str(self.row["name"])

    def vector(self, key: str, base: torch.Tensor, transposed: bool = False) -> torch.Tensor | None:
        """The task vector of one tensor in fp32; None if the tensor is the base's.

        Raises:
            ValueError: the shape differs, or there are NaN or Inf.
        """
        path, _, leaf = key.rpartition(".")
        if key in self.tensors:
            tensor = self.tensors[key]
            if tensor.shape != base.shape:
                raise ValueError(
                    f"{self.name}: {key} is {list(tensor.shape)}, in the base {list(base.shape)}{_hint(key)}"
                )
            vector = tensor.float() - base.float()
        elif leaf == "weight" and path in self.lora:
            a, b = self.lora[path]
            vector = b.float() @ a.float()
            vector = vector.t() if transposed else vector
            if vector.shape != base.shape:
                raise ValueError(f"{self.name}: its update of {path} is {list(vector.shape)}, not {list(base.shape)}")
        else:
            return None
        if not vector.isfinite().all():
            raise ValueError(f"{self.name} has NaN or Inf in {key}")
        self.distance += float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2
        self.size += float(torch.linalg.vector_norm(base, dtype=torch.float64)) ** 2
        return vector

    def changes(self, path: str, base: torch.Tensor) -> bool:
        """Whether the expert's weight of a linear differs from the base's."""
        weight = self.tensors.get(f"{path}.weight")
        return path in self.lora or (weight is not None and not torch.equal(weight, base))

    def check_relation(self) -> None:
        """Check that a full expert is near the base, as after fine-tuning; an adapter records its base.

        Raises:
            ValueError: it is not.
        """
        relative = (self.distance / max(self.size, 1e-300)) ** 0.5
        if relative >= UNRELATED and not self.row["adapter"]:
            raise ValueError(
                f"{self.name} is too far from the base to be a fine-tune of it ({relative:.2f} of the base's norm): "
                "it has another base"
            )


def _hint(key: str) -> str:
    return ": another vocabulary" if re.search(r"embed|wte|shared|lm_head", key) else ""


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer that can be up-scaled."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def find_units(model: nn.Module, modules: str) -> list[tuple[str, list[str]]]:
    """Find the units, whose linears share a router.

    Args:
        model: the dense model.
        modules: "mlp", "attention", or a regular expression that finds paths of linears; what it finds in one module
            is a unit, in the order of definition, which has to be the order in which it runs.

    Raises:
        NoLinearsError: nothing is found.
        ValueError: `modules` is not a valid pattern.
    """
    known = dict(model.named_modules())
    linears = [path for path, module in known.items() if is_linear(module)]
    units: dict[str, list[str]] = {}
    if modules in MODULES:
        taken: set[str] = set()
        for names in MODULES[modules]:
            for path in linears:
                holder = path.removesuffix(names[0])
                paths = [holder + name for name in names]
                fits = path.endswith(f".{names[0]}") and all(name in linears for name in paths)
                if fits and taken.isdisjoint(paths):
                    units[holder] = paths
                    taken.update(paths)
    else:
        try:
            pattern = re.compile(modules)
        except re.error as error:
            raise ValueError(f"modules={modules!r} is not a name and not a regular expression ({error})") from None
        for path in linears:
            if pattern.search(path):
                units.setdefault(path.rpartition(".")[0], []).append(path)
    if not units:
        rows = "no MLP of a known architecture" if modules == "mlp" else f"no linear that modules={modules!r} finds"
        raise NoLinearsError(
            f"{type(model).__name__} has {rows}; pass modules= with a regular expression for its linears"
        )
    order = {path: number for number, path in enumerate(known)}
    return sorted(((name.rstrip("."), paths) for name, paths in units.items()), key=lambda unit: order[unit[1][0]])


def part_of(base: Any, model: Any) -> str:
    """The path of a submodel of this class in a base (CLIP's vision tower); "" if there is none."""
    if type(base) is type(model):
        return ""
    paths = [path for path, module in base.named_modules() if path and type(module) is type(model)]
    return paths[0] if len(paths) == 1 else ""


def renamed(tensors: Mapping[str, Any], model: Any, template: Any, part: str = "") -> dict[str, Any]:
    """Rename the tensors of a model as in a template.

    Models may have the same trunk with or without a prefix (BertModel, BertForSequenceClassification). A name that
    the template lacks stays unchanged.
    """
    known = template if isinstance(template, dict) else template.state_dict()
    inner, other = model.base_model_prefix, "" if isinstance(template, dict) else template.base_model_prefix
    result = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(f"{inner}.")
        options = (f"{part}.{key}", key) if part else (key, bare, f"{other}.{key}", f"{other}.{bare}")
        result[next((name for name in options if name in known), key)] = tensor
    return result


def head_paths(model: Any, head: str) -> list[str]:
    """Paths of the head's modules of a classifier, of which there is one copy per expert; the last returns the logits.

    They are what lies outside of its trunk, and the trunk's pooler: what is the first layer of RoBERTa's head, BERT has
    there, and every fine-tune makes it its own.
    """
    if not head.endswith(OWN_HEADS):
        return []
    trunk = next((name for name, child in model.named_children() if child is model.base_model), None)
    if trunk is None:  # CLIPForImageClassification, UperNet: the trunk's name is not the prefix
        trunk = next(name for name, child in model.named_children() if hasattr(child, "config"))
    pooler = getattr(model.get_submodule(trunk), "pooler", None)
    inside = [f"{trunk}.pooler"] if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()) else []
    outside = [name for name, child in model.named_children() if name != trunk]
    return inside + [name for name in outside if any(True for _ in model.get_submodule(name).parameters())]


def low_rank(vector: torch.Tensor, rank: int | None, energy: float | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best low-rank approximation: A (r, d_in) with orthonormal rows, B (r, d_out), and the share of ‖τ‖² kept.

    r is at most the rank of τ in single precision: singular vectors of zero are arbitrary, and SMILE's gates read them.

    Args:
        vector: (d_out, d_in).
        rank: largest rank, or None.
        energy: the least rank that keeps this share, or None.
    """
    wide = vector.shape[0] < vector.shape[1]
    matrix = vector.double()
    gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
    values, vectors = torch.linalg.eigh(gram)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(values.sum())
    kept = (values.cumsum(0) / max(total, 1e-300)).clamp(max=1.0)
    count = len(values) if energy is None else int((kept < energy - 1e-12).sum()) + 1
    noise = torch.finfo(torch.float32).eps ** 2 * max(vector.shape)  # of σ² relative to the largest, by rounding of τ
    full = int((values > noise * values[0]).sum())
    count = max(1, min(count, full, rank if rank is not None else full))
    side = vectors[:, :count]
    if wide:  # matrix = U S Vᵀ, side = U
        b = side
        a = side.t() @ matrix  # S Vᵀ
        scale = a.norm(dim=1).clamp(min=1e-300)
        a, b = a / scale[:, None], b * scale
    else:
        a, b = side.t(), matrix @ side
    share = float(kept[count - 1]) if total > 0 else 1.0
    return a.float().contiguous(), b.t().float().contiguous(), share


def pruned(vector: torch.Tensor, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries of a task vector by magnitude: flat indices in ascending order, and values."""
    flat = vector.flatten()
    count = max(1, round(density * flat.numel()))
    places = flat.abs().topk(count, sorted=False).indices.sort().values
    return places, flat[places]


def check_experts(sources: Sequence[ExpertSource], base: Mapping[str, torch.Tensor], heads: Sequence[str]) -> None:
    """Check that each full expert has exactly the tensors of the base, apart from heads.

    Raises:
        ValueError: it does not; the message names the expert and the tensor.
    """
    in_heads = tuple(f"{path}." for path in heads)
    for source in sources:
        if source.row["adapter"]:
            continue
        trunk = {key for key in source.tensors if not key.startswith(in_heads)} if in_heads else set(source.tensors)
        prefix = f"{source.row['part']}." if source.row["part"] else ""
        wanted = {key for key in base if key.startswith(prefix) and not (in_heads and key.startswith(in_heads))}
        if missing := sorted(wanted - trunk):
            raise ValueError(f"{source.name} lacks {len(missing)} tensors of the base, first {missing[0]}")
        if extra := sorted(trunk - wanted):
            raise ValueError(f"{source.name} has {len(extra)} tensors that the base does not have, first {extra[0]}")


def check_ties(sources: Sequence[ExpertSource], groups: Sequence[list[str]]) -> None:
    """Check that tensors tied in the model are tied in each expert too.

    Raises:
        ValueError: they are not; the message names the expert and both tensors.
    """
    for source in sources:
        for first, *others in groups:
            for other in others:
                one, two = source.tensors.get(first), source.tensors.get(other)
                if one is not None and two is not None and not torch.equal(one, two):
                    raise ValueError(f"{source.name} has {other} apart from {first}; the base ties them")


def tied_groups(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of names that share one tensor."""
    groups: dict[tuple[int, Any], list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def merge_rest(
    names: Sequence[str],
    base: Mapping[str, torch.Tensor],
    sources: Sequence[ExpertSource],
    scaling: float,
    transposed: Callable[[str], bool],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Add λ times the task vectors to tensors that are not up-scaled, one by one in fp32 (arXiv 2212.04089)."""
    for name in names:
        tensor = base[name]
        if not tensor.is_floating_point():
            yield name, tensor
            continue
        vectors = [source.vector(name, tensor, transposed(name)) for source in sources]
        if all(vector is None or not vector.any() for vector in vectors):
            yield name, tensor
        else:
            merged = tensor.to(torch.float32, copy=True)
            for vector in vectors:
                if vector is not None:
                    merged.add_(vector, alpha=scaling)
            yield name, merged.to(tensor.dtype)


__all__ = ["MODULES", "ExpertSource"]
