"""What becomes of which tensor: a recipe and the headers of its models, before any value is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError
from hf_fusion.merging.checkpoint import DTYPES, FLOATS, Files
from hf_fusion.merging.engine import Target
from hf_fusion.merging.methods import MERGE_METHODS, MergeMethod
from hf_fusion.merging.output import Spec
from hf_fusion.merging.schema import Parameter, Range, arguments_at, check_setting
from hf_fusion.merging.sources import LAYER, Model, align, depths
from hf_fusion.merging.tensors import Combination, Reader, Tensors

if TYPE_CHECKING:
    from hf_fusion.recipe import Recipe, Slice

MISMATCHES = ("base", "skip", "resize")
# what every static method takes beside its own parameters
COMMON = {
    "seed": Parameter("seed", int, 0, limits=Range(0, 2**63 - 1)),
    "mismatch": Parameter("mismatch", str, None, choices=MISMATCHES),
}


@dataclass(frozen=True)
class Part:
    """An expert's share in a merged tensor.

    Attributes:
        expert: its number in the recipe.
        name: of its tensor, or None where it has none.
        settings: its own, the most particular first.
    """

    expert: int
    name: str | None
    settings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Origin:
    """Where the values of a merged tensor come from.

    Attributes:
        name: of the merged tensor.
        first: the model that gives its sizes, the base or the first expert, and its tensor there.
        parts: the experts.
        depth: 0 for the first layer, 1 for the last.
        settings: for all experts, the most particular first.
    """

    name: str
    first: tuple[Model, str]
    parts: tuple[Part, ...]
    depth: float
    settings: tuple[Mapping[str, Any], ...]


@dataclass
class Mismatch:
    """Tensors of an expert that do not fit.

    Attributes:
        tensor: their name, layers as ``*``.
        model: whose.
        what: "missing", "extra" or the two shapes.
        count: how many tensors.
    """

    tensor: str
    model: str
    what: str
    count: int = 1
    options: tuple[str, ...] = field(default=MISMATCHES)

    def row(self) -> dict[str, Any]:
        """As a line of a table."""
        return {
            "tensor": self.tensor,
            "count": self.count,
            "model": self.model,
            "what": self.what,
            "resolved by": " | ".join(self.options),
        }


class MismatchError(FusionError):
    """The models' tensors do not match; `mismatches` lists how."""

    def __init__(self, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches = list(mismatches)
        rows = [m.row() for m in mismatches]
        widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
        lines = [{key: key for key in widths}, *rows]
        table = "\n".join("  ".join(str(line[key]).ljust(widths[key]) for key in widths).rstrip() for line in lines)
        usable = [option for option in MISMATCHES if all(option in m.options for m in mismatches)]
        super().__init__(
            f"the models' tensors do not match:\n{table}",
            f"set the parameter mismatch to {' or '.join(usable)} (base: such tensors stay as the base, or the first"
            " expert, has them; skip: experts that do not fit are left out of a tensor; resize: rows that an expert"
            " lacks stay the base's)",
        )


@dataclass
class Plan:
    """A merge that could begin.

    Attributes:
        recipe: what was asked for, its models pinned.
        method: its row.
        base: the base, if there is one.
        experts: in the order of the recipe.
        targets: the merged model's tensors.
        files: what the inputs are read with.
        dropped: tensors of experts that have no place in the merged model, as a table.
        layers: how many layers a merged model of slices has; None where it has those of its models.
    """

    recipe: Recipe
    method: MergeMethod
    base: Model | None
    experts: list[Model]
    targets: list[Target]
    files: Files
    dropped: list[Mismatch]
    layers: int | None = None

    @property
    def first(self) -> Model:
        """The model whose names, sizes, configuration and tokenizer the merged one has."""
        return self.base or self.experts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights."""
        return sum(target.spec.nbytes for target in self.targets)


def plan(recipe: Recipe, base: Model | None, experts: Sequence[Model]) -> Plan:
    """Decides for every tensor of the merged model what it is made from, and how.

    Args:
        recipe: of a static method.
        base: the opened base, where the recipe names one.
        experts: the opened experts, in the recipe's order.

    Raises:
        FusionError: the method does not go with so many experts, or without a base; a parameter is unknown or out of
            its range.
        MismatchError: the models' tensors do not match, and the recipe does not say what to do about it.
    """
    method = MERGE_METHODS[recipe.method]
    _check(recipe, method, base, experts)
    files = Files()
    first = base or experts[0]
    names = [align(first.entries, expert.entries) for expert in experts]
    mismatches = list(_mismatches(first, experts, names))
    # an expert's tensors that have no place are only a problem while nobody said so
    if mismatches and not recipe.parameters.get("mismatch"):
        raise MismatchError(mismatches)
    make = partial(_target, recipe=recipe, method=method, has_base=base is not None, experts=experts, files=files)
    targets = [make(origin) for origin in _origins(recipe, first, experts, names)]
    layers = sum(slice_.layers for slice_ in recipe.slices) or None
    return Plan(recipe, method, base, list(experts), targets, files, mismatches, layers)


def _check(recipe: Recipe, method: MergeMethod, base: Model | None, experts: Sequence[Model]) -> None:
    name = recipe.method
    least, most = method.experts
    if len(experts) < least or (most is not None and len(experts) > most):
        wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
        raise FusionError(f"{name} merges {wanted} experts, the recipe has {len(experts)}")
    if method.base == "needed" and base is None:
        raise FusionError(f"{name} needs the base of its experts", "base: owner/name")
    if not method.base and base is not None:
        raise FusionError(f"{name} has no use for a base", "list it among the experts, or leave it out")
    known = method.parameters
    groups = [("parameters", recipe.parameters), *((e.model, e.settings) for e in recipe.experts)]
    for slice_ in recipe.slices:
        groups += [("slices", slice_.parameters), *(("slices", s.parameters) for s in slice_.sources)]
    for where, settings in groups:
        allowed = known if where != "parameters" else {**known, **COMMON}
        for key, value in settings.items():
            if key not in allowed:
                raise FusionError(f"{where}: {name} has no parameter {key!r}", f"use {', '.join(allowed)}")
            check_setting(allowed[key], value, where)
        if where not in ("parameters", "slices"):
            for key in settings:
                if not known[key].per_expert:
                    raise FusionError(f"{where}: {key} is one for all experts", "give it under parameters:")


def _mismatches(first: Model, experts: Sequence[Model], names: Sequence[Mapping[str, str]]) -> Iterator[Mismatch]:
    """Tensors of experts that are not in the first model in the same shape, alike layers together."""
    found: dict[tuple[str, str, str], Mismatch] = {}
    for expert, known in zip(experts, names, strict=True):
        if expert is first:
            continue
        rows: list[tuple[str, str, tuple[str, ...]]]
        rows = [(name, "missing", ("base", "skip")) for name in first.entries if name not in known]
        theirs = set(expert.entries) - set(known.values())
        rows += [(name, "extra", MISMATCHES) for name in expert.entries if name in theirs]
        for name, own in known.items():
            left, right = first.shape(name), expert.shape(own)
            if left != right:
                is_longer = len(left) == len(right) and left[1:] == right[1:]
                usable = MISMATCHES if is_longer else MISMATCHES[:2]
                rows.append((name, f"{list(right)} against {list(left)}", usable))
        for name, what, options in rows:
            key = (re.sub(r"\.\d+\.", ".*.", name), expert.name, what)
            found.setdefault(key, Mismatch(*key, count=0, options=options)).count += 1
    yield from found.values()


def _origins(
    recipe: Recipe, first: Model, experts: Sequence[Model], names: Sequence[Mapping[str, str]]
) -> Iterator[Origin]:
    """One for each tensor of the merged model, in the order of its files."""
    if recipe.slices:
        yield from _sliced(recipe, first, experts, names)
        return
    for name, depth in depths(first.entries).items():
        parts = tuple(
            Part(i, known.get(name), (expert.settings,))
            for i, (known, expert) in enumerate(zip(names, recipe.experts, strict=True))
        )
        yield Origin(name, (first, name), parts, depth, (recipe.parameters,))


def _sliced(
    recipe: Recipe, first: Model, experts: Sequence[Model], names: Sequence[Mapping[str, str]]
) -> Iterator[Origin]:
    """The layers of each slice one after the other; what stands before them as the first slice has it, what stands
    behind them as the last has it."""
    by_name = {expert.model: i for i, expert in enumerate(recipe.experts)}
    stacks = {match["stack"] for name in first.entries if (match := LAYER.match(name))}
    if len(stacks) != 1:
        raise FusionError(f"slices need a model with one stack of layers; {first.name} has {', '.join(sorted(stacks))}")
    [stack] = stacks
    inner = {match["rest"]: None for name in first.entries if (match := LAYER.match(name))}
    last, number = sum(slice_.layers for slice_ in recipe.slices) - 1, 0

    def origin(slice_: Slice, name: str, theirs: Callable[[int], str], depth: float) -> Origin:
        sources = [(by_name.get(source.model), source) for source in slice_.sources]
        parts = tuple(
            Part(i, names[i].get(theirs(source.start)), (source.parameters, recipe.experts[i].settings))
            for i, source in sources
            if i is not None
        )
        is_base = recipe.base is not None
        start = next((s.start for i, s in sources if i is None), sources[0][1].start)
        one = first if is_base else experts[parts[0].expert]
        own = theirs(start) if is_base else names[parts[0].expert].get(theirs(start), "")
        if own not in one.entries:
            raise FusionError(f"{one.name} has no {theirs(start)}, which a slice takes from it")
        return Origin(name, (one, own), parts, depth, (slice_.parameters, recipe.parameters))

    outside = {name: depth for name, depth in depths(first.entries).items() if not LAYER.match(name)}
    for name, depth in outside.items():
        if not depth:
            yield origin(recipe.slices[0], name, lambda _, name=name: name, depth)
    for slice_ in recipe.slices:
        for offset in range(slice_.layers):
            for rest in inner:
                yield origin(
                    slice_,
                    f"{stack}.{number}.{rest}",
                    lambda start, offset=offset, rest=rest: f"{stack}.{start + offset}.{rest}",
                    number / max(1, last),
                )
            number += 1
    for name, depth in outside.items():
        if depth:
            yield origin(recipe.slices[-1], name, lambda _, name=name: name, depth)


def _target(
    origin: Origin, *, recipe: Recipe, method: MergeMethod, has_base: bool, experts: Sequence[Model], files: Files
) -> Target:
    """One tensor of the merged model."""
    first, own = origin.first
    entry, shape = first.entries[own], first.shape(own)
    mismatch, seed = recipe.parameters.get("mismatch"), recipe.parameters.get("seed", 0)
    spec = Spec(origin.name, _stored_as(recipe.dtype, entry.dtype), shape)
    parts, unfit = [], False
    for part in origin.parts:
        theirs = experts[part.expert].shape(part.name) if part.name is not None else None
        if theirs == shape or (mismatch == "resize" and theirs is not None and theirs[1:] == shape[1:]):
            parts.append(part)
        else:
            unfit = True
    if not parts or not entry.is_float or (unfit and mismatch == "base"):
        return _kept(spec, first, own, files)
    arguments = arguments_at(
        method.parameters, origin.settings, [part.settings for part in parts], origin.name, origin.depth
    )

    def make() -> tuple[Tensors, Any]:
        reader = first.reader(own, files)
        readers: list[Reader] = []
        for part in parts:
            theirs = experts[part.expert].reader(str(part.name), files)
            readers.append(theirs if theirs.shape == shape else Resized(theirs, reader))
        tensors = Tensors(origin.name, reader if has_base else None, readers, seed)
        return tensors, method.function(tensors, **arguments)

    inputs = [first.name, own, *((experts[part.expert].name, part.name) for part in parts)]
    return Target(spec, make, described=[recipe.method, arguments, seed, inputs])


def _kept(spec: Spec, first: Model, own: str, files: Files) -> Target:
    """A tensor as the first model has it, in the merged model's type."""
    entry = first.entries[own]
    if first.adapter is None and (not entry.is_float or entry.dtype == spec.dtype):
        spec = Spec(spec.name, entry.dtype, spec.shape)
        return Target(spec, copied=entry, described=[first.name, own])

    def make() -> tuple[Tensors, Any]:
        return Tensors(spec.name, None, [first.reader(own, files)]), Combination(0.0, [1.0])

    return Target(spec, make, described=[first.name, own])


class Resized:
    """A tensor with the rows of another model: those it lacks are the other's, those beyond are left out."""

    def __init__(self, own: Reader, first: Reader) -> None:
        self.own, self.first, self.shape = own, first, first.shape
        self._held = math.prod(own.shape)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        held = max(0, min(len(out), self._held - start))
        if held:
            self.own.read(start, out[:held])
        if held < len(out):
            self.first.read(start + held, out[held:])


def _stored_as(wanted: str | None, found: str) -> str:
    """safetensors' name of a merged tensor's type: what the recipe asks for where it is a float, else its own."""
    if wanted is None or found not in FLOATS:
        return found
    return next(name for name, (own, _) in DTYPES.items() if own == wanted)
