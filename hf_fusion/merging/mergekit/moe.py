"""mergekit-moe's recipes, read as they are, as a `Recipe` of the method ``moe``.

Mixtral and Qwen3 MoE are supported, as mergekit 0.1.4 writes them; shared experts are an error that names the key.
Hidden states are made in the base's stored type, where mergekit always takes bfloat16, and ``hidden_avg`` is the mean
of a prompt's own tokens, where mergekit's counts the padding of the shorter ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.merging.mergekit.recipes import MaybeDtype, Model
from hf_fusion.merging.moe.mixtures import MIXTURES, PROMPTED
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.schema import Expected, KeyPath, OneOf, read_class

_GATES = {
    "hidden": "hidden",
    "hidden_last": "hidden",
    "hidden_avg": "hidden_avg",
    "cheap_embed": "embedding",
    "random": "random",
    "uniform_random": "uniform",
}


@dataclass(frozen=True)
class _Expert:
    """One of ``experts``."""

    source_model: Model
    positive_prompts: Any = None
    negative_prompts: Any = None
    noise_scale: Any = None
    residual_scale: Any = None


@dataclass(frozen=True)
class _File:
    """A recipe of mergekit-moe's."""

    base_model: Model
    experts: Annotated[list[_Expert], Expected("a list of {source_model: …}", bool)]
    gate_mode: Annotated[str, OneOf(tuple(_GATES))] = "hidden"
    dtype: MaybeDtype = None
    experts_per_token: Any = 2
    shared_experts: Any = None
    architecture: Any = None


def from_mergekit_moe(content: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of mergekit-moe's as one of ours.

    Args:
        content: as YAML gives it.
        name: what errors call the file.

    Raises:
        FusionError: naming the file and the key that is wrong or not supported.
    """

    file = read_class(_File, content, KeyPath(name))
    if file.shared_experts:
        raise FusionError(f"{name}: shared_experts is not supported", "leave it out: all experts are routed")
    experts = []
    for row in file.experts:
        given = {"noise_scale": row.noise_scale, "residual_scale": row.residual_scale}
        if _GATES[file.gate_mode] in PROMPTED:  # mergekit does not look at them for random gates
            given |= {"prompts": row.positive_prompts or None, "negative_prompts": row.negative_prompts or None}
        given = {key: value for key, value in given.items() if value is not None}
        experts.append(RecipeExpert(row.source_model, None, given))
    parameters = {"gate": _GATES[file.gate_mode], "experts_per_token": file.experts_per_token}
    if file.architecture is not None:
        found = [key for key, mixture in MIXTURES.items() if _begins(mixture.title, file.architecture)]
        if not found:
            raise FusionError(
                f"{name}: architecture is {shown(file.architecture)}, which is not supported",
                suggestion(file.architecture, [mixture.title for mixture in MIXTURES.values()]),
            )
        parameters["architecture"] = found[0]
    return Recipe("moe", tuple(experts), file.base_model, parameters, file.dtype)


def _begins(title: str, wanted: object) -> bool:
    """mergekit takes any beginning of its name for an architecture."""
    return isinstance(wanted, str) and bool(wanted) and title.lower().startswith(wanted.lower())
