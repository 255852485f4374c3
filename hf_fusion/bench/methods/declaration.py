"""What is declared of a benchmarked method beside its function: the decorator, and the row that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_fusion.errors import FusionError, shown
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
# what routers and coefficients learn with, where nothing else is said: chosen on minilm-8's validation splits
LEARNING = {"steps": 80, "batch_size": 8, "scaling": 0.1}
ENTROPY = {"loss": "entropy", "diversity": 0.0}

Function = TypeVar("Function", bound=Callable[..., Any])
_MARK = "bench_methods"  # attribute of a decorated function


@dataclass(frozen=True)
class EntryPoint:
    """How a method is run on suites of one kind.

    Attributes:
        function: (setup, holdout, seed, parameters) → `Candidate`, or several of them by name; or where it stands in
            this folder, "kind.name".
        kind: of the setup that the function gets.
        given: parameters that differ from the function's defaults.
    """

    function: str | Callable[..., Any]
    kind: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, setup: TaskSetup, holdout: Holdout, seed: int, **changed: Any
    ) -> Candidate | dict[str, Candidate]:
        """The method's candidates.

        Args:
            setup: of any kind that `TaskSetup.of_kind` makes this entry's from.
            holdout: which experts are fused.
            seed: of everything random.
            changed: parameters that differ from `given`.
        """
        function = self.function
        if isinstance(function, str):
            module, _, name = function.rpartition(".")
            function = getattr(import_module(f"{__package__}.{module}"), name)
        made: Candidate | dict[str, Candidate] = function(
            setup.of_kind(self.kind), holdout, seed, **{**self.given, **changed}
        )
        return made


@dataclass(frozen=True)
class Method:
    """A row of the benchmark.

    Attributes:
        name: in cells and on the command line.
        title: what tables call it.
        family: a key of `FAMILIES`.
        tune: the parameter whose best value is searched for on the validation split, and its values.
        stochastic: whether another seed gives another model.
        entries: kind of suite → how it is run there.
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
    """Declares a function a method of the benchmark; it may be declared several times, with other names.

    The function takes the task setup of a suite, which experts are fused, a seed and its own parameters, and gives the
    `Candidate` that comes out, or several of them by name. In this package the decorator is read from the text of the
    file: its arguments must be literals, or made of what this module defines.

    Args:
        title: what tables call it; without one, the function is how the method of its name is run on suites of
            another kind, whose title and family count.
        family: a key of `FAMILIES`.
        name: in cells and on the command line; default is the function's.
        kind: of the suites whose setup it takes; default is that of its file, "merging" in files of users.
        also: other kinds of suites, from whose setup that of `kind` can be made.
        alike: other kinds of suites, whose setup it takes as it is.
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
    function: str | Callable[..., Any],
    kind: str,
    also: tuple[str, ...],
    alike: tuple[str, ...],
    given: Mapping[str, Any] | None,
) -> dict[str, EntryPoint]:
    found = dict.fromkeys((kind, *also), EntryPoint(function, kind, given or {}))
    return found | {other: EntryPoint(function, other, given or {}) for other in alike}


def declared_in(folder: Path) -> dict[str, Method]:
    """All methods that the files of a folder, named by the kind of their settings, declare; "merging" comes first."""
    rows: dict[str, Method] = {}
    for file in sorted(folder.glob("[!_]*.py"), key=lambda file: (file.stem != "merging", file.stem)):
        for function, words, facts in decorated(file, bench_method.__name__, globals()):
            facts = {**dict(zip(("title", "family"), words, strict=False)), **facts}
            kinds = (facts.pop("kind", file.stem), facts.pop("also", ()), facts.pop("alike", ()))
            name, given = facts.pop("name", function), facts.pop("given", None)
            entries = _entries(f"{file.stem}.{function}", *kinds, given)
            known = rows.get(name, Method(name, "", ""))
            rows[name] = replace(known, entries={**known.entries, **entries}, **facts)
    return rows


def methods_of(module: ModuleType) -> dict[str, Method]:
    """All methods that an imported module declares, by name.

    Raises:
        FusionError: a family that there is not.
    """
    found = {row.name: row for value in vars(module).values() for row in getattr(value, _MARK, ())}
    for row in found.values():
        if row.family not in FAMILIES:
            raise FusionError(f"{row.name} is of no family {shown(row.family)}", hint=", ".join(FAMILIES))
    return found
