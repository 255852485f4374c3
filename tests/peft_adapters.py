"""Small models with adapters that PEFT created and saved, as references for merges."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save_peft
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

IDS = torch.tensor([[1, 5, 9, 38, 2, 7]])
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}

# what an adapter may do to embeddings and head -> whether a tied base stays tied
KINDS = {
    "neither": ({}, True),
    "save embeddings": ({"modules_to_save": ["embed_tokens"]}, False),
    "save embeddings, kept tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "save the head": ({"modules_to_save": ["lm_head"]}, False),
    "save both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "LoRA on embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "LoRA on embeddings, kept tied": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "LoRA on both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}, False),
    "rows of embeddings": ({"trainable_token_indices": [5, 38]}, True),
    "rows, by module": ({"trainable_token_indices": {"embed_tokens": [9]}}, True),
    "grown": ({"rows": 42}, True),
    "grown, save embeddings": ({"rows": 42, "modules_to_save": ["embed_tokens"]}, False),
    "grown, LoRA on embeddings": ({"rows": 42, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, logits of about 10 from sums of 16 to 40 products


def save_llama(folder: Path, seed: int = 0, vocabulary: int = 40, tied: bool = False, **options: Any) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, vocab_size=vocabulary, tie_word_embeddings=tied, pad_token_id=0, **options)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def save_bert(folder: Path, labels: tuple[str, ...] = ("no", "yes"), seed: int = 0) -> Path:
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=40, **names)).save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, seed: int, rows: int | None = None, labels: tuple[str, ...] = (), **options: Any
) -> PeftModel:
    """A random adapter as PEFT saves it, and the model that PEFT makes of it.

    Args:
        folder: for the adapter.
        base: its base's folder.
        seed: of its values.
        rows: that the base's embeddings are resized to before.
        labels: of a head of its own, named in a ``config.json`` beside the adapter.
        options: of `LoraConfig`.
    """
    if labels:
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=len(labels), ignore_mismatched_sizes=True
        )
        options = {"task_type": "SEQ_CLS", "target_modules": ["query"], **options}
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **options}
    if rows:
        torch.manual_seed(9)  # new rows are the same for all adapters of one base
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights: what becomes of them is tested
        made = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **options))
        torch.manual_seed(seed)
        for parameter in made.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        save_peft(made, folder)
    if labels:
        (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    return made.eval()


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def loaded(folder: Path, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A folder's model; every tensor must have its place, and every place its tensor."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()
