"""Model recombination: shuffles layers among models at random."""

from __future__ import annotations

import zlib
from typing import Annotated, Literal

import numpy as np

from hf_fusion.merging.engine.open_models import LAYER
from hf_fusion.merging.engine.tensors import Combination, Tensors
from hf_fusion.merging.methods.declaration import merge_method
from hf_fusion.schema import Range

__all__ = ["recombination"]


@merge_method("Model recombination", base="", needs="chunks", experts=(2, None), paper="2406.03280", stochastic=True)
def recombination(
    tensors: Tensors, *, number: Annotated[int, Range(1)] = 1, unit: Literal["layer", "module", "tensor"] = "layer"
) -> Combination:
    """Permutes each layer among the K experts at random, which gives K models; one of them is written.

    From FusionBench (arXiv 2406.03280). The permutation depends only on the recipe's seed and on the layer, so the K
    models of one seed contain every layer of every expert exactly once.

    Args:
        tensors: two experts or more.
        number: which of the K models, counted from 1.
        unit: what is permuted as a whole: a "layer" (outside of the layers, a module), a "module" such as a linear
            layer with its bias, or a single "tensor", as in fusion_bench for whole models.

    Raises:
        ValueError: there is no such model.
    """
    count = len(tensors)
    if number > count:
        raise ValueError(f"{tensors.name} has {count} experts, but number is {number}")
    layer, module = LAYER.match(tensors.name), tensors.name.rpartition(".")[0]
    names = {"layer": f"{layer['stack']}.{layer['number']}" if layer else module, "module": module}
    name = names.get(unit, tensors.name)
    generator = np.random.Generator(np.random.SFC64([tensors.seed, zlib.crc32(name.encode())]))
    chosen = int(generator.permutation(count)[number - 1])
    return Combination(0.0, [float(index == chosen) for index in range(count)])
