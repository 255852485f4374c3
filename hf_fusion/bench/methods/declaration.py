"""The decorator of benchmarked methods, and the rows of the benchmark that it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.io.declarations import decorated

if TYPE_CHECKING:
    from types import ModuleType

    from hf_fusion.bench.candidates import Candidate
    from hf_fusion.bench.setups.common import TaskSetup
    from hf_fusion.bench.suite import Holdout

# family -> what tables call it; in the order in which tables show them
FAMILIES = {
    "floor": "Floors",
    "expert": "Single experts",
    "ensemble": "Ensembles",
    "merge": "Static merging",
    "data": "Merging with statistics of the data",
    "learned": "Learned coefficients",
    "routing": "Routing among adapters",
    "fusion": "Fusion of outputs",
    "mixture": "Mixtures",
    "ceiling": "Ceilings",
}
SCALING = ("scaling", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0))
"""The grid over which a merge's scaling is tuned."""
ENTROPY = {"loss": "entropy", "diversity": 0.0}

Function = TypeVar("Function", bound=Callable[..., Any])
_MARK = "bench_methods"  # attribute of a decorated function


@dataclass(frozen=True)
class EntryPoint:
    """How a method is run on suites of one kind.

    Attributes:
        function: (setup, holdout, seed, parameters) → `Candidate`, or several of them by name.
        kind: kind of the setup that the function takes.
        given: parameters that differ from the function's defaults.
    """

    function: Callable[..., Any]
    kind: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, setup: TaskSetup, holdout: Holdout, seed: int, **changed: Any
    ) -> Candidate | dict[str, Candidate]:
        """Runs the method and returns its candidates.

        Args:
            setup: of this entry's kind, or of one that `TaskSetup.of_kind` converts to it.
            holdout: which experts are fused.
            seed: seed of all randomness.
            changed: parameters that differ from `given`.
        """
        parameters = {**self.given, **changed}
        candidates: Candidate | dict[str, Candidate] = self.function(
            setup.of_kind(self.kind), holdout, seed, **parameters
        )
        return candidates


@dataclass(frozen=True)
class Method:
    """A row of the benchmark.

    Attributes:
        name: its name in cells and on the command line.
        title: its name in tables.
        family: a key of `FAMILIES`.
        tune: the parameter whose best value is searched for on the validation split, and its values.
        stochastic: whether another seed gives another model.
        entries: kind of suite → its entry point there.
    """

    name: str
    title: str
    family: str
    tune: tuple[str, tuple[Any, ...]] | None = None
    stochastic: bool = False
    entries: Mapping[str, EntryPoint] = field(default_factory=dict)


def bench_method(
    title: str = "",
    family: str = "",
    *,
    name: str = "",
    kind: str = "",
    also: tuple[str, ...] = (),
    alike: tuple[str, ...] = (),
    given: Mapping[str, Any] | None = None,
    tune: tuple[str, tuple[Any, ...]] | None = None,
    stochastic: bool = False,
) -> Callable[[Function], Function]:
    """Declares a function as a method of the benchmark; several decorators declare several methods.

    The function takes a suite's task setup, which experts are fused, a seed and parameters, and returns a `Candidate`,
    or several by name. In this package the decorator is read from the source file without importing it: its arguments
    must be literals or use names of this module.

    Args:
        title: its name in tables. Without a title, the function runs the method of that name on suites of another
            kind, and the title and family declared there apply.
        family: a key of `FAMILIES`.
        name: its name in cells and on the command line; default: the function's name.
        kind: kind of the suites whose setup it takes; default: the name of its file, or "merging" in files of users.
        also: further kinds of suites, whose setup is converted to that of `kind`.
        alike: further kinds of suites, whose setup it takes unchanged.
        given: parameters that differ from the function's defaults.
        tune: the parameter whose best value is searched for on the validation split, and its values.
        stochastic: whether another seed gives another model.
    """
    facts = {"title": title, "family": family, "tune": tune, "stochastic": stochastic}

    def declare(function: Function) -> Function:
        entries = _entries(function, kind or "merging", also, alike, given)
        row = Method(name or function.__name__, **facts, entries=entries)  # type: ignore[arg-type]
        setattr(function, _MARK, [*getattr(function, _MARK, []), row])
        return function

    return declare


def _entries(
    function: Callable[..., Any],
    kind: str,
    also: tuple[str, ...],
    alike: tuple[str, ...],
    given: Mapping[str, Any] | None,
) -> dict[str, EntryPoint]:
    entries = dict.fromkeys((kind, *also), EntryPoint(function, kind, given or {}))
    return entries | {other: EntryPoint(function, other, given or {}) for other in alike}


def declared_in(folder: Path) -> dict[str, Method]:
    """All methods that the files of a package declare, those for the kind "merging" first.

    The files are read, not imported: importing them takes seconds. A method's file is imported when it is called.

    Args:
        folder: of this package; each file is named after the kind of suites that its methods are for.
    """
    rows: dict[str, Method] = {}
    for file in sorted(folder.glob("[!_]*.py"), key=lambda file: (file.stem != "merging", file.stem)):
        for function, words, facts in decorated(file, bench_method.__name__, globals()):
            facts = {**dict(zip(("title", "family"), words, strict=False)), **facts}
            kinds = (facts.pop("kind", file.stem), facts.pop("also", ()), facts.pop("alike", ()))
            name, given = facts.pop("name", function), facts.pop("given", None)
            entries = _entries(partial(_call_imported, file, function), *kinds, given)
            known = rows.get(name, Method(name, "", ""))
            rows[name] = replace(known, entries={**known.entries, **entries}, **facts)
    return rows


def _call_imported(file: Path, function: str, *args: Any, **parameters: Any) -> Candidate | dict[str, Candidate]:
    """Imports a file of this package, and calls its function."""
    candidates: Candidate | dict[str, Candidate] = getattr(import_module(f"{__package__}.{file.stem}"), function)(
        *args, **parameters
    )
    return candidates


def methods_of(module: ModuleType) -> dict[str, Method]:
    """All methods that an imported module declares, by name.

    Raises:
        FusionError: a method's family is unknown.
    """
    methods = {row.name: row for value in vars(module).values() for row in getattr(value, _MARK, ())}
    for row in methods.values():
        if row.family not in FAMILIES:
            raise FusionError(
                f"{row.name} has the unknown family {shown(row.family)}", hint=suggestion(row.family, FAMILIES)
            )
    return methods
