"""Encodes prompts with targets for language models: shared by LoRA training, gate training and evaluation.

Batches are padded by transformers' ``DataCollatorForSeq2Seq(tokenizer)``, for causal models too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_fusion.types import ForwardModel

IGNORED = -100
"""The label of positions that the loss ignores."""


def encode_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool = False, max_length: int = 512
) -> Dataset:
    """Tokenizes rows of prompts and targets.

    A causal model gets prompt, target and end-of-sequence token as one sequence, with labels on the last two. An
    encoder-decoder gets the prompt as its input and the target as its labels. Long prompts are truncated on the left,
    since the question is usually at the end; targets are never truncated.

    Args:
        dataset: columns ``prompt`` and ``target``, used literally: chat markup is part of the prompt.
        tokenizer: the model's.
        is_encoder_decoder: whether the model has an encoder.
        max_length: longest sequence (causal) or prompt (encoder-decoder), in tokens.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (`IGNORED` on the prompt); other columns are dropped.

    Raises:
        FusionError: a column is missing, the tokenizer has no end-of-sequence token, or a target leaves no room for
            its prompt.
    """
    if missing := [name for name in ("prompt", "target") if name not in dataset.column_names]:
        raise FusionError(
            f"the data set has columns {dataset.column_names}, but no {' and no '.join(missing)}",
            hint="dataset.rename_columns({'question': 'prompt', 'answer': 'target'})",
        )
    eos = tokenizer.eos_token_id
    if eos is None and not is_encoder_decoder:
        raise FusionError(
            "the tokenizer has no end-of-sequence token, so a target would have no end", hint="tokenizer.eos_token = …"
        )

    def causal(row: dict[str, str]) -> dict[str, list[int]]:
        target = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], eos]
        room = max_length - len(target)
        if room < 1:
            raise FusionError(
                f"a target has {len(target)} tokens and max_length={max_length} leaves no room for its prompt",
                hint=f"max_length={2 * len(target)}",
            )
        prompt = tokenizer(row["prompt"])["input_ids"][-room:]
        return {
            "input_ids": prompt + target,
            "attention_mask": [1] * (len(prompt) + len(target)),
            "labels": [IGNORED] * len(prompt) + target,
        }

    def seq2seq(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"][-max_length:]
        target = tokenizer(text_target=row["target"])["input_ids"]
        return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": target}

    return dataset.map(
        seq2seq if is_encoder_decoder else causal, remove_columns=dataset.column_names, desc="Encoding prompts"
    )


@torch.no_grad()
def target_scores(
    model: PreTrainedModel, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores greedy decoding against the targets with one teacher-forced forward pass, without generating text.

    Greedy decoding reproduces a target exactly if and only if each of its tokens is the most likely one after the
    prompt and the target's earlier tokens.

    Args:
        model: a causal or encoder-decoder language model; run in evaluation mode, which is restored afterwards.
        encoded: rows from `encode_prompts`.
        tokenizer: the model's.
        batch_size: rows per forward pass, sorted by length.

    Returns:
        For each row, whether greedy decoding reproduces its target, (N,) bool; and the share of its target tokens,
        end-of-sequence included, that are the most likely given the earlier ones, (N,) float.
    """
    from transformers import DataCollatorForSeq2Seq

    collate = DataCollatorForSeq2Seq(tokenizer, model=model if model.config.is_encoder_decoder else None)
    rows = [dict(row) for row in encoded]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    exact, share = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows))
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        scores = score_targets(model, collate([rows[row] for row in indices]).to(model.device))
        exact[indices], share[indices] = (score.cpu() for score in scores)
    model.train(training)
    return exact, share


@torch.no_grad()
def score_targets(model: ForwardModel, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`target_scores` for one collated batch (with ``labels``): (B,) bool, (B,) float."""
    logits, labels = target_logits(model, batch)
    predicted = logits.argmax(-1)  # (B, T)
    counted = labels != IGNORED
    correct = (predicted == labels) & counted
    return (correct == counted).all(1), correct.sum(1) / counted.sum(1)


def target_logits(model: ForwardModel, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) and the labels that they predict (B, T), from the first position on that has a label.

    Args:
        model: a causal or encoder-decoder language model.
        batch: with ``labels``.
    """
    inputs: dict[str, Any] = {**batch, "use_cache": False}
    if model.config.is_encoder_decoder:
        return model(**inputs).logits, inputs["labels"]
    labels = inputs.pop("labels")[:, 1:]  # a causal model's logits predict the next position
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # skips the logits of the prompts
        first = int((labels != IGNORED).any(0).nonzero()[0])
        labels = labels[:, first:]
        inputs["logits_to_keep"] = labels.shape[1] + 1
    return model(**inputs).logits[:, : labels.shape[1]], labels
