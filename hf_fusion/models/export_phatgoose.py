"""Exports a router's experts as one PEFT adapter, for servers without routing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from .assembly_phatgoose import PreparedExpert
from .configuration_phatgoose import PhatgooseConfig

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}


def save_merged_adapter(
    folder: Path,
    entries: Sequence[PreparedExpert],
    weights: Sequence[float],
    config: PhatgooseConfig,
    rank: int | None,
    generation: GenerationConfig | None = None,
) -> Path:
    """Write the adapter ΔW = Σ_e weight_e · B_e A_e; see `PhatgooseRouter.to_adapter`.

    Raises:
        ValueError: experts have heads with different labels, or have heads and weights that sum to 0.
    """
    used = [(entry, weight) for entry, weight in zip(entries, weights, strict=True) if weight]
    if not used:
        raise ValueError("all weights are 0: nothing is left to export")
    if len({tuple(entry.row["labels"]) for entry, _ in used}) > 1:
        raise ValueError("these experts have different labels, which no single head can serve")
    tensors, ranks = {}, {}
    for path in dict.fromkeys(path for entry, _ in used for path in entry.lora):
        parts = [(entry.lora[path][-2:], weight) for entry, weight in used if path in entry.lora]
        a = torch.cat([a for (a, _), _ in parts])  # (ΣR, d_in)
        b = torch.cat([b.float() * weight for (_, b), weight in parts]).t()  # (d_out, ΣR)
        if rank is not None and rank < len(a):
            a, b = _truncated(a.double(), b.double(), rank)
        ranks[path] = len(a)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.to(parts[0][0][0].dtype).contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.to(parts[0][0][1].dtype).contiguous()
    heads = used[0][0].heads
    total = sum(weight for _, weight in used)
    if heads and abs(total) < 1e-8:
        raise ValueError("these weights add up to 0: the experts' heads have no mean")
    for path in heads:
        for index, leaf in enumerate(("weight", "bias")):
            mean = sum(entry.heads[path][index].float() * (weight / total) for entry, weight in used)
            assert isinstance(mean, torch.Tensor)
            tensors[f"base_model.model.{path}.{leaf}"] = mean.to(heads[path][index].dtype).contiguous()
    tensors |= {f"base_model.model.{name}": tensor.contiguous() for name, tensor in used[0][0].replaced.items()}
    saved = [*heads, *(name.rpartition(".")[0] for name in used[0][0].replaced)]
    _write(folder, tensors, _adapter_config(config, ranks, list(dict.fromkeys(map(_saved_module, saved)))), generation)
    return folder


def _saved_module(path: str) -> str:
    """The module that PEFT has to save for a head: for a head of several linears, the module that contains them."""
    parts = path.split(".")
    head = next((index for index, part in enumerate(parts) if part in ("classifier", "score")), len(parts) - 1)
    return ".".join(parts[: head + 1])


def _truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of B A of a smaller rank, by SVD of its core; B A itself is never built."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, s, vt = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vt[:rank]) @ q_a.t(), (q_b @ u[:, :rank]) * root


def _adapter_config(config: PhatgooseConfig, ranks: dict[str, int], heads: list[str]) -> dict[str, Any]:
    """PEFT's config; alpha equals the rank everywhere, so the scaling is 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: other for path, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(config.head),
        "base_model_name_or_path": config.base.get("id"),
        "revision": config.base.get("revision"),
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "modules_to_save": heads or None,
        "fan_in_fan_out": config.backbone.get("model_type") == "gpt2",
    }


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], generation: GenerationConfig | None
) -> None:
    """Write all files atomically."""
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    staging.mkdir()
    try:
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if generation is not None:
            generation.save_pretrained(staging)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


__all__ = ["save_merged_adapter"]
