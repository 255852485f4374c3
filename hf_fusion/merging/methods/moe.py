"""MoE up-scaling: the routers of a mixture of dense models; `merging.moe.mixture_plan` plans its other tensors."""

from __future__ import annotations

import math
import zlib
from typing import Annotated, Literal

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import Tensors
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.moe.mixture_plan import plan_moe as plan
from hf_fusion.schema import Range

__all__ = ["moe", "plan"]


@merge_method(
    "MoE up-scaling",
    base="optional",
    needs="chunks",
    paper="2212.05055",
    expert_settings=("prompts", "negative_prompts", "noise_scale", "residual_scale"),
    plans=True,
)
def moe(
    tensors: Tensors,
    *,
    gate: Literal["zero", "random", "uniform", "embedding", "hidden", "hidden_avg"] = "zero",
    experts_per_token: Annotated[int, Range(1)] = 2,
    architecture: Literal["auto", "mixtral", "qwen3_moe"] = "auto",
) -> torch.Tensor:
    """MoE up-scaling: the experts' MLPs as a mixture, all other tensors from the base (sparse upcycling, 2212.05055).

    Builds a Mixtral from Llamas or Mistrals of one size, and a Qwen3 MoE from Qwen3s, as mergekit-moe does. The base is
    the recipe's, or the first expert; an expert may be listed more than once, as the start of further training. Each
    may set ``noise_scale``, the standard deviation of noise on its MLPs, and ``residual_scale``, a factor on their down
    projections.

    Args:
        tensors: of each expert, the direction (d,) of the inputs of one layer that select it.
        gate: initialisation of the routers. "zero" selects arbitrary experts with equal weights: with copies of one
            model, the mixture equals the dense model. "random" is N(0, 1) and "uniform" is U(±1 / √d), both to be
            trained (mergekit's random and uniform_random). "embedding": the direction of the embeddings of an expert's
            ``prompts`` minus that of its ``negative_prompts``, the same for all layers (mergekit's cheap_embed);
            without running a model. "hidden": the same with the inputs of each layer of the base at the prompts' last
            tokens (mergekit's default), "hidden_avg" averaged over their tokens; the base is loaded once, in its stored
            dtype (mergekit: bfloat16).
        experts_per_token: number of experts per token.
        architecture: the mixture's; "auto": the one for the experts' model type.

    Returns:
        The router's weight, (K, d), one row per expert.
    """
    size = (len(tensors), *tensors.shape)
    if gate not in ("random", "uniform"):
        return torch.stack([tensors.whole(expert) for expert in tensors.experts])
    drawn = np.random.Generator(np.random.SFC64([tensors.seed, zlib.crc32(tensors.name.encode())]))
    if gate == "random":
        return torch.from_numpy(drawn.standard_normal(size, dtype=np.float32))
    return torch.from_numpy((2 * drawn.random(size, dtype=np.float32) - 1) / math.sqrt(size[1]))
