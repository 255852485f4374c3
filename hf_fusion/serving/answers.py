"""Answers in the format of OpenAI's API, and of vLLM's `/classify`."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch

from hf_fusion.serving.rows import AnswerRow, ReadRow, TokenScore

REGRESSION = "regression"


def usage_of(rows: Sequence[AnswerRow], answers: int) -> dict[str, int]:
    """The tokens of a request.

    Args:
        rows: all its answers.
        answers: for each prompt, which is counted once.
    """
    read, written = sum(row.size for row in rows[::answers]), sum(len(row.tokens) for row in rows)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


@dataclass
class AnswerFormat:
    """How one request's answers are written, whole or in chunks.

    Attributes:
        model: its name.
        chat: whether it is a chat, or a completion of a text.
        alternatives: of each token whose log probabilities are shown; None shows none.
        with_usage: whether a stream ends with the usage.
    """

    model: str
    chat: bool
    alternatives: int | None
    with_usage: bool = False
    id: str = field(default="", init=False)
    created: int = field(default_factory=lambda: int(time.time()), init=False)
    _offsets: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid4().hex}"

    def whole(self, rows: Sequence[AnswerRow], answers: int) -> dict[str, Any]:
        """The response without a stream."""
        choices = []
        for row in rows:
            text = {"message": {"role": "assistant", "content": row.text}} if self.chat else {"text": row.text}
            choices.append(self._choice(row, text, row.scores, row.reason))
        return {**self._head(""), "choices": choices, "usage": usage_of(rows, answers)}

    def first(self, row: AnswerRow) -> dict[str, Any] | None:
        """The chunk with which an answer of a chat begins."""
        return self._chunk(row, {"delta": {"role": "assistant", "content": ""}}, [], None) if self.chat else None

    def part(self, row: AnswerRow, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """A chunk with new text."""
        return self._chunk(row, {"delta": {"content": text}} if self.chat else {"text": text}, scores, None)

    def last(self, row: AnswerRow) -> dict[str, Any]:
        """The chunk that says why an answer ended."""
        return self._chunk(row, {"delta": {}} if self.chat else {"text": ""}, [], row.reason)

    def usage(self, rows: Sequence[AnswerRow], answers: int) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head(".chunk"), "choices": [], "usage": usage_of(rows, answers)}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, row: AnswerRow, text: Any, scores: Sequence[TokenScore], reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.with_usage else {}
        return {**self._head(".chunk"), "choices": [self._choice(row, text, scores, reason)], **usage}

    def _choice(self, row: AnswerRow, text: Any, scores: Sequence[TokenScore], reason: str | None) -> dict[str, Any]:
        logprobs = None if self.alternatives is None or not (scores or reason) else self._logprobs(row, scores)
        routing = {"routing": row.routing} if reason and row.sampling.routing else {}
        return {"index": row.index, **text, "logprobs": logprobs, "finish_reason": reason, **routing}

    def _logprobs(self, row: AnswerRow, scores: Sequence[TokenScore]) -> dict[str, Any]:
        if self.chat:
            return {"content": [_scored(score) for score in scores]}
        offsets = []
        for score in scores:
            offsets.append(self._offsets.get(row.index, 0))
            self._offsets[row.index] = offsets[-1] + len(score.text)
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{text: value for text, _, value in score.top} for score in scores],
            "text_offset": offsets,
        }


def _scored(score: TokenScore) -> dict[str, Any]:
    top = [{"token": text, "bytes": data, "logprob": value} for text, data, value in score.top]
    return {"token": score.text, "bytes": score.data, "logprob": score.logprob, "top_logprobs": top}


def embeddings(model: str, rows: Sequence[ReadRow], base64_wanted: bool) -> dict[str, Any]:
    """The response of `/v1/embeddings`."""
    data = []
    for row in rows:
        packed = base64.b64encode(struct.pack(f"<{len(row.output)}f", *row.output)).decode() if base64_wanted else None
        routing = {"routing": row.routing} if row.routing else {}
        data.append({"object": "embedding", "index": row.index, "embedding": packed or row.output, **routing})
    return {"object": "list", "data": data, "model": model, "usage": _read_usage(rows)}


def classes(model: str, rows: Sequence[ReadRow], problem: str | None) -> dict[str, Any]:
    """The response of `/classify`.

    Args:
        model: its name.
        rows: of the request.
        problem: ``problem_type`` of the model's config. Probabilities of several labels do not sum to 1; a regression
            has its value in their place.
    """
    data = []
    for row in rows:
        logits = torch.tensor(row.output)
        if problem == REGRESSION or len(logits) == 1:
            values = logits
        else:
            values = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
        routing = {"routing": row.routing} if row.routing else {}
        found = {"label": row.labels[int(values.argmax())], "probs": values.tolist(), "num_classes": len(logits)}
        data.append({"index": row.index, **found, "labels": row.labels, **routing})
    created = int(time.time())
    head = {"id": f"classify-{uuid4().hex}", "object": "list", "created": created, "model": model}
    return {**head, "data": data, "usage": _read_usage(rows)}


def _read_usage(rows: Sequence[ReadRow]) -> dict[str, int]:
    read = sum(row.size for row in rows)
    return {"prompt_tokens": read, "total_tokens": read}


__all__ = ["AnswerFormat", "classes", "embeddings", "usage_of"]
