"""Tiny fused models that are exported, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from tiny import TEXTS, adapter, llama, make_tokenizer
from tiny_fused import base_expert, bert_base, experts_of

from hf_fusion import Expert, PhatgooseRouter, WEMoEModel
from hf_fusion.types import Gates

LABELS = ["no", "yes"]
ROWS = Dataset.from_dict({"text": TEXTS})


def read(texts=TEXTS, **options):
    return make_tokenizer()(texts, return_tensors="pt", padding=True, **options)


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def wemoe(**options) -> WEMoEModel:
    experts = experts_of(bert_base(), 2, ["x", "y"])
    experts[0].processor = make_tokenizer()
    model = WEMoEModel.from_experts(experts, base_expert(bert_base()), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # routers that answer with other coefficients
            if ".router." in f".{name}":
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    return model


def router(vocabulary: int = 300, tokenizer=None, **options) -> PhatgooseRouter:
    base, experts = llama(vocabulary=vocabulary), []
    for k in range(2):
        own = adapter(base, 3 + k, None, k, ["q_proj", "v_proj"])
        generator = torch.Generator().manual_seed(k)
        gates = Gates({path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in own.lora.items()})
        experts.append(Expert(f"me/lora-{k}", base, own, tokenizer or make_tokenizer(), gates=gates))
    return PhatgooseRouter.from_experts(experts, **options)


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def with_update(base, *weighted):
    """A base with LoRA updates added to its weights."""
    with torch.no_grad():
        for lora, weight in weighted:
            for path, (a, b) in lora.items():
                base.get_submodule(path).weight += weight * (b @ a)
    return base


def lora_of(k: int) -> dict:
    return adapter(llama(), 3 + k, None, k, ["q_proj", "v_proj"]).lora
