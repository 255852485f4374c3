"""Tiny models of every family, as they are served."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import openai
import torch
from models.test_embeddings import foe, reader, router, wemoe
from models.test_phatgoose_gaussian import router_of
from tiny import bert, gpt2, image_processor, llama, make_tokenizer, t5, vit

from hf_fusion.serving import Limits, ModelServer, ServedModel

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}<s>"
PROMPTS = [
    "the quick brown fox",
    "a stitch in time saves nine, said the router",
    "experts",
    "over the lazy dog jumps a",
]
LIMITS = Limits(rows=4, waiting=16, tokens=48, seconds=60)


def speaking(model: Any) -> Any:
    """The model, with answers that do not end by chance."""
    model.generation_config.eos_token_id = None
    return model


def mixed(model: Any) -> Any:
    """The model with other weights: a fresh T5 writes the same whatever it reads."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return speaking(model)


def tokenizer() -> Any:
    found = make_tokenizer()
    found.chat_template = TEMPLATE
    return found


# name → the model, and its processor where it is not the tokenizer
WORLDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: speaking(llama()),
    "gpt2": lambda: speaking(gpt2(vocabulary=300)),
    "t5": lambda: mixed(t5()),
    "phatgoose": lambda: speaking(router_of("llama", top_k=1)),
    "phatgoose seq2seq": lambda: mixed(router("seq2seq-lm")),
    "wemoe": lambda: speaking(wemoe("causal-lm")),
    "wemoe seq2seq": lambda: mixed(wemoe("seq2seq-lm")),
    "foe": lambda: speaking(foe("causal-lm")),
    "classes": lambda: bert(["good", "bad", "odd"]),
    "classes phatgoose": lambda: router("sequence-classification"),
    "classes wemoe": lambda: wemoe("sequence-classification"),
    "classes foe": lambda: foe("sequence-classification"),
    "images": lambda: vit(["cat", "dog"]),
    "images wemoe": lambda: wemoe("image-classification"),
    "features": reader,
    "features phatgoose": lambda: router("features"),
    "features wemoe": lambda: wemoe("features"),
}


@cache
def world(name: str) -> ServedModel:
    """The served model of a name."""
    torch.manual_seed(0)
    model = WORLDS[name]().eval()
    processor = model.processor if name.endswith("foe") else None
    processor = processor or (image_processor(16) if name.startswith("images") else tokenizer())
    for each in getattr(processor, "processors", []):
        each.chat_template = TEMPLATE
    return ServedModel.of(model, processor, "tiny")


def server_of(name: str, limits: Limits = LIMITS) -> ModelServer:
    return ModelServer(world(name), limits=limits)


def client_of(server: ModelServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.endpoint}/v1", api_key="none", max_retries=0, timeout=60)


def own_answer(name: str, prompt: str, tokens: int = 12, **options: Any) -> str:
    """What the model's own `generate()` writes."""
    served = world(name)
    inputs = served.processor(text=[prompt], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = served.model.generate(**inputs, max_new_tokens=tokens, **options)[0]
    start = 0 if served.is_encoder_decoder or served.selects else inputs["input_ids"].shape[1]
    if served.selects:
        ids = ids[inputs["input_ids"].shape[1] :]
    return str(served.processor.decode(ids[start:], skip_special_tokens=True))
