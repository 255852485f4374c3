"""Determines the input tensors of every merged tensor, for whole models and for slices; and mismatches between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.merging.engine.open_models import LAYER, Model, is_before_layers, layer_depths, layer_index
from hf_fusion.merging.recipe_checks import MISMATCHES

if TYPE_CHECKING:
    from hf_fusion.recipe import Recipe, Slice, SliceSource

_MEANING = {
    "base": "base: such tensors are copied from the base, or from the first expert",
    "skip": "skip: experts that do not match are left out of a tensor",
    "resize": "resize: as skip, but embeddings and heads with another number of rows are merged as well, with the"
    " base's values for rows that an expert lacks",
}
MAX_TABLE_ROWS = 40  # of the table in an error


@dataclass(frozen=True)
class ExpertTensor:
    """An expert's input to a merged tensor.

    Attributes:
        expert: index of the expert in the recipe.
        name: of its tensor, or None if it has none.
        settings: parameters for this expert, the most specific first.
    """

    expert: int
    name: str | None
    settings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Origin:
    """The inputs of a merged tensor.

    Attributes:
        name: of the merged tensor.
        first: the model that determines its shape, the base or the first expert, and the name of its tensor.
        parts: the experts' tensors.
        depth: relative depth, 0 outside of layers and in the first layer, 1 in the last; with slices, within the slice.
        settings: parameters for all experts, the most specific first.
    """

    name: str
    first: tuple[Model, str]
    parts: tuple[ExpertTensor, ...]
    depth: float
    settings: tuple[Mapping[str, Any], ...]


@dataclass
class Mismatch:
    """Tensors of an expert that do not match.

    Attributes:
        tensor: their name, with ``*`` for layer indices.
        model: name of the expert.
        what: "missing", "extra" or the two shapes.
        count: number of tensors.
        options: values of ``mismatch`` that resolve it.
    """

    tensor: str
    model: str
    what: str
    count: int = 1
    options: tuple[str, ...] = field(default=MISMATCHES)

    def row(self) -> dict[str, Any]:
        """As a table row."""
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
        rows = [m.row() for m in mismatches[:MAX_TABLE_ROWS]]
        widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
        lines = [{key: key for key in widths}, *rows]
        table = "\n".join("  ".join(str(line[key]).ljust(widths[key]) for key in widths).rstrip() for line in lines)
        usable = [option for option in MISMATCHES if any(option in m.options for m in mismatches)]
        more = f"\n… and {len(mismatches) - MAX_TABLE_ROWS} more" if len(mismatches) > MAX_TABLE_ROWS else ""
        super().__init__(
            f"the models' tensors do not match:\n{table}{more}",
            f"set the parameter mismatch to {' or '.join(usable)} ({'; '.join(map(_MEANING.__getitem__, usable))})",
        )


def find_mismatches(
    origins: Iterable[Origin],
    experts: Sequence[Model],
    is_aligned: Callable[[Model, str], bool],
    *,
    sliced: bool,
) -> list[Mismatch]:
    """Finds tensors of experts that do not match the merged tensors, grouped over layers.

    Args:
        origins: of all merged tensors.
        experts: the opened experts.
        is_aligned: whether a tensor's rows are aligned by token, so that their number may differ.
        sliced: whether only some layers of the experts are merged.
    """
    found: dict[tuple[str, str, str], Mismatch] = {}
    used: list[set[str]] = [set() for _ in experts]

    def note(name: str, expert: Model, what: str, options: tuple[str, ...]) -> None:
        key = (re.sub(r"\.\d+\.", ".*.", name), expert.name, what)
        found.setdefault(key, Mismatch(*key, count=0, options=options)).count += 1

    for origin in origins:
        model, own = origin.first
        left, aligned = model.shape(own), is_aligned(model, own)
        for part in origin.parts:
            expert = experts[part.expert]
            if part.name is None:
                note(origin.name, expert, "missing", ("base", "skip"))
                continue
            used[part.expert].add(part.name)
            right = expert.shape(part.name)
            is_longer = rows_match(left, right)
            if left != right and not (aligned and is_longer):
                # within layers, dimensions of several tensors must agree
                options = MISMATCHES if is_longer and layer_index(own) is None else MISMATCHES[:2]
                note(origin.name, expert, f"{list(right)} against {list(left)}", options)
            elif expert.entries[part.name].is_float != model.entries[own].is_float:
                types = f"{expert.entries[part.name].dtype} against {model.entries[own].dtype}"
                note(origin.name, expert, types, MISMATCHES[:2])
    for expert, known in zip(experts, used, strict=True):
        layers = {layer_index(name) for name in known} - {None}
        for name in expert.entries:
            if name not in known and (not sliced or layer_index(name) in layers):
                note(name, expert, "extra", MISMATCHES[:2])
    return list(found.values())


def forbid_skipping(mismatches: Sequence[Mismatch]) -> None:
    """Removes options that skip experts, for methods that need all tensors of all experts."""
    unfit = [mismatch for mismatch in mismatches if mismatch.what != "extra"]
    is_resized = all("resize" in mismatch.options for mismatch in unfit)
    for mismatch in mismatches if unfit else ():
        mismatch.options = ("base", "resize") if is_resized else ("base",)


def rows_match(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether two shapes agree except for the number of rows."""
    return len(left) == len(right) > 0 and left[1:] == right[1:]


def trace_origins(
    recipe: Recipe, base: Model | None, experts: Sequence[Model], names: Sequence[Mapping[str, str]]
) -> Iterator[Origin]:
    """Yields the origin of each merged tensor, in the order of the files.

    Args:
        recipe: may have slices.
        base: the opened base, or None.
        experts: the opened experts.
        names: for each expert, name in the base, or in the first expert -> name in the expert.

    Raises:
        FusionError: a slice cannot be taken from its models.
    """
    if recipe.slices:
        yield from _sliced(recipe, base, experts, names)
        return
    first = base or experts[0]
    for name, depth in layer_depths(first.entries).items():
        parts = tuple(
            ExpertTensor(i, known.get(name), (expert.settings,))
            for i, (known, expert) in enumerate(zip(names, recipe.experts, strict=True))
        )
        yield Origin(name, (first, name), parts, depth, (recipe.parameters,))


@dataclass(frozen=True)
class _Layers:
    """An opened source of a slice."""

    model: Model
    expert: int | None  # None: the base
    source: SliceSource
    layers: Mapping[int, Mapping[str, str]]  # index -> name within the layer -> name


def _sliced(
    recipe: Recipe, base: Model | None, experts: Sequence[Model], names: Sequence[Mapping[str, str]]
) -> Iterator[Origin]:
    """Layers of all slices in order; tensors before the layers from the first slice, those after from the last."""
    first = base or experts[0]
    stack = _stack(first)[0]
    slices = [(slice_, _opened(recipe, number, base, experts)) for number, slice_ in enumerate(recipe.slices)]

    def origin(name: str, slice_: Slice, found: Sequence[tuple[_Layers, str | None]], depth: float) -> Origin:
        giver, own = next((pair for pair in found if pair[0].expert is None), found[0])
        if own is None:
            raise FusionError(f"{giver.model.name} has no {name}, which a slice takes from it")
        parts = tuple(
            ExpertTensor(source.expert, theirs, (source.source.parameters, recipe.experts[source.expert].settings))
            for source, theirs in found
            if source.expert is not None
        )
        return Origin(name, (giver.model, own), parts, depth, (slice_.parameters, recipe.parameters))

    def outside(slice_: Slice, opened: Sequence[_Layers], wanted: Sequence[str]) -> Iterator[Origin]:
        for name in wanted:
            found = [(s, name if s.expert is None else names[s.expert].get(name)) for s in opened]
            yield origin(name, slice_, found, 0.0)

    others = [name for name in first.entries if not LAYER.match(name)]
    yield from outside(*slices[0], [name for name in others if is_before_layers(name)])
    number = 0
    for slice_, opened in slices:
        giver = next((s for s in opened if s.expert is None), opened[0])
        for offset in range(slice_.layers):
            rows = [(s, s.layers[s.source.start + offset]) for s in opened]
            for rest in giver.layers[giver.source.start + offset]:
                found = [(s, known.get(rest)) for s, known in rows]
                depth = offset / (slice_.layers - 1) if slice_.layers > 1 else 1.0
                yield origin(f"{stack}.{number}.{rest}", slice_, found, depth)
            number += 1
    yield from outside(*slices[-1], [name for name in others if not is_before_layers(name)])


def trace_layers(recipe: Recipe, base: Model | None, experts: Sequence[Model]) -> list[tuple[Model, int]] | None:
    """For each merged layer, the model that determines its shapes, and the layer's index there; None without slices."""
    by_name = {expert.model: model for expert, model in zip(recipe.experts, experts, strict=True)}
    found = []
    for slice_ in recipe.slices:
        giver = next((s for s in slice_.sources if s.model == recipe.base), slice_.sources[0])
        model = base if giver.model == recipe.base and base is not None else by_name[giver.model]
        found += [(model, number) for number in range(giver.start, giver.stop)]
    return found or None


def _opened(recipe: Recipe, number: int, base: Model | None, experts: Sequence[Model]) -> list[_Layers]:
    """Opens the sources of one slice.

    Raises:
        FusionError: a source is not a model of the recipe, or lacks such layers.
    """
    where = f"slices[{number}]"
    by_name = {expert.model: i for i, expert in enumerate(recipe.experts)}
    found = []
    for source in recipe.slices[number].sources:
        is_base = base is not None and source.model == recipe.base
        if not is_base and source.model not in by_name:
            raise FusionError(
                f"{where} names {source.model}, which is neither the base nor one of the experts",
                suggestion(source.model, [*by_name, *filter(None, [recipe.base])]),
            )
        index = None if is_base else by_name[source.model]
        model = base if is_base and base is not None else experts[by_name[source.model]]
        layers = _stack(model)[1]
        if source.stop > len(layers):
            raise FusionError(
                f"{where} takes layers {source.start} to {source.stop - 1} of {source.model}, which has {len(layers)}",
                f"at most [{source.start}, {len(layers)}]",
            )
        found.append(_Layers(model, index, source, layers))
    if base is not None and all(source.expert is not None for source in found):
        raise FusionError(
            f"{where} has no layers of the base {recipe.base}, which {recipe.method} needs", "list them as a source"
        )
    return found


def _stack(model: Model) -> tuple[str, dict[int, dict[str, str]]]:
    """A model's stack of layers: its path, and for each layer name within the layer -> name of the tensor.

    Raises:
        FusionError: there are several stacks, or none.
    """
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in model.entries:
        if match := LAYER.match(name):
            stacks.setdefault(match["stack"], {}).setdefault(int(match["number"]), {})[match["rest"]] = name
    if len(stacks) != 1:
        found = f"has {' and '.join(sorted(stacks))}" if stacks else "has none"
        raise FusionError(
            f"slices need models with one stack of layers; {model.name} {found}", "merge whole models instead"
        )
    [(stack, layers)] = stacks.items()
    if sorted(layers) != list(range(len(layers))):
        raise FusionError(f"{model.name} lacks some of its layers {stack}.0 to {stack}.{max(layers)}")
    return stack, layers
