"""PHATGOOSE written from the paper's formulas: one token at a time, plain loops, nothing shared with the package."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_fusion import Expert
from hf_fusion.types import Gates


def normalise(x: torch.Tensor) -> torch.Tensor:
    """LN without affine: mean and std over d_in, eps 1e-5."""
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)


@dataclass
class Reference:
    """The base with every adapted linear routed by a loop; `choices` keeps (experts, weights) per path and token."""

    model: nn.Module
    choices: dict[str, list[tuple[list[int], list[float]]]] = field(default_factory=dict)


def reference(base: nn.Module, experts: Sequence[Expert], top_k: int) -> Reference:
    result = Reference(copy.deepcopy(base))
    for path in dict.fromkeys(path for expert in experts for path in expert.adapter.lora):
        own = [index for index, expert in enumerate(experts) if path in expert.adapter.lora]
        result.model.get_submodule(path).register_forward_hook(_hook(result, path, own, experts, top_k))
    return result


def _hook(result: Reference, path: str, own: list[int], experts: Sequence[Expert], top_k: int):
    known = [experts[index].gates for index in own]
    loras = [experts[index].adapter.lora[path] for index in own]

    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        inputs, outputs = args[0].reshape(-1, args[0].shape[-1]), output.clone().view(-1, output.shape[-1])
        for token, x in enumerate(inputs):
            scores = torch.stack([_score(normalise(x), gates, path) for gates in known])
            probabilities = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            order = sorted(range(len(own)), key=lambda e: -float(probabilities[e]))[:top_k]
            # The paper's code adds 1e-6 against division by 0, which a softmax over the chosen does not need.
            total = sum(probabilities[e] for e in order)
            for e in order:
                a, b = loras[e]
                outputs[token] += probabilities[e] / total * (b @ (a @ x))
            chosen = [own[e] for e in order], [float(probabilities[e] / total) for e in order]
            result.choices.setdefault(path, []).append(chosen)
        return outputs.view_as(output)

    return hook


def _score(x: torch.Tensor, gates: Gates, path: str) -> torch.Tensor:
    """The paper's score of a standardised input; gates of whitened inputs are calibrated, not standardised."""
    if path in gates.offsets:
        return x @ gates.vectors[path] - gates.offsets[path]
    return x @ normalise(gates.vectors[path]) / len(x) ** 0.5
