"""Tiny bases of all architectures that WEMoE supports, and full fine-tunes of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny import bert, distilbert, gpt2, llama, make_tokenizer, t5, vit
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_fusion import Expert

IDS = torch.tensor([[5, 9, 33, 7, 100, 21], [8, 4, 90, 11, 3, 0], [45, 3, 17, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
TARGETS = torch.tensor([[0, 14, 15, 2], [0, 7, 8, 9], [0, 22, 6, 3]])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": MASK}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def t5_gated() -> T5ForConditionalGeneration:
    """Flan-T5's manner."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return T5ForConditionalGeneration(
        T5Config(**sizes, **tokens, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ).eval()


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))
    }
    tokens = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    return BartForConditionalGeneration(BartConfig(d_model=32, vocab_size=300, **sides, **tokens)).eval()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=300, dropout=0.0, **sizes, **tokens)).eval()


def clip_vision() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **TOWER)).eval()


def clip() -> CLIPModel:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = CLIPTextConfig(vocab_size=300, max_position_embeddings=16, **tokens, **TOWER)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **TOWER)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()


def bert_base() -> PreTrainedModel:
    return bert(["x", "y"])


def fine_tuned(base: nn.Module, seed: int, scale: float = 0.15, only: str = "") -> nn.Module:
    """A copy of the base, every float tensor moved by a share of its own size, ties kept."""
    torch.manual_seed(1000 + seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(only):
                size = max(float(parameter.std(correction=0)), 0.02)
                parameter.add_(torch.randn_like(parameter) * scale * size)
    return model


def experts_of(base: nn.Module, count: int = 3, labels: Sequence[str] = (), **options) -> list[Expert]:
    """Full fine-tunes of a base as loaded experts."""
    return [Expert(f"me/expert-{k}", fine_tuned(base, k, **options), labels=list(labels)) for k in range(count)]


def base_expert(base: nn.Module) -> Expert:
    return Expert("me/base", base)


def rows(pattern: str, *names: str, layers: int = 2) -> dict[str, list[str]]:
    """Units of equal layers: a pattern with {i}, and the names of its linears."""
    return {pattern.format(i=i): [f"{pattern.format(i=i)}.{name}" for name in names] for i in range(layers)}


DENSE = ("intermediate.dense", "output.dense")
SEQ2SEQ = {**TEXT, "decoder_input_ids": TARGETS}
GATED = ("DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo")
PLAIN = ("DenseReluDense.wi", "DenseReluDense.wo")
FC = ("mlp.fc1", "mlp.fc2")

# name -> base, its MLPs, inputs
SHAPES = {
    "bert": (bert_base, rows("bert.encoder.layer.{i}", *DENSE), TEXT),
    "distilbert": (
        lambda: distilbert(["x", "y"]),
        rows("distilbert.transformer.layer.{i}", "ffn.lin1", "ffn.lin2"),
        TEXT,
    ),
    "vit": (lambda: vit(["x", "y"]), rows("vit.layers.{i}", *FC), {"pixel_values": PIXELS}),
    "clip vision": (clip_vision, rows("encoder.layers.{i}", *FC), {"pixel_values": PIXELS}),
    "clip": (
        clip,
        {**rows("text_model.encoder.layers.{i}", *FC), **rows("vision_model.encoder.layers.{i}", *FC)},
        {**TEXT, "pixel_values": PIXELS},
    ),
    "gpt2": (gpt2, rows("transformer.h.{i}", "mlp.c_fc", "mlp.c_proj"), TEXT),
    "llama": (llama, rows("model.layers.{i}", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), TEXT),
    "opt": (opt, rows("model.decoder.layers.{i}", "fc1", "fc2"), TEXT),
    "t5": (t5, {**rows("encoder.block.{i}.layer.1", *PLAIN), **rows("decoder.block.{i}.layer.2", *PLAIN)}, SEQ2SEQ),
    "t5 gated": (
        t5_gated,
        {**rows("encoder.block.{i}.layer.1", *GATED), **rows("decoder.block.{i}.layer.2", *GATED)},
        SEQ2SEQ,
    ),
    "bart": (
        bart,
        {**rows("model.encoder.layers.{i}", "fc1", "fc2"), **rows("model.decoder.layers.{i}", "fc1", "fc2")},
        SEQ2SEQ,
    ),
}


def save_fine_tunes(folder: Path, card: str = "") -> PreTrainedModel:
    """A classifier and two fine-tunes of it, "base", "foxes" and "dogs", with tokenizers; gives back the base."""
    base = bert_base()
    for name, model in [("base", base), ("foxes", fine_tuned(base, 0)), ("dogs", fine_tuned(base, 1))]:
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        if card:
            (folder / name / "README.md").write_text(card)
    return base
