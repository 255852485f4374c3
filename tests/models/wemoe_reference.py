"""WEMoE written from the paper's formulas, sample by sample in plain loops; nothing is shared with the package.

The routers' parameters are read from a model's state by name; everything else comes from the base and the experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def out_in(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight as (d_out, d_in); GPT-2's Conv1D stores the other way round."""
    return weight.t() if isinstance(linear, Conv1D) else weight


@dataclass
class Reference:
    """The dense model with every unit's linears replaced by a loop.

    Attributes:
        model: to be run like any other.
        shares: unit name -> (B, T) share of each token in the mean; absent where all count alike.
        routers: unit name -> its parameters by their last names ("layers.0.weight", "constant").
        coefficients: unit name -> (B, K) of the last forward.
        batch: B, for models whose MLPs see batch and tokens as one dimension.
    """

    model: nn.Module
    routers: dict[str, dict[str, torch.Tensor]]
    shares: dict[str, torch.Tensor] = field(default_factory=dict)
    coefficients: dict[str, torch.Tensor] = field(default_factory=dict)
    batch: int = 3

    def route(self, unit: str, x: torch.Tensor) -> torch.Tensor:
        own = self.routers[unit]
        if "constant" in own:
            return own["constant"].expand(len(x), -1)
        rows = []
        for b, sample in enumerate(x):
            per_token = []
            for token in sample.reshape(-1, sample.shape[-1]):
                if "layers.1.weight" in own:
                    hidden = torch.relu(own["layers.0.weight"] @ token + own["layers.0.bias"])
                    per_token.append(own["layers.1.weight"] @ hidden + own["layers.1.bias"])
                else:
                    per_token.append(own["layers.0.weight"] @ token + own["layers.0.bias"])
            outputs = torch.stack(per_token)
            share = self.shares.get(unit)
            rows.append(outputs.mean(0) if share is None else (share[b][:, None] * outputs).sum(0))
        return torch.stack(rows)


def reference(
    base: nn.Module,
    experts: Sequence[Mapping[str, torch.Tensor]],
    units: Mapping[str, Sequence[str]],
    routers: dict[str, dict[str, torch.Tensor]],
    scaling: float,
) -> Reference:
    """
    Args:
        base: the dense base.
        experts: the experts' full state dicts.
        units: name -> paths of its linears in the order in which they run.
        routers: see `Reference`.
        scaling: λ of the rest.
    """
    model = copy.deepcopy(base)
    upscaled = {f"{path}.{leaf}" for paths in units.values() for path in paths for leaf in ("weight", "bias")}
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in base.state_dict().items():
            if name not in upscaled and tensor.is_floating_point():
                state[name].copy_(tensor + scaling * sum(expert[name] - tensor for expert in experts))
    result = Reference(model, routers)
    for unit, paths in units.items():
        for path in paths:
            linear = model.get_submodule(path)
            weight = out_in(linear, linear.weight).detach()
            taus = [out_in(linear, e[f"{path}.weight"]) - weight for e in experts]
            bias = None if linear.bias is None else linear.bias.detach()
            bias_taus = None if bias is None else [e[f"{path}.bias"] - bias for e in experts]
            linear.forward = _forward(result, unit, path == paths[0], weight, taus, bias, bias_taus)
    return result


def _forward(result, unit, routes, weight, taus, bias, bias_taus):
    def forward(given: torch.Tensor) -> torch.Tensor:
        x = given if given.dim() > 2 else given.view(result.batch, -1, given.shape[-1])
        if routes:
            result.coefficients[unit] = result.route(unit, x)
        outputs = []
        for sample, w in zip(x, result.coefficients[unit], strict=True):
            merged = weight + sum(w[k] * tau for k, tau in enumerate(taus))
            y = sample @ merged.t()
            if bias is not None:
                y = y + bias + sum(w[k] * tau for k, tau in enumerate(bias_taus))
            outputs.append(y)
        return torch.stack(outputs).view(*given.shape[:-1], -1)

    return forward
