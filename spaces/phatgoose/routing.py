"""The routing of one prompt as plain data: the experts of every token at every linear layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens
LAYER = re.compile(r"\.(\d+)\.")
HEAD = "head"  # stands for the layer of modules outside all layers


@dataclass(frozen=True)
class Routing:
    """The routing of one prompt and its answer: T tokens, M linear layers, at most k experts each.

    Attributes:
        pieces: text of each token; empty if its character continues in the next token.
        special: whether each token is markup.
        prompt: number of tokens of the prompt.
        experts: names.
        modules: names.
        choice: (T, M, k) indices of experts, -1 if not routed: the last token is generated, but never read.
        weight: (T, M, k), their weights.
        usage: share of all weight that each expert got.
        entropy: of each linear layer, in nats: how evenly it spread these tokens.
    """

    pieces: list[str]
    special: list[bool]
    prompt: int
    experts: list[str]
    modules: list[str]
    choice: torch.Tensor
    weight: torch.Tensor
    usage: list[float]
    entropy: list[float]

    def at(self, token: int) -> torch.Tensor:
        """Weights of all experts for one token, (M, E)."""
        choice = self.choice[token].long()
        dense = torch.zeros(len(self.modules), len(self.experts))
        return dense.scatter_add_(1, choice.clamp(min=0), self.weight[token].masked_fill(choice < 0, 0.0))

    def means(self) -> torch.Tensor:
        """Mean weights of the experts over the linear layers that read a token, (T, E); zeros if none did."""
        tokens = len(self.pieces)
        choice, weight = self.choice.reshape(tokens, -1).long(), self.weight.reshape(tokens, -1)
        total = torch.zeros(tokens, len(self.experts))
        total.scatter_add_(1, choice.clamp(min=0), weight.masked_fill(choice < 0, 0.0))
        return total / (self.choice >= 0).any(-1).sum(1, keepdim=True).clamp(min=1)

    def dominant(self) -> list[tuple[int, float] | None]:
        """For each token the expert with the largest mean weight, and this weight; None if it was not routed."""
        shares, experts = self.means().max(1)
        return [(e, s) if s > 0 else None for e, s in zip(experts.tolist(), shares.tolist(), strict=True)]

    def layers(self) -> dict[str, list[int]]:
        """Layer -> its linear layers, as indices into `modules`, both in the order in which they run."""
        layers: dict[str, list[int]] = {}
        for index, module in enumerate(self.modules):
            layers.setdefault(layer_of(module), []).append(index)
        return layers

    def layer_entropy(self) -> dict[str, float]:
        """Mean entropy of each layer's linear layers."""
        return {
            layer: sum(self.entropy[index] for index in indices) / len(indices)
            for layer, indices in self.layers().items()
        }


def read_trace(trace: Any, pieces: Sequence[str], special: Sequence[bool], prompt: int) -> Routing:
    """Combines a model's `PhatgooseTrace` with the tokens that were routed.

    Linear layers that read fewer tokens read the last ones: a routed head reads only positions that it predicts from.
    """
    parts = [tuple(part[0] for part in trace.choices(module)) for module in trace.modules]
    read = max(len(choice) for choice, _ in parts)
    most = max(choice.shape[1] for choice, _ in parts)
    choices = torch.full((len(pieces), len(parts), most), -1, dtype=torch.int16)
    weights = torch.zeros(len(pieces), len(parts), most)
    for index, (choice, weight) in enumerate(parts):
        places = slice(read - len(choice), read), index, slice(choice.shape[1])
        choices[places], weights[places] = choice, weight
    usage, entropy = trace.usage(), trace.entropy()
    return Routing(
        pieces=list(pieces),
        special=list(special),
        prompt=prompt,
        experts=list(trace.experts),
        modules=list(trace.modules),
        choice=choices,
        weight=weights,
        usage=[usage[name] for name in trace.experts],
        entropy=[entropy[module] for module in trace.modules],
    )


def to_data(routing: Routing) -> dict[str, Any]:
    """The routing for JSON: text and dominant expert of tokens, and choices and weights of linear layers by token."""
    experts = routing.experts
    tokens = [
        {
            "text": piece,
            "part": "prompt" if index < routing.prompt else "answer",
            "expert": top and experts[top[0]],
            "weight": top and round(top[1], 4),
        }
        for index, (piece, top) in enumerate(zip(routing.pieces, routing.dominant(), strict=True))
    ]
    weights = routing.weight.round(decimals=4)
    return {
        "experts": experts,
        "tokens": tokens,
        "usage": dict(zip(experts, routing.usage, strict=True)),
        "entropy": dict(zip(routing.modules, routing.entropy, strict=True)),
        "modules": {
            module: {"experts": routing.choice[:, index].tolist(), "weights": weights[:, index].tolist()}
            for index, module in enumerate(routing.modules)
        },
    }


def layer_of(module: str) -> str:
    """The number of the layer that a module belongs to, or `HEAD`."""
    match = LAYER.search(module)
    return match.group(1) if match else HEAD


def kind_of(module: str) -> str:
    """A module's path within its layer: "self_attn.q_proj"."""
    match = LAYER.search(module)
    return module[match.end() :] if match else module


def split_text(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; "" if its character ends in a later token.

    A token is decoded together with the one before it, since some tokenizers drop the leading space of a single token.
    """
    pieces: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end - read < LONGEST_CHARACTER and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(ids[start:read])) :])
        start, read = read, end
    return pieces
