"""Combines the outputs of several experts' `generate` into one, as if one model had generated all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

BY_SEQUENCE = ("sequences", "sequences_scores", "beam_indices")
BY_STEP = ("scores", "logits")


@dataclass
class ExpertOutput:
    """The output of one expert for its prompts.

    Attributes:
        rows: (n,) indices of its prompts in the batch.
        output: of its `generate()`.
        beams: number of beams per prompt; 1 without beam search.
        pad: its padding token.
        start: index in the fused vocabulary of its tokenizer's first token.
        stop: index after its tokenizer's last token; None if there is only one tokenizer.
    """

    rows: torch.Tensor
    output: Any
    beams: int
    pad: int
    start: int
    stop: int | None

    def targets(self, tensor: torch.Tensor) -> torch.Tensor:
        """Indices of a tensor's rows in the combined output, where the beams or sequences of a prompt are adjacent."""
        each = tensor.shape[0] // len(self.rows)
        rows = self.rows.to(tensor.device)
        return (rows[:, None] * each + torch.arange(each, device=tensor.device)).flatten()


def combine(parts: Sequence[ExpertOutput], vocabulary: int) -> Any:
    """Combines the experts' outputs into one.

    Args:
        parts: one for each expert.
        vocabulary: size of the fused vocabulary, the minimum width of scores.

    Returns:
        Token ids (B R, T), R the sequences returned for each prompt; or an output of the experts' own class.
    """
    if torch.is_tensor(parts[0].output):
        return _sequences([part.output for part in parts], parts)
    fields_of_parts = {name: [part.output[name] for part in parts] for name in parts[0].output}
    result: dict[str, Any] = {}
    for field in fields(parts[0].output):
        values = fields_of_parts.get(field.name)
        if values is None or any(value is None for value in values):
            continue
        if field.name == "sequences":
            result[field.name] = _sequences(values, parts)
        elif field.name == "beam_indices":
            result[field.name] = _rows([_beams(*pair) for pair in zip(values, parts, strict=True)], parts, lambda _: -1)
        elif field.name == "sequences_scores":
            result[field.name] = _rows([value[:, None] for value in values], parts, lambda _: 0)[:, 0]
        elif field.name in BY_STEP:
            result[field.name] = _steps(values, parts, vocabulary)
        elif len(parts) == 1:  # caches and states have different shapes in each model
            result[field.name] = values[0]
    return type(parts[0].output)(**result)


def _sequences(values: Sequence[torch.Tensor], parts: Sequence[ExpertOutput]) -> torch.Tensor:
    shifted = [value + part.start for value, part in zip(values, parts, strict=True)]
    return _rows(shifted, parts, lambda part: part.pad + part.start)


def _rows(
    values: Sequence[torch.Tensor], parts: Sequence[ExpertOutput], fill: Callable[[ExpertOutput], int]
) -> torch.Tensor:
    """Concatenates tensors (n, T), each row at its index in the combined output and padded at its end."""
    width = max(value.shape[1] for value in values)
    result = values[0].new_zeros(sum(len(value) for value in values), width)
    for value, part in zip(values, parts, strict=True):
        value = value.to(result.device)
        targets = part.targets(value)
        result[targets] = fill(part)
        result[targets, : value.shape[1]] = value
    return result


def _beams(indices: torch.Tensor, part: ExpertOutput) -> torch.Tensor:
    """Converts beam indices (n R, T) within an expert's output to those within the whole batch; -1 stays."""
    rows = part.rows.to(indices.device)[indices.clamp(min=0) // part.beams]
    return torch.where(indices < 0, indices, rows * part.beams + indices % part.beams)


def _steps(
    values: Sequence[Sequence[torch.Tensor]], parts: Sequence[ExpertOutput], vocabulary: int
) -> tuple[torch.Tensor, ...]:
    """Scores of each step, (rows, fused vocabulary): -inf for tokens that an expert does not have.

    After an expert's last step its padding token has score 0, since the sequences are padded with it.
    """
    widths = [value[0].shape[1] if value else 0 for value in values]
    ends = [part.stop or part.start + width for part, width in zip(parts, widths, strict=True)]
    rows = sum(len(value[0]) for value in values)
    steps = []
    for step in range(max(map(len, values))):
        whole = values[0][0].new_full((rows, max(vocabulary, *ends)), float("-inf"))
        for value, part in zip(values, parts, strict=True):
            targets = part.targets(value[0]).to(whole.device)
            if step < len(value):
                scores = value[step].to(whole.device)[:, : None if part.stop is None else part.stop - part.start]
                whole[targets, part.start : part.start + scores.shape[1]] = scores
            else:
                whole[targets, part.pad + part.start] = 0
        steps.append(whole)
    return tuple(steps)


__all__ = ["ExpertOutput", "combine"]
