"""Passthrough: stacks unmerged layers of models, for frankenmerges and depth up-scaling."""

from __future__ import annotations

from hf_fusion.merging.engine.tensors import Combination, Tensors
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.schema import EachNumber

__all__ = ["passthrough"]


@merge_method(
    "Passthrough",
    base="",
    needs="chunks",
    experts=(1, 1),
    paper="2312.15166",
    mergekit={"scale": mk.MergekitParameter("scale", 1.0, per_model=True)},
)
def passthrough(tensors: Tensors, *, scale: EachNumber = (1.0,)) -> Combination:
    """s θ: a tensor of one model, for recipes with slices (mergekit's passthrough, "frankenmerge").

    Depth up-scaling (SOLAR, Kim et al., 2023, arXiv 2312.15166) is such a recipe: all but the last m layers of a model,
    followed by all but its first m. SOLAR builds 48 layers from Mistral's 32, with m = 8, and continues training:

        method: passthrough
        experts: [mistralai/Mistral-7B-v0.1]
        slices:
          - sources: [{model: mistralai/Mistral-7B-v0.1, layers: [0, 24]}]
          - sources: [{model: mistralai/Mistral-7B-v0.1, layers: [8, 32]}]

    Args:
        tensors: one expert; a base does not count.
        scale: s. A layer whose ``o_proj`` and ``down_proj`` are scaled by 0 adds nothing to the residual stream: a
            repeated layer can start as the identity (LLaMA Pro, arXiv 2401.02415).
    """
    return Combination(0.0, list(scale))
