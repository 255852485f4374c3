"""Predictions for rows and what they are compared with: the form in which every model's output is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.training.batches import class_logits
from hf_fusion.training.dense import dense_statistics, map_outputs
from hf_fusion.training.prompts import IGNORED, score_targets, target_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_fusion.types import ForwardModel

WRITTEN_TOKENS = 128  # of an answer that does not end before


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for N rows, and the references: values as the rows' metric takes them, N each."""

    predictions: Sequence[Any]
    references: Sequence[Any]

    def of_rows(self, indices: Sequence[int]) -> Predictions:
        """The predictions for some of the rows."""
        return Predictions([self.predictions[row] for row in indices], [self.references[row] for row in indices])


@torch.no_grad()
def predict_batch(
    model: ForwardModel, inputs: Mapping[str, Any], reads: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Predictions:
    """A model's predictions for a batch, by one forward where no text is to be written.

    Args:
        model: called with the inputs.
        inputs: a batch with ``labels``.
        reads: what is read of the model's output, see `hf_fusion.evaluation.task_metrics.Reads`.
        tokenizer: of "texts".
    """
    if reads in ("targets", "tokens"):
        exact, share = score_targets(model, inputs)
        values = exact.long() if reads == "targets" else share
        return Predictions(values.tolist(), [1] * len(values))
    if reads in ("losses", "ranks"):  # rows whose answers are ranked come once for each choice
        return _losses(model, inputs)
    if reads == "texts":
        assert tokenizer is not None
        return _texts(model, inputs, tokenizer)
    if reads == "embeddings":
        first = model(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state[:, 0]
        return Predictions(first.tolist(), [0] * len(first))
    if reads == "maps":
        return Predictions(*dense_statistics(map_outputs(model, inputs), inputs["labels"]))
    return from_logits(class_logits(model, inputs), inputs["labels"], reads)


def from_logits(logits: torch.Tensor, labels: torch.Tensor, reads: str) -> Predictions:
    """A classifier's predictions from its logits (N, C): the likeliest class, its first output, or all of them."""
    values = {"classes": lambda: logits.argmax(-1), "numbers": lambda: logits[:, 0], "logits": lambda: logits}[reads]()
    return Predictions(values.tolist(), labels.tolist())


def _losses(model: ForwardModel, inputs: Mapping[str, Any]) -> Predictions:
    """Mean loss of each row's target in nats per token, and how many tokens it has."""
    logits, labels = target_logits(model, inputs)
    logits = logits.float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    counts = (labels != IGNORED).sum(1)
    return Predictions((losses.sum(1) / counts).tolist(), counts.double().tolist())


def _texts(model: Any, inputs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Predictions:
    """Greedy answers to prompts of `WRITTEN_TOKENS` at most, row by row so that none is padded, and the targets."""
    written, right = [], []
    for row in range(len(inputs["labels"])):
        target = inputs["labels"][row] != IGNORED
        prompt = inputs["attention_mask"][row].bool()
        if not model.config.is_encoder_decoder:
            prompt &= ~target
        given = {name: inputs[name][row][prompt][None] for name in ("input_ids", "attention_mask")}
        sequence = model.generate(**given, max_new_tokens=WRITTEN_TOKENS, do_sample=False, num_beams=1)[0]
        answer = sequence if model.config.is_encoder_decoder else sequence[given["input_ids"].shape[1] :]
        written.append(tokenizer.decode(answer, skip_special_tokens=True))
        right.append(tokenizer.decode(inputs["labels"][row][target], skip_special_tokens=True))
    return Predictions(written, right)
