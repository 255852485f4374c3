"""Recipes with ranges: every number of a recipe may be ``{search: [low, high]}``.

method: ties
base: me/base
experts: [me/a, {model: me/b, parameters: {weight: {search: [0, 1]}}}]
parameters:
  scaling: {search: [0.1, 1.0], gradient: 4}  # four numbers from the first layer to the last
  density:
    - {filter: mlp, value: {search: [0.1, 0.9]}}
    - {value: 0.2}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hf_fusion.errors import FusionError
from hf_fusion.io.yaml_files import read_documents
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_checks import COMMON, check_recipe
from hf_fusion.merging.recipe_files import recipe_of
from hf_fusion.recipe import Recipe, recipe_file
from hf_fusion.schema import Expected, KeyPath, read_class
from hf_fusion.search.genome import GenomeFile, GenomeTask, read_genome, recipe_of_genome

SEARCH = "search"
"""The key that makes a mapping a range."""
DIGITS = 6
"""Significant digits of the numbers that are tried, so that a recipe says exactly what was tried."""
SYNTAX = "scaling: {search: [0.1, 1.0]}"

Key = str | int


@dataclass(frozen=True)
class _Range:
    """A range as a recipe gives it."""

    search: Annotated[tuple[float, float], Expected("[low, high]", lambda ends: ends[0] < ends[1])]
    start: float | None = None
    gradient: Annotated[int, Expected("a whole number from 2 to 1000", lambda count: 2 <= count <= 1000)] | None = None


@dataclass(frozen=True)
class Dimension:
    """One number that is searched for.

    Attributes:
        name: its key path in the recipe, such as ``parameters.scaling``.
        keys: the same, key by key.
        low: the smallest value.
        high: the largest value.
        start: the value of the first trial.
        whole: whether it is a whole number.
    """

    name: str
    keys: tuple[Key, ...]
    low: float
    high: float
    start: float
    whole: bool = False

    def value(self, share: float) -> float:
        """The value at a share of the range, from 0 to 1, rounded to `DIGITS` significant digits."""
        value = self.low + min(1.0, max(0.0, share)) * (self.high - self.low)
        return round(value) if self.whole else min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))

    def share(self, value: float) -> float:
        """The inverse of `value`."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class SearchSpace:
    """A recipe with ranges.

    Attributes:
        content: the recipe as plain values, with each range's start in its place.
        file: where it is from, for errors.
        dimensions: the numbers that are searched for, in the order of the file.
        genome: what else a recipe of mergekit-evolve says; None for other recipes.
    """

    content: Mapping[str, Any]
    file: Path
    dimensions: tuple[Dimension, ...]
    genome: GenomeFile | None = None

    @property
    def tasks(self) -> Sequence[GenomeTask]:
        """The tasks of a recipe of mergekit-evolve."""
        return self.genome.tasks if self.genome else ()

    @property
    def start(self) -> list[float]:
        """The values of the first trial: ``start``, else the method's default, else the middle of the range."""
        return [dimension.start for dimension in self.dimensions]

    def recipe(self, values: Sequence[float]) -> Recipe:
        """The recipe with a value for each dimension.

        Raises:
            FusionError: the recipe is invalid with these values.
        """
        content = copy.deepcopy(dict(self.content))
        for dimension, value in zip(self.dimensions, values, strict=True):
            place: Any = content
            for key in dimension.keys[:-1]:
                place = place[key]
            place[dimension.keys[-1]] = value
        return recipe_of(content, self.file, quiet=True)

    def named(self, values: Sequence[float]) -> dict[str, float]:
        """Values by the names of their dimensions."""
        return {dimension.name: value for dimension, value in zip(self.dimensions, values, strict=True)}


def load_space(path: str | Path) -> SearchSpace:
    """Reads a recipe with ranges: ours or one of mergekit.

    Args:
        path: the file, or a folder with ``fusion.yaml``.

    Raises:
        FusionError: the file has no range, a range is invalid, or the recipe is invalid at an end of its ranges.
    """
    file = recipe_file(path)
    documents = [document for document in read_documents(file) if document is not None]
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise FusionError(f"{file} has {len(documents)} documents, and a search is over one recipe", "split the file")
    return space_of(documents[0], file)


def space_of(content: Mapping[str, Any], file: Path) -> SearchSpace:
    """The search space of a recipe as plain values; see `load_space`."""
    genome = read_genome(content, file) if "genome" in content else None
    content = _copied(recipe_of_genome(genome, file) if genome else content)
    is_mergekit = "merge_method" in content
    method = str(content.get("merge_method" if is_mergekit else "method") or "")
    dimensions = tuple(_replaced(content, (), method, is_mergekit, KeyPath(str(file))))
    if not dimensions:
        raise FusionError(f"{file} has no range to search", f"write one, such as {SYNTAX}")
    recipe_of(content, file)  # once with what the log says of it
    space = SearchSpace(content, file, dimensions, genome)
    for values in (
        [dimension.value(0) for dimension in dimensions],
        [dimension.value(1) for dimension in dimensions],
        space.start,
    ):
        recipe = space.recipe(values)
        _check_searchable(recipe, file)
        check_recipe(recipe)
    return space


def _copied(node: Any) -> Any:
    """A copy in which nothing is in two places, as aliases of YAML are: each place is its own dimension."""
    if isinstance(node, Mapping):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(value) for value in node] if isinstance(node, list) else node


def _check_searchable(recipe: Recipe, file: Path) -> None:
    """Raises for recipes that cannot be merged again and again in memory."""
    method = MERGE_METHODS.get(recipe.method)
    reason = (
        "its method is not a static merge" if method is None else
        "it merges adapters into an adapter" if method.merges != "models" else
        "it assembles layers" if method.plans else
        "it has several stages" if recipe.stages else
        ""
    )  # fmt: skip
    if reason:
        hint = "merge adapters as models: task_arithmetic with experts base+adapter"
        raise FusionError(f"{file} cannot be searched: {reason}", hint if "adapters" in reason else None)


def _replaced(node: Any, keys: tuple[Key, ...], method: str, is_mergekit: bool, where: KeyPath) -> Iterator[Dimension]:
    """Replaces every range below a node by its start, and yields the dimensions."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(entries):
        path = (*keys, key)
        if not (isinstance(value, Mapping) and SEARCH in value):
            yield from _replaced(value, path, method, is_mergekit, where)
            continue
        found = read_class(_Range, value, where.inner(*path))
        start, whole = _parameter(path, method, is_mergekit, found, where)
        count = found.gradient
        node[key] = start if count is None else [start] * count
        for inner in [path] if count is None else [(*path, index) for index in range(count)]:
            name = KeyPath("").inner(*inner).path
            yield Dimension(name, inner, *found.search, start, whole)


def _parameter(
    path: tuple[Key, ...], method: str, is_mergekit: bool, found: _Range, where: KeyPath
) -> tuple[float, bool]:
    """Where the search in a range starts, and whether its numbers are whole."""
    low, high = found.search
    name = next((key for key in reversed(path) if isinstance(key, str) and key != "value"), "")
    default: Any = None
    kind: Any = float
    if (row := MERGE_METHODS.get(method)) is not None:
        theirs = (row.mergekit or {}).get(name) if is_mergekit else None
        known = {**COMMON, **row.parameters}.get(theirs.ours if theirs else name)
        if known is not None:
            kind, default = known.kind, known.default
        if theirs is not None:
            kind, default = theirs.kind, default if theirs.default is None else theirs.default
    if kind not in (float, int):
        raise FusionError(f"{where.inner(*path)} is a range, but {name} of {method} is not a number")
    whole = kind is int
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise FusionError(f"{where.inner(*path, SEARCH)} is [{low:g}, {high:g}], expected whole numbers")
    if found.start is not None:
        if not low <= found.start <= high:
            raise FusionError(f"{where.inner(*path, 'start')} is {found.start:g}, outside of [{low:g}, {high:g}]")
        start = found.start
    elif isinstance(default, (int, float)) and not isinstance(default, bool) and low <= default <= high:
        start = default
    else:
        start = (low + high) / 2
    return (round(start) if whole else float(f"{start:.{DIGITS}g}")), whole


__all__ = ["Dimension", "SearchSpace", "load_space", "space_of"]
