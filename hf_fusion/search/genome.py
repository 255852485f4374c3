"""mergekit-evolve's recipes, ``genome: …``, as recipes of mergekit with ranges.

mergekit 0.1.4 searches without bounds, and takes absolute values; here weights are searched from 0 to 1, or from -1
with ``allow_negative_weights``, and densities from 0 to 1. The search starts where mergekit's does: equal weights that
sum to 1, and densities of 1.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.merging.mergekit.recipes import MaybeModel, Model
from hf_fusion.schema import Before, Expected, KeyPath, Range, read_class

logger = logging.getLogger(__name__)

GENES = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""Method → what mergekit-evolve searches for."""
NORMALIZED = ("linear", "ties", "dare_ties")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
IGNORED = ("shuffle", "random_init")
"""What changes how mergekit searches, not what it searches for."""


@dataclass(frozen=True)
class GenomeTask:
    """One of ``tasks``.

    Attributes:
        name: of the task in lm-evaluation-harness.
        weight: of its score in the sum.
        metric: with its filter, such as ``acc,none``.
    """

    name: str
    weight: float = 1.0
    metric: str = "acc,none"


_Task = Annotated[GenomeTask, Before(lambda value, where: {"name": value} if isinstance(value, str) else value)]


@dataclass(frozen=True)
class _Genome:
    """What ``genome`` holds."""

    models: Annotated[list[Model], Expected("a list of models", bool)]
    merge_method: str
    base_model: MaybeModel = None
    tokenizer_source: MaybeModel = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: Annotated[list[str], Before(lambda value, where: value or [])] = field(default_factory=list)
    smooth: bool = False


@dataclass(frozen=True)
class GenomeFile:
    """A recipe of mergekit-evolve.

    Attributes:
        genome: what is merged, and what is searched for.
        tasks: of lm-evaluation-harness.
        limit: documents of each task.
        num_fewshot: examples before each document.
        shuffle: not used: documents are always drawn at random.
        random_init: not used: the search starts at equal weights.
        apply_chat_template: whether prompts are messages, for tokenizers with a template.
        fewshot_as_multiturn: whether examples are messages too.
    """

    genome: _Genome
    tasks: Annotated[list[_Task], Before(lambda value, where: value or [])] = field(default_factory=list)
    limit: Annotated[int, Range(1)] | None = None
    num_fewshot: Annotated[int, Range(0)] | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


def read_genome(content: Mapping[str, Any], file: Path) -> GenomeFile:
    """Checks a recipe of mergekit-evolve.

    Raises:
        FusionError: naming the key that is wrong, or that this cannot do.
    """
    where = KeyPath(str(file))
    read = read_class(GenomeFile, content, where)
    genome, inner = read.genome, where.inner("genome")
    if genome.merge_method not in GENES:
        raise FusionError(
            f"{inner.inner('merge_method')} {genome.merge_method!r} is not one of mergekit-evolve's",
            suggestion(genome.merge_method, GENES),
        )
    if genome.merge_method not in ("linear", "slerp") and genome.base_model is None:
        raise FusionError(f"{inner.inner('base_model')} is missing: {genome.merge_method} needs it")
    if genome.merge_method == "slerp":
        for key in ("smooth", "filters"):
            if getattr(genome, key):
                raise FusionError(f"{inner.inner(key)} is not for slerp", "omit it")
        if len(genome.models) != 2:
            raise FusionError(
                f"{inner.inner('models')} has {len(genome.models)} models: slerp is searched between two",
                "linear is searched between more",
            )
        if genome.base_model not in (None, *genome.models):
            raise FusionError(f"{inner.inner('base_model')} is not one of the two models of slerp", "omit it")
    for key in IGNORED:
        if content.get(key):
            logger.warning("%s: %s is not used", file, key)
    return read


def recipe_of_genome(evolved: GenomeFile, file: Path) -> dict[str, Any]:
    """A recipe of mergekit with ranges.

    Args:
        evolved: from `read_genome`.
        file: for errors.

    Returns:
        Plain values, as `hf_fusion.search.space.space_of` reads them.

    Raises:
        FusionError: naming the key that is wrong, or that this cannot do.
    """
    genome = evolved.genome
    where = KeyPath(str(file), "genome.layer_granularity")
    count = (
        layer_count(genome.models[0], where) if genome.layer_granularity > 0 or genome.merge_method == "slerp" else 0
    )
    step = genome.layer_granularity if genome.layer_granularity > 0 else count
    if count and count % step:
        raise FusionError(f"{where} is {step}, which does not divide the {count} layers of {genome.models[0]}")
    groups = count // step if count else 1
    normalize = genome.merge_method in NORMALIZED if genome.normalize is None else genome.normalize
    recipe: dict[str, Any] = {"merge_method": genome.merge_method, "dtype": "bfloat16"}
    if genome.merge_method == "slerp":
        base = genome.base_model or genome.models[0]
        sources: list[dict[str, Any]] = [{"model": model} for model in genome.models]
        slices = [_slice(sources, index, step) | {"parameters": {"t": _range(0, 0.5)}} for index in range(groups)]
        return {**recipe, "base_model": base, "slices": slices, **_tokenizer(genome)}
    recipe |= {"parameters": {"normalize": normalize}, "base_model": genome.base_model}
    others: list[dict[str, Any]] = (
        [{"model": genome.base_model}] if genome.base_model not in (None, *genome.models) else []
    )
    if genome.smooth or groups == 1:
        models = [{"model": model, "parameters": _genes(genome, groups)} for model in genome.models]
        return {**recipe, "models": [*models, *others], **_tokenizer(genome)}
    sources = [{"model": model, "parameters": _genes(genome, 1)} for model in genome.models]
    return {
        **recipe, "slices": [_slice([*sources, *others], index, step) for index in range(groups)], **_tokenizer(genome)
    }  # fmt: skip


def _tokenizer(genome: _Genome) -> dict[str, Any]:
    return {"tokenizer_source": genome.tokenizer_source} if genome.tokenizer_source else {}


def _slice(sources: list[dict[str, Any]], index: int, step: int) -> dict[str, Any]:
    layers = [index * step, (index + 1) * step]
    return {"sources": [{**source, "layer_range": layers} for source in sources]}


def _genes(genome: _Genome, anchors: int) -> dict[str, Any]:
    """The parameters of one model: ranges, by filter if there are any."""
    least = -1 if genome.allow_negative_weights else 0
    ranges = {
        "weight": _range(least, 1 / len(genome.models), anchors),
        "density": _range(0, 1, anchors),
    }
    found = {name: ranges[name] for name in GENES[genome.merge_method]}
    if not genome.filters:
        return found
    return {
        name: [{"filter": key, "value": value} for key in genome.filters] + [{"value": value}]
        for name, value in found.items()
    }


def _range(least: float, start: float, anchors: int = 1) -> dict[str, Any]:
    return {"search": [least, 1], "start": start} | ({"gradient": anchors} if anchors > 1 else {})


def layer_count(model: str, where: KeyPath) -> int:
    """The number of layers of a model, from its config.

    Raises:
        FusionError: the model cannot be found, or its config does not say.
    """
    from hf_fusion.hub.bases import resolve_base
    from hf_fusion.hub.refs_to_files import recorded_base, resolve
    from hf_fusion.types import ModelRef

    base, ref = ModelRef.parse_pair(model)
    source = resolve(base or ref)
    if source.is_adapter:
        source = resolve_base(recorded_base(source), source)
    config = source.config.get("text_config") or source.config
    for key in LAYERS:
        if isinstance(config.get(key), int) and config[key] > 0:
            count: int = config[key]
            return count
    raise FusionError(f"{where} needs the number of layers, which the config of {model} does not say", "set it to 0")


__all__ = ["GenomeFile", "GenomeTask", "read_genome", "recipe_of_genome"]
