"""Prompts with targets become batches, and teacher forcing predicts what greedy decoding generates."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from hf_fusion.errors import FusionError
from hf_fusion.training.prompts import IGNORED, encode_prompts, target_scores

PROMPTS = ["the quick fox", "a dog", "experts are fused into one better model, said", "nine"]
TARGETS = [" jumps over", " is lazy", " the gate", " routers"]
ROWS = Dataset.from_dict({"task": ["t"] * 4, "prompt": PROMPTS, "target": TARGETS})
TOKENIZER = tiny.make_tokenizer()
EOS = TOKENIZER.eos_token_id


def test_labels_are_the_target_and_its_end():
    encoded = encode_prompts(ROWS, TOKENIZER)
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "labels"}
    for row, prompt, target in zip(encoded, PROMPTS, TARGETS, strict=True):
        length = len(TOKENIZER(prompt)["input_ids"])
        assert TOKENIZER.decode(row["input_ids"][:length]) == prompt
        assert row["labels"][:length] == [IGNORED] * length
        assert row["labels"][length:] == row["input_ids"][length:]
        assert TOKENIZER.decode(row["input_ids"][length:-1]) == target
        assert row["input_ids"][-1] == EOS
        assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_long_prompt_is_truncated_and_the_target_kept():
    whole = encode_prompts(ROWS, TOKENIZER)
    targets = [sum(label != IGNORED for label in row["labels"]) for row in whole]
    limit = max(targets) + 2
    for row, cut, target in zip(whole, encode_prompts(ROWS, TOKENIZER, max_length=limit), targets, strict=True):
        assert cut["input_ids"] == row["input_ids"][-limit:]
        assert cut["labels"] == row["labels"][-limit:]
        assert sum(label != IGNORED for label in cut["labels"]) == target
    with pytest.raises(FusionError, match="leaves no room"):
        encode_prompts(ROWS, TOKENIZER, max_length=max(targets))


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_target():
    tokenizer = tiny.make_tokenizer()
    for row, prompt, target in zip(
        encode_prompts(ROWS, tokenizer, is_encoder_decoder=True), PROMPTS, TARGETS, strict=True
    ):
        assert row["input_ids"] == tokenizer(prompt)["input_ids"]
        assert row["labels"] == tokenizer(text_target=target)["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_collator_pads_causal_batches(side):
    tokenizer = tiny.make_tokenizer()
    tokenizer.padding_side = side
    encoded = encode_prompts(ROWS, tokenizer)
    batch = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in encoded])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for index, row in enumerate(encoded):
        kept = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][kept].tolist() == row["input_ids"]
        assert batch["labels"][index][kept].tolist() == row["labels"]
        assert (batch["labels"][index][~kept] == IGNORED).all()


def test_bad_data_is_named():
    with pytest.raises(FusionError, match="no target"):
        encode_prompts(ROWS.remove_columns("target"), TOKENIZER)
    endless = tiny.make_tokenizer()
    endless.eos_token = None
    with pytest.raises(FusionError, match="end-of-sequence"):
        encode_prompts(ROWS, endless)


def _written(model, prompt: list[int], length: int) -> list[int]:
    """What a model's own generate() writes, greedily."""
    ids = torch.tensor([prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, eos_token_id=EOS
    )
    return written[0].tolist()[1 if model.config.is_encoder_decoder else len(prompt) :]


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.t5], ids=["llama", "gpt2", "t5"])
def test_exact_match_equals_generation(build):
    model, rows, expected = build().train(), [], []
    for number, text in enumerate(PROMPTS):
        prompt = TOKENIZER(text)["input_ids"]
        written = _written(model.eval(), prompt, 3 + number)
        wrong = [(token + 1) % 250 for token in written]
        for target in (written, [*written[:-1], wrong[-1]], [wrong[0], *written[1:]]):
            whole = target if model.config.is_encoder_decoder else [IGNORED] * len(prompt) + target
            ids = prompt if model.config.is_encoder_decoder else prompt + target
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": whole})
            expected.append(_written(model, prompt, len(target)) == target)
    model.train()
    exact, share = target_scores(model, Dataset.from_list(rows), TOKENIZER, batch_size=5)
    assert exact.tolist() == expected == [True, False, False] * len(PROMPTS)
    assert ((share == 1) == exact).all()
    assert torch.equal(exact, target_scores(model, Dataset.from_list(rows), TOKENIZER, batch_size=1)[0])
    assert model.training
