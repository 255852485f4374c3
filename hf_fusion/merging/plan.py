"""What becomes of which tensor: a recipe and the headers of its models, before any value is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.merging.engine.checkpoint import DTYPES, FLOATS, OpenFiles
from hf_fusion.merging.engine.open_models import Model, layer_index
from hf_fusion.merging.engine.output import TensorSpec
from hf_fusion.merging.engine.stream import Target
from hf_fusion.merging.engine.tensors import Combination, Reader, Tensors, WholeModel
from hf_fusion.merging.expert_matching import Share, compute_shares, match_tensors, refuse_unmatched
from hf_fusion.merging.merged_configs import merge_config
from hf_fusion.merging.methods import MergeMethod, method_named
from hf_fusion.merging.settings import arguments_at
from hf_fusion.merging.statistics_files import ExpertStatistics, read_statistics
from hf_fusion.merging.tensor_origins import (
    ExpertTensor,
    Mismatch,
    MismatchError,
    Origin,
    find_mismatches,
    forbid_skipping,
    rows_match,
    trace_layers,
    trace_origins,
)

if TYPE_CHECKING:
    from hf_fusion.merging.tokenizers.vocabulary import Vocabulary
    from hf_fusion.recipe import Recipe


@dataclass
class Plan:
    """A merge that could begin.

    Attributes:
        recipe: the recipe, its models pinned.
        method: its row.
        base: the base, if there is one.
        experts: in the order of the recipe.
        targets: the merged model's tensors.
        files: what the inputs are read with.
        dropped: tensors of experts that the merged model does not have, as a table.
        config: content of the merged model's ``config.json``.
        vocabulary: the merged model's tokens, where the recipe asks for others than the first model's.
        notes: what is unlike what the models say, one sentence each.
        shares: how much of each expert is merged; empty for methods that say themselves what they take.
        unchecked: why transformers' loader could not be asked whether it loads; "" where it was.
    """

    recipe: Recipe
    method: MergeMethod
    base: Model | None
    experts: list[Model]
    targets: list[Target]
    files: OpenFiles
    dropped: list[Mismatch]
    config: dict[str, Any]
    vocabulary: Vocabulary | None = None
    shares: Sequence[Share] = ()
    notes: Sequence[str] = ()
    unchecked: str = ""

    @property
    def partly(self) -> list[Share]:
        """Experts of which less than all is merged, where slices do not say so."""
        return [share for share in self.shares if share.value < 1 and not self.recipe.slices]

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the merged model should know, as plain data; empty where there is nothing to tell."""
        found = {"partly_merged": [asdict(share) for share in self.partly], "notes": list(self.notes)}
        return {key: value for key, value in found.items() if value}

    @property
    def warnings(self) -> list[str]:
        """The same as sentences, and whether it was not checked that the model loads."""
        why = f"whether the merged model loads was not checked: {self.unchecked}"
        return [*map(str, self.partly), *self.notes, *([why] if self.unchecked else [])]

    @property
    def specs(self) -> list[TensorSpec]:
        """Names, types and sizes of the merged tensors."""
        return [target.spec for target in self.targets]

    @property
    def first(self) -> Model:
        """The model whose names, configuration and, unless the recipe names another, tokenizer the merged one has."""
        return self.base or self.experts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights."""
        return sum(target.spec.nbytes for target in self.targets)


def plan(recipe: Recipe, base: Model | None, experts: Sequence[Model], vocabulary: Vocabulary | None = None) -> Plan:
    """Decides for every tensor of the merged model what it is made from, and how.

    Args:
        recipe: of a static method, which `check_recipe` has let through.
        base: the opened base, where the recipe names one.
        experts: the opened experts, in the recipe's order.
        vocabulary: that of the merged model, where the recipe asks for one.

    Raises:
        FusionError: slices cannot be taken, or nothing of an expert would be merged.
        MismatchError: the models' tensors do not match, and the recipe does not say what to do about it.
    """
    method = method_named(recipe.method)
    files = OpenFiles()
    first = base or experts[0]
    names = [match_tensors(first, expert) for expert in experts]
    origins = list(trace_origins(recipe, base, experts, names))
    is_aligned = vocabulary.covers if vocabulary else lambda model, name: False
    mismatches = find_mismatches(origins, experts, is_aligned, sliced=bool(recipe.slices))
    if recipe.parameters.get("trim") == "model" or (method.name == "emr" and recipe.parameters.get("expert")):
        forbid_skipping(mismatches)
    fitting = [_fitting(origin, recipe, base, experts, is_aligned) for origin in origins]
    shares = _merged_of(origins, fitting, experts, base)
    # of models that slices do not name, one may lend its configuration
    named = {part.expert for origin in origins for part in origin.parts}
    refuse_unmatched([shares[number] for number in sorted(named)], first)
    # tensors that the merged model lacks are a problem only where the recipe does not say what to do
    if mismatches and not recipe.parameters.get("mismatch"):
        raise MismatchError(mismatches)
    statistics = read_statistics(recipe, method.statistics, experts)
    targets: list[Target] = []
    whole = WholeModel(lambda: [target.inputs() for target in targets if target.inputs])
    context = _Context(recipe, method, base, list(experts), names, files, vocabulary, statistics, whole)
    targets += [_target(origin, parts, context) for origin, parts in zip(origins, fitting, strict=True)]
    config = merge_config(first, recipe.dtype, trace_layers(recipe, base, experts), vocabulary)
    return Plan(recipe, method, base, list(experts), targets, files, mismatches, config, vocabulary, shares)


@dataclass(frozen=True)
class _Context:
    """What all targets of a plan are made with."""

    recipe: Recipe
    method: MergeMethod
    base: Model | None
    experts: list[Model]
    names: Sequence[Mapping[str, str]]
    files: OpenFiles
    vocabulary: Vocabulary | None
    statistics: Sequence[ExpertStatistics]
    whole: WholeModel

    def reader(self, origin: Origin, model: Model, name: str) -> Reader:
        """What reads a model's tensor, with the merged model's tokens where it has a row for each."""
        if self.vocabulary is None or not self.vocabulary.covers(*origin.first):
            return model.reader(name, self.files)
        holders = {id(origin.first[0]): origin.first, id(model): (model, name)}
        first = self.base or self.experts[0]
        for other, known in [(first, {origin.name: origin.name}), *zip(self.experts, self.names, strict=True)]:
            theirs = known.get(origin.name)
            if theirs in other.entries and other.shape(theirs)[1:] == model.shape(name)[1:]:
                holders.setdefault(id(other), (other, theirs))
        return self.vocabulary.reader(model, {key: m.reader(n, self.files) for key, (m, n) in holders.items()})


def _fitting(
    origin: Origin,
    recipe: Recipe,
    base: Model | None,
    experts: Sequence[Model],
    is_aligned: Callable[[Model, str], bool],
) -> tuple[ExpertTensor, ...]:
    """The experts' tensors that are merged into one of the merged model's; empty where that stays as it is."""
    first, first_name = origin.first
    mismatch, shape = recipe.parameters.get("mismatch"), first.shape(first_name)
    parts, unfit = [], False
    for part in origin.parts:
        if part.name is None or not experts[part.expert].entries[part.name].is_float:
            unfit = True
            continue
        theirs = experts[part.expert].shape(part.name)
        resized = is_aligned(first, first_name) or (mismatch == "resize" and layer_index(first_name) is None)
        if theirs == shape or (resized and rows_match(theirs, shape)):
            parts.append(part)
        else:
            unfit = True
    # fewer than the method merges: what is there is passed on as it is
    least = 1 if base else method_named(recipe.method).experts[0]
    stays = len(parts) < least or not first.entries[first_name].is_float or (unfit and mismatch == "base")
    return () if stays else tuple(parts)


def _merged_of(
    origins: Sequence[Origin], fitting: Sequence[tuple[ExpertTensor, ...]], experts: Sequence[Model], base: Model | None
) -> list[Share]:
    """How much of each expert is in the merged model, also where a tensor of the first one is passed on as it is."""
    merged: list[set[str]] = [set() for _ in experts]
    for origin, parts in zip(origins, fitting, strict=True):
        for part in parts:
            merged[part.expert].add(str(part.name))
        if not parts and base is None:
            for expert, names in zip(experts, merged, strict=True):
                if expert is origin.first[0]:
                    names.add(origin.first[1])
    return compute_shares(experts, merged)


def _target(origin: Origin, parts: tuple[ExpertTensor, ...], context: _Context) -> Target:
    """One tensor of the merged model."""
    recipe, method, experts, vocabulary = context.recipe, context.method, context.experts, context.vocabulary
    first, first_name = origin.first
    entry, shape = first.entries[first_name], first.shape(first_name)
    is_aligned, seed = vocabulary is not None and vocabulary.covers(first, first_name), recipe.parameters.get("seed", 0)
    size = (vocabulary.rows, *shape[1:]) if vocabulary is not None and is_aligned else shape
    spec = TensorSpec(origin.name, output_dtype(recipe.dtype, entry.dtype), size, first.module_of(first_name))
    described = vocabulary.digest if vocabulary is not None and is_aligned else None
    if not parts:
        return _kept(spec, origin, context, described)
    arguments = arguments_at(
        method.parameters, origin.settings, [part.settings for part in parts], origin.name, origin.depth
    )

    def opened() -> Tensors:
        reader = context.reader(origin, first, first_name)
        readers: list[Reader] = []
        for part in parts:
            theirs = context.reader(origin, experts[part.expert], str(part.name))
            readers.append(theirs if theirs.shape == size else ResizedReader(theirs, reader))
        measured = [context.statistics[p.expert].of(str(p.name), context.files) for p in parts if context.statistics]
        base = reader if context.base else None
        return Tensors(origin.name, base, readers, seed, context.whole, statistics=measured)

    def make() -> tuple[Tensors, Any]:
        tensors = opened()
        return tensors, method.function(tensors, **arguments)

    inputs = [first.name, first_name, *((experts[part.expert].name, part.name) for part in parts)]
    inputs += [context.statistics[part.expert].digest for part in parts if context.statistics]
    return Target(spec, make, inputs=opened, identity=[recipe.method, arguments, seed, inputs, described])


def _kept(spec: TensorSpec, origin: Origin, context: _Context, described: str | None) -> Target:
    """A tensor as its first model has it, in the merged model's type."""
    first, first_name = origin.first
    entry = first.entries[first_name]
    if not described and first.adapter is None and (not entry.is_float or entry.dtype == spec.dtype):
        spec = replace(spec, dtype=entry.dtype)
        return Target(spec, copied=entry, identity=[first.name, first_name])

    def make() -> tuple[Tensors, Any]:
        return Tensors(spec.name, None, [context.reader(origin, first, first_name)]), Combination(0.0, [1.0])

    return Target(spec, make, identity=[first.name, first_name, described])


class ResizedReader:
    """A tensor with the rows of another model: those it lacks are the other's, those beyond are left out."""

    def __init__(self, resized: Reader, first: Reader) -> None:
        self.resized, self.first, self.shape = resized, first, first.shape
        self._held = math.prod(resized.shape)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        held = max(0, min(len(out), self._held - start))
        if held:
            self.resized.read(start, out[:held])
        if held < len(out):
            self.first.read(start + held, out[held:])


def output_dtype(wanted: str | None, found: str) -> str:
    """safetensors' name of a merged tensor's type: what the recipe asks for where it is a float, else its own."""
    if wanted is None or found not in FLOATS:
        return found
    return next(name for name, (torch_name, _) in DTYPES.items() if torch_name == wanted)
