"""mergekit-moe's recipes, read as they are, as a `Recipe` of the method ``moe``.

Of mergekit 0.1.4's outputs Mixtral and Qwen3 MoE are supported; those with shared experts are errors that name the key.
Hidden states are made in the base's stored type, where mergekit always takes bfloat16, and ``hidden_avg`` is the mean
of a prompt's own tokens, where mergekit's counts the padding of the shorter ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.merging.mergekit.recipes import model_name
from hf_fusion.merging.moe.mixtures import MIXTURES, PROMPTED
from hf_fusion.recipe import DTYPES, Recipe, RecipeExpert

_GATES = {
    "hidden": "hidden",
    "hidden_last": "hidden",
    "hidden_avg": "hidden_avg",
    "cheap_embed": "embedding",
    "random": "random",
    "uniform_random": "uniform",
}
_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")


def from_mergekit_moe(content: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of mergekit-moe's as one of ours.

    Args:
        content: as YAML gives it.
        name: what errors call the file.

    Raises:
        FusionError: naming the file and the key that is wrong or not supported.
    """

    def refuse(key: str, expected: str) -> FusionError:
        return FusionError(f"{name}: {key} is not supported", expected)

    if unknown := [key for key in content if key not in _KEYS]:
        raise refuse(str(unknown[0]), f"use {', '.join(_KEYS)}")
    if content.get("shared_experts"):
        raise refuse("shared_experts", "leave it out: all experts are routed")
    gate = content.get("gate_mode", "hidden")
    if not isinstance(gate, str) or gate not in _GATES:
        raise refuse(f"gate_mode: {shown(gate)}", f"use {', '.join(_GATES)}")
    dtype = content.get("dtype")
    dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if dtype not in (None, *DTYPES):
        raise FusionError(f"{name}: dtype is {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(content["experts"], list) or not content["experts"]:
        raise FusionError(f"{name}: experts is {shown(content['experts'])}, expected a list")
    experts = []
    for number, entry in enumerate(content["experts"]):
        key = f"experts[{number}]"
        if not isinstance(entry, Mapping):
            raise FusionError(f"{name}: {key} is {shown(entry)}, expected {{source_model: …}}")
        if unknown := [own for own in entry if own not in _EXPERT]:
            raise refuse(f"{key}.{unknown[0]}", f"use {', '.join(_EXPERT)}")
        own = {known: entry[known] for known in ("noise_scale", "residual_scale") if entry.get(known) is not None}
        if _GATES[gate] in PROMPTED:  # mergekit does not look at them for random gates
            prompts = {"prompts": entry.get("positive_prompts"), "negative_prompts": entry.get("negative_prompts")}
            own |= {known: texts for known, texts in prompts.items() if texts}
        experts.append(RecipeExpert(model_name(entry.get("source_model"), f"{name}: {key}.source_model"), None, own))
    parameters = {"gate": _GATES[gate], "experts_per_token": content.get("experts_per_token", 2)}
    if (wanted := content.get("architecture")) is not None:
        found = [key for key, mixture in MIXTURES.items() if _begins(mixture.title, wanted)]
        if not found:
            titles = ", ".join(mixture.title for mixture in MIXTURES.values())
            raise refuse(f"architecture: {shown(wanted)}", f"use one of: {titles}")
        parameters["architecture"] = found[0]
    base = model_name(content.get("base_model"), f"{name}: base_model")
    return Recipe("moe", tuple(experts), base, parameters, dtype)


def _begins(title: str, wanted: object) -> bool:
    """mergekit takes any beginning of its name for an architecture."""
    return isinstance(wanted, str) and bool(wanted) and title.lower().startswith(wanted.lower())
