"""The contents of a static merge's card: a plain model of its experts' class, which needs no custom code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.contents import CardContents, labelled_view
from hf_fusion.cards.plain_methods import PLAIN
from hf_fusion.hub.formats import ADAPTER_CONFIG, IMAGE_FILES, PROCESSOR_FILES
from hf_fusion.hub.manifests import MODULES
from hf_fusion.hub.task_heads import architectures, head_of_adapter, head_of_architecture
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.output import FACTS
from hf_fusion.merging.expert_matching import Share
from hf_fusion.merging.methods import method_named
from hf_fusion.recipe import Recipe
from hf_fusion.schema import KeyPath, read
from hf_fusion.types import ExpertInfo

if TYPE_CHECKING:
    from hf_fusion.cards.facts import CardFacts

MERGE = "merge"
"""The family of all static merges on cards; their ``model_type`` is that of the experts."""


def merge_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Method and parameters from the recipe; head, processors and format from the merged model's folder.

    Args:
        config: ``config.json``, or ``adapter_config.json`` of merged adapters.
        folder: of the merge.
    """
    recipe = Recipe.load(folder)
    row = method_named(recipe.method)
    about = (inspect.getdoc(row.function) or "").partition("\n\n")[0].replace("`", "")
    settings = [expert.settings for expert in recipe.experts]
    shared = (
        {key for key in settings[0] if all(each.get(key) == settings[0][key] for each in settings)}
        if len(settings) > 1
        else set()
    )
    values = recipe.parameters | {key: settings[0][key] for key in shared}
    parameters = [
        {"name": name, "value": _parameter_text(values.get(name, parameter.default)), "given": name in values}
        for name, parameter in row.parameters.items()
        if name in values or not any(name in each for each in settings)
    ]
    parameters += [
        {"name": name, "value": _parameter_text(value), "given": True}
        for name, value in values.items()
        if name not in row.parameters
    ]
    files = {path.name for path in folder.iterdir()}
    return {
        "method": recipe.method,
        "title": row.title,
        "paper": row.url,
        "about": " ".join(about.split()),
        "parameters": parameters,
        "settings": [
            {key: _parameter_text(value) for key, value in each.items() if key not in shared} for each in settings
        ],
        "class": next(iter(architectures(dict(config))), ""),
        "texts": any(file in files for file in PROCESSOR_FILES),
        "images": any(file in files for file in IMAGE_FILES),
        "code": bool(config.get("auto_map")),
        "adapter": ADAPTER_CONFIG in files,
        "sentences": MODULES in files and ADAPTER_CONFIG not in files,
        "sliced": bool(recipe.slices),
        "tokenizer": bool(recipe.tokenizer),
        "statistics": bool(row.statistics),
        "dtype": recipe.dtype,
        **_merge_notes(folder, recipe),
    }


def _merge_notes(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Notes that the merge wrote: experts that were merged in part, by index in the recipe, and remarks."""
    facts = read_json(folder / FACTS, str(folder)) if (folder / FACTS).is_file() else {}
    where = KeyPath(str(folder / FACTS))
    shares: list[Share] = read(list[Share], facts.get("partly_merged", []), where, "partly_merged")
    by_name = {expert.model: index for index, expert in enumerate(recipe.experts)}
    partly = [
        {"expert": by_name[share.model], "share": f"{100 * share.value:.3g} %"}
        for share in shares
        if share.model in by_name
    ]
    return {"partly": partly, "notes": read(list[str], facts.get("notes", []), where, "notes")}


def pipeline_tag(config: Mapping[str, Any], experts: Sequence[ExpertInfo]) -> str:
    """The merged model's task: the experts' task if its head has it, else the default task of the head."""
    head = head_of_architecture(next(iter(architectures(dict(config))), None)) or head_of_adapter(dict(config))
    tasks = {info.task for info in experts}
    task = tasks.pop() if len(tasks) == 1 else None
    if task and (head is None or task in head.tasks or head.auto == "AutoModel"):
        return task
    return head.tasks[0] if head else "feature-extraction"


def merge_view(facts: CardFacts) -> dict[str, Any]:
    """Template variables: columns of the experts, and what the method does in plain words.

    ``settings`` are the parameters that differ between experts.
    """
    return {
        "settings": list(dict.fromkeys(key for each in facts.options["settings"] for key in each)),
        "plain": PLAIN.get(facts.options["method"], ""),
        **labelled_view(facts),
    }


def _parameter_text(value: object) -> str:
    """A parameter's value as in a recipe; gradients and filters on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


MERGE_CONTENTS = CardContents(
    merge_options, lambda options: (options["paper"] or "", options["title"]), view=merge_view
)
