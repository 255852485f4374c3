"""Tiny experts of real architectures, which the tests fuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_fusion.types import Adapter

if TYPE_CHECKING:
    from peft import PeftModel

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "experts are fused into one model that is better than any of them",
    "a stitch in time saves nine, said the router to the gate",
]
# What float32 may leave of rounding where sums are added up in another order (other batches, kernels, threads): of two
# layers with four sums one after the other, each of at most 64 products, in a share of what they come to.
SUMS = 2 * 4 * 64 * torch.finfo(torch.float32).eps
TEXTS = ["the quick fox", "experts are fused into one better model, said the gate", "a dog", "nine lazy routers jump"]


def make_tokenizer(vocabulary: int = 300, lower: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences; other sizes give other token ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def names(labels: Sequence[str]) -> dict:
    """Config arguments that name the classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def bert(labels: Sequence[str], seed: int = 0, hidden: int = 32, **config) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * hidden}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=400, pad_token_id=0, **sizes, **names(labels), **config)
    )
    for parameter in model.parameters():  # fresh models answer almost alike; these must not
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def distilbert(labels: Sequence[str], seed: int = 0) -> DistilBertForSequenceClassification:
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=400, dim=24, n_layers=2, n_heads=2, hidden_dim=48, pad_token_id=0, **names(labels)
    )
    return DistilBertForSequenceClassification(config).eval()


def vit(labels: Sequence[str], seed: int = 0, channels: int = 3) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(image_size=16, patch_size=8, num_channels=channels, **sizes, **names(labels))
    return ViTForImageClassification(config).eval()


def resnet(labels: Sequence[str], seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **names(labels))
    return ResNetForImageClassification(config).eval()


def image_processor(size: int) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def grey_processor(size: int) -> ViTImageProcessorPil:
    """For experts with one channel."""
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5], image_std=[0.5])


def images(count: int = 4) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(count)]


def llama(seed: int = 0, hidden: int = 32, vocabulary: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=64,
        vocab_size=vocabulary,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **heads,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0, vocabulary: int = 400) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=300,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return T5ForConditionalGeneration(config).eval()


def adapter(base: torch.nn.Module, rank: int, classes: int | None, seed: int, targets: Sequence[str]) -> Adapter:
    """A random LoRA on the linears whose path ends in one of `targets`, with a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for path, module in base.named_modules():
        if path.endswith(tuple(targets)) and hasattr(module, "weight") and "classifier" not in path:
            shape = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.T.shape
            a = torch.randn(rank, shape[1], generator=generator) * 0.3
            lora[path] = (a, torch.randn(shape[0], rank, generator=generator) * 0.3)
    saved = {}
    if classes:
        saved["classifier.weight"] = torch.randn(classes, base.config.hidden_size, generator=generator)
        saved["classifier.bias"] = torch.randn(classes, generator=generator)
    return Adapter(lora, saved)


def merged(base: torch.nn.Module, adapter: Adapter, labels: Sequence[str]) -> torch.nn.Module:
    """What an adapter stands for, the plain way: W + BA, its head copied in."""
    config = type(base.config).from_dict({**base.config.to_dict(), **names(labels)})
    model = type(base)(config).eval()
    state = {k: v.clone() for k, v in base.state_dict().items() if k not in adapter.saved} | dict(adapter.saved)
    for path, (a, b) in adapter.lora.items():
        update = b @ a
        weight = state[f"{path}.weight"]
        state[f"{path}.weight"] = weight + (update if weight.shape == update.shape else update.T)
    model.load_state_dict(state)
    return model


def save_peft(model: PeftModel, folder: Path) -> None:
    """Saves a model's adapter as PEFT does, without a card, which would name the path of its base on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    card = folder / "README.md"
    card.touch()  # a card that is there is changed; for a new one a template is compiled each time
    model.save_pretrained(folder)
    card.unlink()


def save_linearized(
    folder: Path, base: torch.nn.Module, config: Any, seed: int = 3, start_b: float = 0.0
) -> dict[str, torch.nn.Module]:
    """An L-LoRA as fusion_bench stores it, trained by chance from where PEFT starts; gives its layers by path.

    Each layer remembers where it started, as `start`. The base is changed in place.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(base, config).eval()
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}
    tensors = {}
    for path, layer in layers.items():
        torch.nn.init.constant_(layer.lora_B["default"].weight, start_b)
        layer.start = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
        for place, (name, tensor) in enumerate(layer.named_parameters()):
            if tensor.requires_grad:
                tensors[f"{path}.params0_values.{place}"] = layer.start[name]
                torch.nn.init.normal_(tensor, std=0.2)
                tensors[f"{path}.model.{name}"] = tensor.detach().clone()
    config.base_model_name_or_path = "openai/clip-vit-base-patch16"
    config.save_pretrained(folder)
    save_file(tensors, folder / "linearized_adapter_model.safetensors")
    return {path.removeprefix("base_model.model."): layer for path, layer in layers.items()}


def save_phatgoose_checkpoint(file: Path, base: torch.nn.Module, experts: int, rank: int = 4, seed: int = 0) -> None:
    """Experts of a T5 with gates as PHATGOOSE's authors store them: one file, all linears of the blocks."""
    torch.manual_seed(seed)
    tensors = {f"{side}.embed_tokens.weight": torch.zeros(1) for side in ("encoder", "decoder")}
    for path, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and ".block." in path:
            for number in range(experts):
                tensors[f"{path}._addons.expert_lora.layer1__{number}"] = torch.randn(module.in_features, rank)
                tensors[f"{path}._addons.expert_lora.layer2__{number}"] = torch.randn(rank, module.out_features) / 4
                tensors[f"{path}._addons.router.expert_embeddings__{number}"] = torch.randn(module.in_features)
    torch.save(tensors, file)
