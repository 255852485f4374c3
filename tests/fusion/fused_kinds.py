"""A tiny fused model of each kind, saved to a folder, with inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tiny import adapter, bert, image_processor, llama, make_tokenizer, vit
from tiny_fused import IDS, MASK, PIXELS, base_expert, bert_base, experts_of, fine_tuned

from hf_fusion import Expert, FoEModel, PhatgooseRouter, WEMoEModel, fuse, save_fused
from hf_fusion.types import Gates

TEXT = {"input_ids": IDS, "attention_mask": MASK}
LABELS = ["no", "yes"]


def foe(folder: Path) -> None:
    experts = [Expert(f"me/bert-{k}", bert(LABELS, k), None, make_tokenizer(), LABELS) for k in range(2)]
    FoEModel.from_experts(experts, fuser_hidden=[8]).save_pretrained(folder)


def foe_images(folder: Path) -> None:
    experts = [
        Expert(f"me/vit-{k}", vit(own, k), None, image_processor(16), own)
        for k, own in enumerate((LABELS, ["maybe", "yes"]))
    ]
    FoEModel.from_experts(experts, mode="selection", fuser_hidden=[8]).save_pretrained(folder)


def foe_language(folder: Path) -> None:
    experts = [Expert(f"me/llama-{k}", llama(k), processor=make_tokenizer()) for k in range(2)]
    FoEModel.from_experts(experts, mode="selection", fuser_hidden=[8]).save_pretrained(folder)


def foe_adapters(folder: Path) -> None:
    base, tokenizer = bert(LABELS), make_tokenizer()
    experts = [
        Expert(f"me/lora-{k}", base, adapter(base, 2 + k, 2, k, ["query", "value"]), tokenizer, LABELS)
        for k in range(2)
    ]
    FoEModel.from_experts(experts, fuser_hidden=[8]).save_pretrained(folder)


def phatgoose(folder: Path) -> None:
    base, tokenizer, experts = llama(), make_tokenizer(), []
    for k in range(2):
        own = adapter(base, 4, None, k, ["q_proj", "v_proj"])
        generator = torch.Generator().manual_seed(k)
        gates = Gates({path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in own.lora.items()})
        experts.append(Expert(f"me/lora-{k}", base, own, tokenizer, gates=gates))
    PhatgooseRouter.from_experts(experts).save_pretrained(folder)


def wemoe(folder: Path) -> None:
    base, experts = bert_base(), experts_of(bert_base(), 2, LABELS)
    experts[0].processor = make_tokenizer()
    WEMoEModel.from_experts(experts, base_expert(base), task_vectors="sparse").save_pretrained(folder)


def static(folder: Path) -> None:
    experts = [Expert(f"me/bert-{k}", fine_tuned(bert_base(), k), None, make_tokenizer(), ["x", "y"]) for k in range(2)]
    save_fused(fuse("linear", experts), folder)


# kind -> how it is saved, inputs, the Auto class that loads it anywhere
KINDS: dict[str, tuple[Callable[[Path], None], dict[str, torch.Tensor], str]] = {
    "foe": (foe, TEXT, "AutoModelForSequenceClassification"),
    "foe images": (foe_images, {"pixel_values": PIXELS}, "AutoModelForImageClassification"),
    "foe language": (foe_language, TEXT, "AutoModelForCausalLM"),
    "foe adapters": (foe_adapters, TEXT, "AutoModelForSequenceClassification"),
    "phatgoose": (phatgoose, TEXT, "AutoModelForCausalLM"),
    "wemoe": (wemoe, TEXT, "AutoModelForSequenceClassification"),
    "static": (static, TEXT, "AutoModelForSequenceClassification"),
}
