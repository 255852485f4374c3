"""Plans a static merge from a recipe and its models' headers: the sources of each merged tensor.

No values are read; targets read theirs when they are merged.
"""

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
    """A merge that is ready to run.

    Attributes:
        recipe: the recipe, with pinned models.
        method: the recipe's method.
        base: the base, or None.
        experts: in the recipe's order.
        targets: the merged model's tensors.
        files: open files from which the inputs are read.
        dropped: tensors of experts that the merged model lacks.
        config: content of the merged model's ``config.json``.
        vocabulary: the merged model's tokens; None: those of the first model.
        shares: the merged share of each expert; empty for methods with a ``plan`` function.
        notes: differences between the merged model and its inputs, one sentence each.
        unchecked: why it was not checked that the merged model loads, or "".
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
        """Experts that are merged only in part, unless slices select the parts."""
        return [share for share in self.shares if share.value < 1 and not self.recipe.slices]

    @property
    def facts(self) -> dict[str, Any]:
        """Partly merged experts and notes as plain data, for the model's card; without empty lists."""
        facts = {"partly_merged": [asdict(share) for share in self.partly], "notes": list(self.notes)}
        return {key: value for key, value in facts.items() if value}

    @property
    def warnings(self) -> list[str]:
        """Partly merged experts, notes, and why loading was not checked, one sentence each."""
        why = f"whether the merged model loads was not checked: {self.unchecked}"
        return [*map(str, self.partly), *self.notes, *([why] if self.unchecked else [])]

    @property
    def specs(self) -> list[TensorSpec]:
        """Names, types and sizes of the merged tensors."""
        return [target.spec for target in self.targets]

    @property
    def first(self) -> Model:
        """The model that provides tensor names, configuration and, by default, tokenizer: the base, or expert 1."""
        return self.base or self.experts[0]

    @property
    def nbytes(self) -> int:
        """Size of the merged weights in bytes."""
        return sum(target.spec.nbytes for target in self.targets)


def plan(
    recipe: Recipe,
    base: Model | None,
    experts: Sequence[Model],
    vocabulary: Vocabulary | None = None,
    files: OpenFiles | None = None,
) -> Plan:
    """Determines the sources of every merged tensor.

    Args:
        recipe: of a static method, already checked by `check_recipe`.
        base: the opened base, or None.
        experts: the opened experts, in the recipe's order.
        vocabulary: of the merged model, or None if the recipe has no ``tokenizer``.
        files: reads the tensors; default: from the disk, when they are merged.

    Raises:
        FusionError: slices are not possible, or no tensor of an expert would be merged.
        MismatchError: the models' tensors do not match, and the recipe has no ``mismatch``.
    """
    method = method_named(recipe.method)
    files = files or OpenFiles()
    first = base or experts[0]
    names = [match_tensors(first, expert) for expert in experts]
    origins = list(trace_origins(recipe, base, experts, names))
    is_aligned = vocabulary.covers if vocabulary else lambda model, name: False
    mismatches = find_mismatches(origins, experts, is_aligned, sliced=bool(recipe.slices))
    if recipe.parameters.get("trim") == "model" or (method.name == "emr" and recipe.parameters.get("expert")):
        forbid_skipping(mismatches)
    fitting = [_fitting(origin, recipe, base, experts, is_aligned) for origin in origins]
    shares = _merged_of(origins, fitting, experts, base)
    # a model that no slice names may still provide the configuration
    named = {part.expert for origin in origins for part in origin.parts}
    refuse_unmatched([shares[index] for index in sorted(named)], first)
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
    """The arguments that all targets of a plan share."""

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
        """A reader of a model's tensor; one with a row per token is aligned to the merged vocabulary."""
        if self.vocabulary is None or not self.vocabulary.covers(*origin.first):
            return model.reader(name, self.files)
        sources = {id(origin.first[0]): origin.first, id(model): (model, name)}
        first = self.base or self.experts[0]
        for other, names in [(first, {origin.name: origin.name}), *zip(self.experts, self.names, strict=True)]:
            other_name = names.get(origin.name)
            if other_name in other.entries and other.shape(other_name)[1:] == model.shape(name)[1:]:
                sources.setdefault(id(other), (other, other_name))
        return self.vocabulary.reader(model, {key: m.reader(n, self.files) for key, (m, n) in sources.items()})


def _fitting(
    origin: Origin,
    recipe: Recipe,
    base: Model | None,
    experts: Sequence[Model],
    is_aligned: Callable[[Model, str], bool],
) -> tuple[ExpertTensor, ...]:
    """The experts' tensors that can be merged into a tensor; empty if the first model's is kept unchanged."""
    first, first_name = origin.first
    mismatch, shape = recipe.parameters.get("mismatch"), first.shape(first_name)
    parts, unfit = [], False
    for part in origin.parts:
        if part.name is None or not experts[part.expert].entries[part.name].is_float:
            unfit = True
            continue
        expert_shape = experts[part.expert].shape(part.name)
        can_resize = is_aligned(first, first_name) or (mismatch == "resize" and layer_index(first_name) is None)
        if expert_shape == shape or (can_resize and rows_match(expert_shape, shape)):
            parts.append(part)
        else:
            unfit = True
    # with fewer experts than the method needs, the first model's tensor is kept
    least = 1 if base else method_named(recipe.method).experts[0]
    is_kept = len(parts) < least or not first.entries[first_name].is_float or (unfit and mismatch == "base")
    return () if is_kept else tuple(parts)


def _merged_of(
    origins: Sequence[Origin], fitting: Sequence[tuple[ExpertTensor, ...]], experts: Sequence[Model], base: Model | None
) -> list[Share]:
    """The merged share of each expert; tensors that are kept from an expert count as merged."""
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
    """The target that merges one tensor."""
    recipe, method, experts, vocabulary = context.recipe, context.method, context.experts, context.vocabulary
    first, first_name = origin.first
    entry, shape = first.entries[first_name], first.shape(first_name)
    is_aligned, seed = vocabulary is not None and vocabulary.covers(first, first_name), recipe.parameters.get("seed", 0)
    size = (vocabulary.rows, *shape[1:]) if vocabulary is not None and is_aligned else shape
    spec = TensorSpec(origin.name, output_dtype(recipe.dtype, entry.dtype), size, first.module_of(first_name))
    digest = vocabulary.digest if vocabulary is not None and is_aligned else None
    if not parts:
        return _kept(spec, origin, context, digest)
    arguments = arguments_at(
        method.parameters, origin.settings, [part.settings for part in parts], origin.name, origin.depth
    )

    def open_inputs() -> Tensors:
        first_reader = context.reader(origin, first, first_name)
        readers: list[Reader] = []
        for part in parts:
            reader = context.reader(origin, experts[part.expert], str(part.name))
            readers.append(reader if reader.shape == size else ResizedReader(reader, first_reader))
        measured = [context.statistics[p.expert].of(str(p.name), context.files) for p in parts if context.statistics]
        base = first_reader if context.base else None
        memory = context.files.memory_of(origin.name)
        return Tensors(origin.name, base, readers, seed, context.whole, statistics=measured, memory=memory)

    def make() -> tuple[Tensors, Any]:
        tensors = open_inputs()
        return tensors, method.function(tensors, **arguments)

    inputs = [first.name, first_name, *((experts[part.expert].name, part.name) for part in parts)]
    inputs += [context.statistics[part.expert].digest for part in parts if context.statistics]
    return Target(spec, make, inputs=open_inputs, identity=[recipe.method, arguments, seed, inputs, digest])


def _kept(spec: TensorSpec, origin: Origin, context: _Context, digest: str | None) -> Target:
    """The target that keeps the first model's tensor, in the merged dtype; `digest` is of a merged vocabulary."""
    first, first_name = origin.first
    entry = first.entries[first_name]
    if not digest and first.adapter is None and (not entry.is_float or entry.dtype == spec.dtype):
        spec = replace(spec, dtype=entry.dtype)
        return Target(spec, copied=entry, identity=[first.name, first_name])

    def make() -> tuple[Tensors, Any]:
        return Tensors(spec.name, None, [context.reader(origin, first, first_name)]), Combination(0.0, [1.0])

    return Target(spec, make, identity=[first.name, first_name, digest])


class ResizedReader:
    """A tensor cut or extended to the rows of the first model's; missing rows are the first model's."""

    def __init__(self, resized: Reader, first: Reader) -> None:
        self.resized, self.first, self.shape = resized, first, first.shape
        self._available = math.prod(resized.shape)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from index `start`."""
        count = max(0, min(len(out), self._available - start))
        if count:
            self.resized.read(start, out[:count])
        if count < len(out):
            self.first.read(start + count, out[count:])


def output_dtype(requested: str | None, stored: str) -> str:
    """The dtype of a merged tensor, as safetensors names it: the recipe's for floats, otherwise the stored one.

    Args:
        requested: the recipe's ``dtype``, as torch names it.
        stored: of the first model's tensor, as safetensors names it.
    """
    if requested is None or stored not in FLOATS:
        return stored
    return next(name for name, (torch_name, _) in DTYPES.items() if torch_name == requested)
