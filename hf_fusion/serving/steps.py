"""Chooses the tokens of a batch whose rows have different options, within transformers' `generate()`.

`generate()` has one set of options for all rows. Here it decodes greedily with a logits processor that is called last:
it chooses each row's token by the row's own options and random numbers, and leaves only this token to choose. A
stopping criterion then ends the rows that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_fusion.serving.rows import AnswerRow, TokenScore

Named = Callable[[int], tuple[str, list[int] | None]]
"""A token's text and bytes, see `ServedModel.named`."""
Warping = tuple[tuple[str, float], ...]
"""Options by which scores are changed before sampling; empty where the most likely token is taken."""

# option → how `generate()` applies it, in its order; values that change nothing are left out
WARPERS: dict[str, Callable[[float], LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": lambda value: TopKLogitsWarper(int(value)),
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
NEUTRAL = {"temperature": None, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def warping_of(row: AnswerRow, defaults: Any) -> Warping:
    """How a row is sampled; empty if it takes the most likely tokens.

    Args:
        row: its options.
        defaults: the model's generation config, for what the row leaves open.
    """
    given = {name: getattr(row.sampling, name, None) for name in WARPERS}
    own = {name: getattr(defaults, name, None) for name in WARPERS} if defaults.do_sample else {}
    if given["temperature"] == 0 or (given["temperature"] is None and not defaults.do_sample):
        return ()
    values = {name: value if value is not None else own.get(name) for name, value in given.items()}
    values["temperature"] = 1.0 if values["temperature"] is None else values["temperature"]
    return tuple((name, float(v)) for name, v in values.items() if v is not None and v != NEUTRAL[name])


class Choosing(LogitsProcessor):
    """Chooses the next token of each row, and tells the row.

    Args:
        rows: of the batch, in its order.
        defaults: the model's generation config.
        named: of the tokenizer.
    """

    def __init__(self, rows: Sequence[AnswerRow], defaults: Any, named: Named) -> None:
        self.rows, self.named = rows, named
        self.warped: dict[Warping, list[int]] = {}
        for index, row in enumerate(rows):
            if key := warping_of(row, defaults):
                self.warped.setdefault(key, []).append(index)
        self.penalised = [
            index for index, row in enumerate(rows)
            if row.sampling.bias or row.sampling.presence or row.sampling.frequency
        ]  # fmt: skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) that leave each row its chosen token; unchanged where all rows take the most likely ones."""
        active = [index for index, row in enumerate(self.rows) if not row.ended and row.reason is None]
        changed = scores
        if penalised := [index for index in self.penalised if index in active]:
            changed = scores.clone()
            for index in penalised:
                self._penalise(changed[index], self.rows[index])
        chosen = changed.argmax(-1)
        for key, indices in self.warped.items():
            if indices := [index for index in indices if index in active]:
                self._sample(chosen, changed, indices, key)
        for index, token in zip(active, chosen[active].tolist(), strict=True):
            row = self.rows[index]
            row.push(token, self._score(scores[index], token, row.sampling.logprobs))
            if row.reason is not None and not row.sampling.routing:  # which is known when the batch has ended
                row.finish()
        if not self.warped and not self.penalised:
            return scores
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)

    def _penalise(self, scores: Tensor, row: AnswerRow) -> None:
        options = row.sampling
        if row.tokens and (options.presence or options.frequency):
            tokens, counts = torch.tensor(row.tokens, device=scores.device).unique(return_counts=True)
            scores[tokens] -= options.presence + options.frequency * counts
        if options.bias:
            scores[torch.tensor(list(options.bias), device=scores.device)] += torch.tensor(
                list(options.bias.values()), device=scores.device, dtype=scores.dtype
            )

    def _sample(self, chosen: Tensor, scores: Tensor, indices: list[int], key: Warping) -> None:
        part: Any = scores[indices]
        for name, value in key:
            part = WARPERS[name](value)(None, part)
        for probabilities, index in zip(part.softmax(-1), indices, strict=True):
            chosen[index] = torch.multinomial(probabilities[None], 1, generator=self.rows[index].generator)[0, 0]

    def _score(self, scores: Tensor, token: int, alternatives: int | None) -> TokenScore | None:
        if alternatives is None:
            return None
        logprobs = scores.log_softmax(-1)
        values, tokens = (each.tolist() for each in logprobs.topk(min(alternatives, len(logprobs))))
        top = tuple((*self.named(other), value) for value, other in zip(values, tokens, strict=True))
        return TokenScore(*self.named(token), float(logprobs[token]), top)


class Ending(StoppingCriteria):
    """Ends the rows that are done, or for which nobody waits."""

    def __init__(self, rows: Sequence[AnswerRow]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows (B,) have ended."""
        return torch.tensor([row.ended or row.reason is not None for row in self.rows], device=input_ids.device)


__all__ = ["Choosing", "Ending", "Named", "warping_of"]
