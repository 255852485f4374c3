"""What is computed for a request: one row for each answer, embedding or classification."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_fusion.serving.errors import ApiError
from hf_fusion.serving.texts import AnswerText, Decode


class Inbox:
    """What the thread of the model tells a request of the event loop: (row, what is new) pairs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Row, Any]] = asyncio.Queue()

    def put(self, row: Row, news: Any) -> None:
        """Called by the thread of the model."""
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (row, news))

    async def get(self) -> tuple[Row, Any]:
        """The next news, in order."""
        return await self._queue.get()


@dataclass(eq=False)
class Row:
    """One input of the model.

    Attributes:
        inbox: of the request it belongs to.
        index: its index in the request.
        size: tokens of the input, 0 for images.
        cancelled: set when nobody waits for it.
        error: why it failed.
        done: whether it is finished, or failed.
    """

    inbox: Inbox
    index: int
    size: int
    cancelled: bool = field(default=False, init=False)
    error: ApiError | None = field(default=None, init=False)
    done: bool = field(default=False, init=False)

    @property
    def ended(self) -> bool:
        """Whether nothing more is computed for it."""
        return self.done or self.cancelled

    def finish(self, error: ApiError | None = None) -> None:
        """Tells the request that this row is done."""
        if not self.done:
            self.error, self.done = error, True
            self.inbox.put(self, None)


@dataclass(eq=False)
class ReadRow(Row):
    """An input whose embedding or classes are wanted.

    Attributes:
        inputs: what the processor is called with: ``text``, ``text_pair`` or ``images``.
        task: the expert whose head predicts; None for the model's default.
        routing: whether the routing is wanted; then the routing, once it is known.
        output: the embedding, or the logits.
        labels: names of the logits.
    """

    inputs: Mapping[str, Any]
    task: str | None = None
    routing: Any = None
    output: list[float] = field(default_factory=list, init=False)
    labels: list[str] = field(default_factory=list, init=False)


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated; None leaves it to the model's generation config.

    Attributes:
        max_tokens: at most so many.
        temperature: 0 takes the most likely token.
        top_p: share of the probability that is sampled from.
        top_k: number of tokens that are sampled from.
        seed: of the row's own random numbers; a row's answer depends on no other row.
        stops: strings that end the answer.
        logprobs: number of alternatives whose log probabilities are wanted beside the token's; None for none at all.
        presence: subtracted from the scores of tokens that were generated before.
        frequency: the same, for each time.
        bias: token → added to its score.
        routing: whether the routing is wanted.
        streams: whether text is wanted as it grows.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    routing: bool = False
    streams: bool = False


@dataclass(frozen=True)
class TokenScore:
    """A generated token with its log probability, and the most likely ones in its place.

    Attributes:
        text: of the token.
        data: its bytes; None for a part of a character.
        logprob: natural logarithm.
        top: (text, bytes, logprob), the most likely first.
    """

    text: str
    data: list[int] | None
    logprob: float
    top: tuple[tuple[str, list[int] | None, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What an answer has grown by.

    Attributes:
        text: new text.
        scores: of the new tokens.
    """

    text: str
    scores: list[TokenScore]


@dataclass(eq=False)
class AnswerRow(Row):
    """A prompt whose answer is generated.

    Attributes:
        prompt: its token ids, for each tokenizer of the model.
        sampling: how it is generated.
        choice: index of the expert that a Fusion of Experts selected for it.
        tokens: generated so far, with the token that ended the answer.
        scores: of the tokens without that, if they are wanted.
        reason: why it ended: "stop" or "length".
        routing: see `hf_fusion.serving.routing`.
    """

    prompt: Sequence[Sequence[int]]
    sampling: Sampling
    choice: int | None = field(default=None, init=False)
    tokens: list[int] = field(default_factory=list, init=False)
    scores: list[TokenScore] = field(default_factory=list, init=False)
    reason: str | None = field(default=None, init=False)
    routing: Any = field(default=None, init=False)
    generator: torch.Generator | None = field(default=None, init=False)
    _text: AnswerText | None = field(default=None, init=False)
    _ends: frozenset[int] = field(default=frozenset(), init=False)
    _told: int = field(default=0, init=False)

    def begin(self, decode: Decode, ends: frozenset[int], stops: Sequence[str], device: torch.device) -> None:
        """Called before the first token.

        Args:
            decode: of the tokenizer that the answer is written with.
            ends: tokens that end an answer.
            stops: of the model, beside the request's.
            device: of the scores.
        """
        self._text, self._ends = AnswerText(decode, (*self.sampling.stops, *stops)), ends
        self.generator = torch.Generator(device)
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)

    @property
    def text(self) -> str:
        """The answer."""
        return "" if self._text is None else self._text.text

    def push(self, token: int, score: TokenScore | None) -> None:
        """Adds a token; ends the answer if it is the last."""
        assert self._text is not None
        self.tokens.append(token)
        if token in self._ends:
            self.reason = "stop"
            return
        self._text.add(token)
        if score is not None:
            self.scores.append(score)
        if self._text.stopped:
            self.reason = "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.reason = "length"
        elif self.sampling.streams:
            self._tell(last=False)

    def finish(self, error: ApiError | None = None) -> None:
        """Tells the request that this row is done, and before that what is left of its text."""
        if self._text is not None and error is None and not self.done:
            self._text.close()
            if self.sampling.streams:
                self._tell(last=True)
        super().finish(error)

    def _tell(self, last: bool) -> None:
        assert self._text is not None
        text = self._text.unsent(last)
        if text or (last and self._told < len(self.scores)):
            self.inbox.put(self, Delta(text, self.scores[self._told :]))
            self._told = len(self.scores)


__all__ = ["AnswerRow", "Delta", "Inbox", "ReadRow", "Row", "Sampling", "TokenScore"]
