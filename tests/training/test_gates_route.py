"""Gates trained separately and combined: each token is routed to the expert of its task."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import llama, make_tokenizer
from torch import nn

from hf_fusion import Expert, PhatgooseRouter, train_gates
from hf_fusion.hub.lora import read_adapter

LETTERS = ("abcdefgh", "ijklmnop", "qrstuvwx")


def walks(letters: str, seed: int, count: int) -> list[str]:
    """Each letter is followed by the next one, from a random start."""
    starts = torch.randint(len(letters), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ["".join(letters[(start + i) % len(letters)] for i in range(11)) for start in starts]


def letter_experts(seed: int = 0) -> list[Expert]:
    """An adapter for each group of letters, whose embeddings lie together, so that a token says whose it is."""
    base, tokenizer = llama(), make_tokenizer(259)  # bytes alone: a token is a letter
    torch.manual_seed(seed)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "".join(LETTERS)}
    for letters in LETTERS:
        center = torch.randn(32)
        for letter in letters:
            base.model.embed_tokens.weight.data[ids[letter]] = center + 0.5 * torch.randn(32)
    experts = []
    for letters in LETTERS:
        model = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=["v_proj", "up_proj"])
        )
        batch = torch.tensor([[ids[letter] for letter in walk] for walk in walks(letters, 0, 64)])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            expert = Expert(letters, base, read_adapter(folder, letters), tokenizer)
        rows = {"prompt": [w[:2] for w in walks(letters, 1, 64)], "target": [w[2:] for w in walks(letters, 1, 64)]}
        experts.append(replace(expert, gates=train_gates(expert, datasets.Dataset.from_dict(rows), gates="paper")))
    return experts


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_every_token_finds_the_expert_that_knows_it(seed):
    """Gates that never saw each other: the expert with the most weight is the right one for 95 % of the tokens."""
    experts = letter_experts(seed)
    router = PhatgooseRouter.from_experts(experts, top_k=1)
    router.record_routing = 4096
    right = []
    for index, expert in enumerate(experts):
        inputs = expert.processor(walks(expert.name, 2, 32), return_tensors="pt")
        with torch.no_grad():
            router(**inputs)
        chosen = router.routing_trace().mean_weights().argmax(-1)
        assert chosen.shape == (32, 11)
        right.append((chosen == index).float().mean())
    assert sum(right) / len(right) >= 0.95
