"""The routers of a mixture of experts that is made of dense models; its plan is `hf_fusion.merging.moe.plan`."""

from __future__ import annotations

import math
import zlib
from typing import Annotated, Literal

import numpy as np
import torch

from hf_fusion.merging.engine.tensors import Tensors
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.merging.moe.plan import plan_moe as plan
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
    """MoE up-scaling: the experts' MLPs side by side, all else the base's (sparse upcycling, arXiv 2212.05055).

    Makes a Mixtral of Llamas or Mistrals of one size, and a Qwen3 MoE of Qwen3s, as mergekit-moe does. The base is the
    recipe's, or the first expert; an expert may be listed more than once, to be trained apart. It may have a
    ``noise_scale``, the deviation of noise on its MLPs, and a ``residual_scale``, a factor on their last matrices.

    Args:
        tensors: of each expert the direction (d,) that it is chosen for in one layer.
        gate: the routers. "zero" chooses any experts and weighs them alike: where all are copies, the model is the
            dense one. "random" is N(0, 1) and "uniform" is U(±1 / √d), both to be trained (mergekit's random and
            uniform_random). "embedding": the direction of the embeddings of an expert's ``prompts``, less that of its
            ``negative_prompts``, in all layers alike (mergekit's cheap_embed); no model is run. "hidden": likewise of
            what enters each layer of the base at the prompts' last tokens (mergekit's default), "hidden_avg" at all of
            their tokens: the base is loaded once, whole, in its stored type (mergekit: bfloat16).
        experts_per_token: how many experts answer each token.
        architecture: the mixture's; there is one for each kind of models.

    Returns:
        The router's weight, (K, d): one row for each expert.
    """
    size = (len(tensors), *tensors.shape)
    if gate not in ("random", "uniform"):
        return torch.stack([tensors.whole(expert) for expert in tensors.experts])
    drawn = np.random.Generator(np.random.SFC64([tensors.seed, zlib.crc32(tensors.name.encode())]))
    if gate == "random":
        return torch.from_numpy(drawn.standard_normal(size, dtype=np.float32))
    return torch.from_numpy((2 * drawn.random(size, dtype=np.float32) - 1) / math.sqrt(size[1]))
