"""List the fusion methods, or describe one: what it computes, what it needs, its parameters and its paper."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out

if TYPE_CHECKING:
    from hf_fusion.bench.methods.declaration import Method
    from hf_fusion.families import FamilyMethod
    from hf_fusion.merging.methods import MergeMethod
    from hf_fusion.schema import Field

EXAMPLES = (
    ("hf-fusion methods", "all methods of hf-fusion fuse, then those that only the benchmark has"),
    ("hf-fusion methods ties", "what TIES computes, and its parameters"),
    ("hf-fusion methods --format json", "everything about all methods, as JSON"),
)
_PAPER = re.compile(r"arXiv:? ?(\d{4}\.\d{5})")
_ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Entry(NamedTuple):
    """One method, as its declaration describes it.

    Attributes:
        name: on the command line and in recipes.
        kind: "family", "static merge" or "benchmark".
        title: in words.
        docstring: of the function that defines it.
        needs: what it needs besides its experts.
        parameters: by name.
        paper: URL of its paper, or "".
        command: an example.
    """

    name: str
    kind: str
    title: str
    docstring: str
    needs: tuple[str, ...]
    parameters: Mapping[str, Field]
    paper: str
    command: str

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, as one line."""
        return " ".join(self.docstring.partition("\n\n")[0].split())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each parameter."""
        text = {
            name: " ".join(match[2].split())
            for match in _ARGUMENT.finditer(self.docstring.partition("Args:\n")[2])
            for name in match[1].split(", ")
        }
        return [
            {
                "parameter": name,
                "type": f"{field.expected}{', for each expert' if field.per_expert else ''}",
                "default": None if field.required else field.default,
                "description": text.get(name, ""),
            }
            for name, field in self.parameters.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        facts = {name: getattr(self, name) for name in ("name", "kind", "title", "summary", "needs", "paper")}
        return {**facts, "parameters": self.rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of a method."""
    parser.add_argument("method", nargs="?", metavar="METHOD", help="describe this method; without it, list all")


def run(args: argparse.Namespace, out: Out) -> None:
    """Print a table of all methods, or one in full."""
    entries = {entry.name: entry for entry in all_methods()}
    if args.method is None:
        _list(list(entries.values()), out)
    elif args.method in entries:
        _describe(entries[args.method], out)
    else:
        from hf_fusion.errors import suggestion
        from hf_fusion.merging.methods import METHODS_LISTING

        raise UsageError(f"there is no method {args.method!r}", suggestion(args.method, entries, METHODS_LISTING))


def _list(entries: list[Entry], out: Out) -> None:
    if out.mode != "human":
        out.table([{"name": entry.name} for entry in entries], data=[entry.as_dict() for entry in entries])
        return
    fused = [entry for entry in entries if entry.kind != "benchmark"]
    rows = [
        {
            "method": entry.name,
            "what it computes": entry.summary,
            "needs": ", ".join(entry.needs),
            "parameters": ", ".join(f"{row['parameter']}={_short(row['default'])}" for row in entry.rows),
            "paper": entry.paper.removeprefix("https://arxiv.org/abs/").removeprefix("https://"),
        }
        for entry in fused
    ]
    out.table(rows, title=f"{len(rows)} methods of hf-fusion fuse --method")
    rest = [entry for entry in entries if entry.kind == "benchmark"]
    rows = [
        {"method": entry.name, "what it is": entry.title, "on suites of the kind": ", ".join(entry.needs)}
        for entry in rest
    ]
    out.table(rows, title=f"{len(rows)} more of hf-fusion bench run --methods")
    out.hint("hf-fusion methods METHOD describes one and its parameters")


def _describe(entry: Entry, out: Out) -> None:
    if out.mode == "json":
        out.dict(entry.as_dict())
        return
    if out.mode == "quiet":
        out.table([{"name": name} for name in entry.parameters])
        return
    about = entry.docstring.partition("\nArgs:")[0].partition("\nReturns:")[0].rstrip()
    out.text(f"{entry.name}: {entry.title} ({entry.kind})\n\n{about}\n\n")
    out.dict({"needs": ", ".join(entry.needs), "paper": entry.paper})
    if entry.parameters:
        out.text("")
        out.table(
            [{**row, "default": _short(row["default"])} for row in entry.rows], title="Parameters: --set NAME=VALUE"
        )
    out.hint(entry.command)


def _short(value: object) -> str:
    """A default as it is written after ``--set NAME=``."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ---------------------------------------------------------------- entries, from the declarations


def all_methods() -> Iterator[Entry]:
    """Every method that can be chosen: of families, static merges, and those that only the benchmark has."""
    from hf_fusion.bench.methods import METHODS as OF_BENCH
    from hf_fusion.families import METHODS
    from hf_fusion.merging.methods import MERGE_METHODS

    yield from (_of_family(name, method) for name, method in METHODS.items())
    yield from map(_of_merge, MERGE_METHODS.values())
    known = {*METHODS, *MERGE_METHODS}
    yield from (_of_bench(method) for name, method in OF_BENCH.items() if name not in known)


def _of_family(name: str, method: FamilyMethod) -> Entry:
    from hf_fusion.families import FAMILIES
    from hf_fusion.io.declarations import docstring

    family = FAMILIES[method.family]
    fitted = [part for part in family.fit if not part.of_adapter and name == family.name]
    needs = {
        "adapters of one base": family.needs.gates,
        "gates of each (hf-fusion fit gates)": family.needs.gates,
        "the base": family.needs.mergeable,
        **{f"rows to fit on (hf-fusion fit {part.name})": True for part in fitted},
    }
    is_main, about = name == family.name, docstring(method.file)
    paper = _PAPER.search(about)
    base = " --base BASE" if method.takes_base else ""
    return Entry(
        name,
        "family",
        family.title.partition(" ")[2] if is_main else name,
        (about.partition("\n\n")[0] + "\n\n" if is_main else "") + docstring(method.file, method.constructor),
        tuple(need for need, is_needed in needs.items() if is_needed),
        method.options,
        f"https://arxiv.org/abs/{paper[1]}" if paper and is_main else "",
        f"hf-fusion fuse --method {name}{base} --experts A B --output fused",
    )


def _of_merge(method: MergeMethod) -> Entry:
    from hf_fusion.io.declarations import docstring

    most = method.experts[1]
    needs = {
        "LoRA adapters of one base": method.merges == "adapters",
        "1 expert": most == 1,
        "2 experts": most == 2,
        "the base": method.base == "needed",
        "the base, if given": method.base == "optional",
        f"statistics of each expert's data ({method.statistics})": bool(method.statistics),
    }
    base = " --base BASE" if method.base == "needed" else ""
    experts = " ".join(("A", "B")[: most or 2])
    return Entry(
        method.name,
        "static merge",
        method.title,
        docstring(method.file, method.name),
        tuple(need for need, is_needed in needs.items() if is_needed),
        method.parameters,
        method.url,
        f"hf-fusion fuse --method {method.name}{base} --experts {experts} --output merged",
    )


def _of_bench(method: Method) -> Entry:
    from hf_fusion.bench.methods import FAMILIES

    text = f"{FAMILIES[method.family]}: {method.title}."
    command = f"hf-fusion bench run --suite SUITE --methods {method.name} --output results"
    return Entry(method.name, "benchmark", method.title, text, tuple(method.entries), {}, "", command)
