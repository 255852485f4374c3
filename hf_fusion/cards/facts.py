"""The content of a model card as plain data, gathered from a saved model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion import __version__
from hf_fusion.cards.contents import CONTENTS, CardContents
from hf_fusion.cards.static_merge import MERGE, MERGE_CONTENTS, pipeline_tag
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.results import RESULTS_FILE, Results
from hf_fusion.families import FAMILIES
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.task_heads import HEADS, auto_class_of, head_of_adapter
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.recipe import Recipe
from hf_fusion.types import ExpertInfo, ModelRef


@dataclass(frozen=True)
class CardExpert:
    """One expert on the card.

    Attributes:
        id: repo id, or the name of a folder.
        sha: its commit, or ``sha256:…`` of the folder's content; "" if neither is known.
        task: its pipeline tag.
        license: licence id.
        labels: its class names.
        cost: its share of the cost of all experts.
        gates: how its gates were made.
        rank: LoRA ranks of an adapter, such as "8" or "4 to 16".
    """

    id: str
    sha: str
    task: str | None = None
    license: str | None = None
    labels: tuple[str, ...] = ()
    cost: float | None = None
    gates: str | None = None
    rank: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """The content of a card, as plain data.

    Attributes:
        repo_id: ``owner/name`` of the published model.
        family: the config's ``model_type`` for the families; "merge" for static merges.
        auto_class: name of the Auto class that loads the model with its head.
        pipeline_tag: its task on the Hub.
        license: licence id; empty if it could not be computed.
        license_is_stated: whether the publisher stated it; otherwise it is computed from the experts'.
        experts: its experts, in the recipe's order.
        recipe: text of ``fusion.yaml``.
        base: ``owner/name@sha`` of the experts' base, or the folder's name.
        revision: commit that the usage block pins; None before the first push.
        results: content of ``results.json``, in any form that `Results.load` reads; None if not evaluated.
        parameters: number of parameters.
        weight_bytes: size of the weight files in bytes; 0 if unknown.
        options: settings of the family or the merging method, see `CardContents.options`.
        routing: content of the family's routing map; None without one.
        code: names of the Python files that load the model.
        versions: library → the version that wrote the card ("hf_fusion") or the weights ("transformers").
        inputs: ``owner/name@sha`` of the models from which the stages of a static merge were merged.
    """

    repo_id: str
    family: str
    auto_class: str
    pipeline_tag: str
    license: str
    experts: tuple[CardExpert, ...]
    recipe: str
    base: str | None = None
    revision: str | None = None
    results: dict[str, Any] | None = None
    parameters: int = 0
    weight_bytes: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] | None = None
    code: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    license_is_stated: bool = False
    inputs: tuple[str, ...] = ()

    @property
    def measured(self) -> Results | None:
        """The results; None if the model was not evaluated."""
        return Results.from_dict(self.results) if self.results else None

    @property
    def name(self) -> str:
        """The repo's name without its owner."""
        return self.repo_id.rpartition("/")[2]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CardFacts:
        """The facts in a dict that `dataclasses.asdict` made, also by way of JSON."""
        experts = tuple(CardExpert(**{**expert, "labels": tuple(expert["labels"])}) for expert in content["experts"])
        return cls(
            **{
                **content,
                "experts": experts,
                "code": tuple(content.get("code", ())),
                "inputs": tuple(content.get("inputs", ())),
            }
        )


def read_facts(
    folder: Path,
    repo_id: str,
    experts: Sequence[ExpertInfo],
    license_id: str,
    results: Results | Mapping[str, Any] | None = None,
) -> CardFacts:
    """Gather a card's facts from a saved model.

    Args:
        folder: written by `save_fused` or `merge`.
        repo_id: ``owner/name`` of the published model.
        experts: metadata of the recipe's experts, in its order.
        license_id: licence of the model.
        results: `Results` or its dict; None for ``results.json`` in the folder, if it exists.

    Raises:
        FusionError: the results lack fields, or no template is known for the model's type.
    """
    recipe, is_adapter = Recipe.load(folder), (folder / ADAPTER_CONFIG).exists()
    config = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"), str(folder))
    head = head_of_adapter(config) if is_adapter else None
    auto_class = head.auto if head else auto_class_of(config)
    name = MERGE if recipe.method in MERGE_METHODS else str(config.get("model_type"))
    contents = card_contents(name)
    routing = FAMILIES[name].map if name in FAMILIES else None
    rows = config.get("experts") or [{}] * len(experts)
    options = contents.options(config, folder) | _chat_option(auto_class, folder)
    ranks = contents.ranks(config) or [None] * len(experts)
    total = sum(row.get("cost", 0) for row in rows)
    parameters, weight_bytes = _size_of_weights(folder)
    # a static merge keeps the config of an expert, whose weights another version wrote
    written_by = config.get("transformers_version") if name in FAMILIES else None
    return CardFacts(
        repo_id=repo_id,
        family=name,
        auto_class=auto_class,
        pipeline_tag=pipeline_tag(config, experts)
        if name == MERGE
        else next(head.tasks[0] for head in HEADS if head.auto == auto_class),
        license=license_id,
        experts=tuple(
            CardExpert(
                info.id,
                info.sha,
                info.task,
                info.license,
                tuple(row.get("labels") or info.labels),
                row["cost"] / total if total else None,
                row.get("gates"),
                rank,
            )
            for info, row, rank in zip(experts, rows, ranks, strict=True)
        ),
        recipe=recipe.to_yaml(),
        base=Path(recipe.base).name if recipe.base and Path(recipe.base).is_absolute() else recipe.base,
        results=_read_results(results, folder, name),
        parameters=parameters,
        weight_bytes=weight_bytes,
        options=options,
        routing=read_json(folder / routing.data, str(folder)) if routing and (folder / routing.data).exists() else None,
        code=tuple(sorted(path.name for path in folder.glob("*.py"))) if config.get("auto_map") else (),
        inputs=_inputs_of_stages(recipe),
        versions={"hf_fusion": __version__} | ({"transformers": str(written_by)} if written_by else {}),
    )


def _inputs_of_stages(recipe: Recipe) -> tuple[str, ...]:
    """The models on the Hub from which a recipe's stages are merged, without other stages."""
    refs = [ref for own in recipe.stages.values() for name in own.models for ref in ModelRef.parse_pair(name) if ref]
    return tuple(dict.fromkeys(str(ref) for ref in refs if ref.is_repo and ref.revision and not recipe.is_stage(ref)))


def card_contents(family: str) -> CardContents:
    """How the card of a family, or of static merges, is filled in.

    Raises:
        FusionError: the family has no card.
    """
    if family == MERGE:
        return MERGE_CONTENTS
    if family not in CONTENTS:
        raise FusionError(f"there is no card template for the model_type {family!r}")
    return CONTENTS[family]


def facts_from_json(path: str | Path) -> CardFacts:
    """The facts of a golden card, from its JSON file."""
    return CardFacts.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _read_results(results: Results | Mapping[str, Any] | None, folder: Path, family: str) -> dict[str, Any] | None:
    """The results as plain data, from the argument or from ``results.json``; None if nothing was measured.

    Raises:
        FusionError: they were measured on one data set, and those of the family are task by task, or the reverse.
    """
    if results is None and not (folder / RESULTS_FILE).exists():
        return None
    if results is None:
        results = Results.load(folder / RESULTS_FILE)
    elif isinstance(results, Mapping):
        results = Results.from_dict(results)
    by_task = family not in FAMILIES or FAMILIES[family].by_task
    if results.tasks and results.pooled == by_task:
        raise FusionError(
            f"the results are not those of a model of the family {family}, which is evaluated "
            f"{'task by task' if by_task else 'on one data set'}",
            hint="pass results that hf-fusion eval wrote for this model",
        )
    return asdict(results)


def _size_of_weights(folder: Path) -> tuple[int, int]:
    """Number of elements in all tensors, from the files' headers, and the size of the files in bytes."""
    from hf_fusion.hub.headers import local_shapes

    files = [path.resolve() for path in folder.glob("*.safetensors")]  # a staged folder has links to checked files
    shapes = [shape for file in files for shape in local_shapes(file.parent, [file.name]).values()]
    return sum(map(math.prod, shapes)), sum(file.stat().st_size for file in files)


def _chat_option(auto_class: str, folder: Path) -> dict[str, Any]:
    """The option ``chats`` of a causal language model whose tokenizer has a chat template."""
    if auto_class != "AutoModelForCausalLM":
        return {}
    file = folder / "tokenizer_config.json"
    in_config = file.exists() and bool(read_json(file, str(folder)).get("chat_template"))
    return {"chats": True} if in_config or any(folder.glob("chat_template.*")) else {}
