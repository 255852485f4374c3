"""What the benchmark compares: one decorated function for each technique, chosen by name or family.

Static merging methods need none: each that merges any number of models has a row by its own declaration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.bench.methods.declaration import (
    FAMILIES,
    SCALING,
    EntryPoint,
    Method,
    bench_method,
    declared_in,
    methods_of,
)
from hf_fusion.errors import FusionError, path_suggestion, shown, suggestion
from hf_fusion.merging.methods import MERGE_METHODS, METHODS_LISTING

if TYPE_CHECKING:
    from hf_fusion.bench.candidates import Candidate
    from hf_fusion.bench.methods.merging import MergesAdapters
    from hf_fusion.bench.suite import Holdout

# merging methods whose row has another name or title than they
_RENAMED = {"linear": ("average", "Simple average"), "dare_linear": ("dare", "DARE task arithmetic")}


def _static(setup: MergesAdapters, holdout: Holdout, seed: int, **parameters: Any) -> Candidate:
    from hf_fusion.bench.methods import merging  # imports torch

    return merging.static(setup, holdout, seed, **parameters)


def _static_rows(declared: dict[str, Method]) -> dict[str, Method]:
    """A row for each static merging method that merges any number of models and has none yet."""
    rows = {}
    for name, method in MERGE_METHODS.items():
        if method.merges != "models" or method.plans or method.experts[1] == 1 or name in declared:
            continue
        shown_as, title = _RENAMED.get(name, (name, method.title))
        entries = {kind: EntryPoint(_static, kind, {"method": name}) for kind in ("merging", "routing")}
        rows[shown_as] = Method(
            shown_as,
            title,
            "data" if method.statistics else "merge",
            SCALING if "scaling" in method.parameters else None,
            method.stochastic or bool(method.statistics),  # the rows that they are measured on are drawn
            entries,
        )
    return rows


def _all_rows() -> dict[str, Method]:
    declared = declared_in(Path(__file__).parent)
    rows = {**_static_rows(declared), **declared}
    order = list(FAMILIES)
    return dict(sorted(rows.items(), key=lambda item: order.index(item[1].family)))


METHODS = _all_rows()
"""Method → its row, in the order of the families."""

STATIC = tuple(name for name, row in METHODS.items() if row.family in ("merge", "data"))


def chosen(words: Sequence[str], kind: str) -> list[str]:
    """The methods that words ask for, in the table's order.

    Args:
        words: names of methods or families, "static" for all static merging, "all", or the path of a Python file with
            functions decorated by `bench_method`, which are added to the table.
        kind: of the suite.

    Raises:
        FusionError: nothing is called like that, or it is for suites of another kind.
    """
    added = {word: _read(Path(word)) for word in words if word.endswith(".py")}
    words = [name for word in words for name in added.get(word, [word])]
    known = {name: row for name, row in METHODS.items() if kind in row.entries}
    wanted: set[str] = set()
    for word in words:
        found: Iterable[str] = (
            known if word == "all" else [name for name in STATIC if name in known] if word == "static" else
            [name for name, row in known.items() if word in (name, row.family)]
        )  # fmt: skip
        if word in METHODS and word not in known:
            kinds = " and ".join(METHODS[word].entries)
            raise FusionError(f"{word} is for suites of the kind {kinds}; this one is of the kind {kind}")
        if not found:
            families = dict.fromkeys(row.family for row in known.values())
            raise FusionError(
                f"there is no method {shown(word)}",
                hint=suggestion(word, ["all", "static", *families, *known], METHODS_LISTING),
            )
        wanted |= set(found)
    return [name for name in known if name in wanted]


def _read(path: Path) -> list[str]:
    """Adds the methods of a file to the table; their names.

    Raises:
        FusionError: the file is missing, declares no method, or declares one whose name is taken.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FusionError(f"{path} does not exist", path_suggestion(path, "--methods FILE.py, or the name of a method"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = methods_of(module)
    if not found:
        raise FusionError(f"{path} declares no method", hint='decorate its function: @bench_method("Mine", "merge")')
    for name, row in found.items():
        if name in METHODS and METHODS[name].title != row.title:
            raise FusionError(f"{path}: there is already a method {name}", hint="give yours another name")
        METHODS[name] = row
    return list(found)


__all__ = ["FAMILIES", "METHODS", "STATIC", "Method", "bench_method", "chosen"]
