"""Tiny adapters with gates of a Llama of 32 dimensions, as folders, for tests of PHATGOOSE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import adapter, llama, make_tokenizer

from hf_fusion.hub.gates_file import save_gates
from hf_fusion.types import Gates

CARD = "---\nlicense: {license}\npipeline_tag: text-generation\ntags: [{tags}]\n---\n"


def save_base(folder: Path, seed: int = 0, hidden: int = 32) -> Path:
    """A Llama with random weights, and its tokenizer."""
    llama(seed, hidden).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(license="apache-2.0", tags="base"))
    return folder


def save_lora(
    folder: Path,
    base: str = "",
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    gates: bool = True,
    hidden: int = 32,
    **config: object,
) -> Path:
    """A random LoRA adapter of such a Llama, by default with gates.

    Args:
        base: what it records as its base.
        config: of its ``adapter_config.json``, where it differs.
    """
    folder.mkdir(parents=True)
    lora = adapter(llama(hidden=hidden), rank, None, seed, targets).lora
    halves = {f"{path}.lora_{side}.weight": half for path, pair in lora.items() for side, half in zip("AB", pair)}
    save_file({f"base_model.model.{name}": half for name, half in halves.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    settings |= {"base_model_name_or_path": base, "target_modules": list(targets), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tags = ["hf-fusion-expert"]
    if gates:
        generator = torch.Generator().manual_seed(100 + seed)
        save_gates(Gates({path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in lora.items()}), folder)
        tags.append("phatgoose-gates")
    (folder / "README.md").write_text(CARD.format(license="mit", tags=", ".join(tags)))
    return folder
