"""``fusion.yaml``: what a model was made of, as hf_fusion makes it again; written with every save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from .configuration_foe import FoEConfig

CONFIG = FoEConfig
RECIPE_FILE = "fusion.yaml"
# what `save_pretrained(…, push_to_hub=True)` passes on to `push_to_hub`
PUSHED = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def recipe_of(config: FoEConfig) -> dict[str, Any]:
    """The recipe in a config; of one that holds none, what its experts and settings tell.

    The paths of folders are not in it: a folder is named, with the sha256 of its content where that is known.
    """
    if config.recipe:
        return config.recipe
    experts: list[Any] = [_pinned(row) for row in config.experts]
    is_ensemble = config.rule is not None
    if is_ensemble and config.weights:
        experts = [{"model": name, "weight": weight} for name, weight in zip(experts, config.weights, strict=True)]
    names = ("rule", "over") if is_ensemble else ("mode", "features_from", "fuser_hidden", "fuser_dropout")
    parameters = {name: getattr(config, name) for name in names}
    if config.problem_type == "single_label_classification" and config.mode == "output":
        labels = list((config.id2label or {}).values())
        fused = {-1: None, **dict(enumerate(labels))}
        maps = {
            row["name"]: {own: fused[index] for own, index in zip(row["labels"], row["label_map"], strict=True)}
            for row in config.experts
        }
        parameters |= {"labels": labels, "label_maps": maps}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    return {"method": "ensemble" if is_ensemble else "foe", "experts": experts, "parameters": parameters}


def write_recipe(model: Any, folder: str | Path) -> None:
    """Writes the recipe beside a model's weights: with the paths of this machine where `hf_fusion.fuse` knows them."""
    known = getattr(model, "fusion_recipe", None)
    content = recipe_of(model.config) if known is None else known.to_dict()
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
    (Path(folder) / RECIPE_FILE).write_text(text, encoding="utf-8")


def push_options(folder: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Takes from the options of `save_pretrained` those of the push it asks for; empty where it asks for none.

    transformers' own push sends only what its own save wrote: no processor, no recipe.
    """
    if not options.pop("push_to_hub", False):
        return {}
    return {"repo_id": Path(folder).name, **{name: options.pop(name) for name in PUSHED if name in options}}


def without_paths(model: Any) -> Any:
    """The same model, to be sent to the Hub: its recipe names folders, and not where on this machine they lie."""
    sent = copy.copy(model)  # the weights are shared
    sent.fusion_recipe = None
    return sent


def _pinned(row: dict[str, Any]) -> str:
    return f"{row['name']}@{row['revision']}" if row.get("revision") else str(row["name"])


__all__ = ["push_options", "recipe_of", "without_paths", "write_recipe"]
