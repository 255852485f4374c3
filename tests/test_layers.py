"""The package has layers: modules import from their layer and lower ones, also in functions, without circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_fusion

ROOT = Path(hf_fusion.__file__).parent
# From the bottom to the top; names of one line are one layer. `server` stands beside them and needs errors alone.
LAYERS = (
    ("errors",),
    ("extras", "progress", "schema"),
    ("io",),
    ("types",),
    ("recipe",),
    ("models",),
    ("families",),
    ("hub",),
    ("merging",),
    ("training",),
    ("fused_models", "fused_folders", "fusion", "data", "assets"),
    ("evaluation",),
    ("search",),
    ("cards", "publishing", "serving"),
    ("exporting",),
    ("bench",),
    ("demo",),
    ("cli",),
)
EVERYWHERE = "models.fused_html"  # tables in HTML, which travel with models and import nothing
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
SERVER = "server"


def modules() -> dict[str, Path]:
    """Dotted name below hf_fusion → its file."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    del found[""]  # the public names: they load on first use
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """The modules that a module imports at any place but for annotations alone."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_annotations:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["hf_fusion", *package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}"[10:] in MODULES else base for alias in node.names]
        yield from (name[10:] for name in names if name.startswith("hf_fusion.") and name[10:] in MODULES)


EDGES = {module: sorted(set(imported(module)) - {module}) for module in MODULES}


def test_every_module_is_of_a_layer():
    assert {module.partition(".")[0] for module in MODULES} == {*LEVELS, SERVER}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_nothing_from_above(module):
    folder = module.partition(".")[0]
    for other in EDGES[module]:
        its = other.partition(".")[0]
        if other == EVERYWHERE and folder != SERVER:
            continue
        if folder == SERVER:
            assert its in (SERVER, "errors"), f"{module} imports {other}"
        elif its == SERVER:
            assert folder in ("demo", "cli"), f"{module} imports {other}"
        else:
            assert LEVELS[its] <= LEVELS[folder], f"{module} imports {other}, which is a layer above"


def test_what_every_layer_may_import_imports_nothing():
    assert EDGES[EVERYWHERE] == []


def test_no_import_circles():
    waiting = {module: set(others) for module, others in EDGES.items()}
    while free := {module for module, others in waiting.items() if not others & waiting.keys()}:
        waiting = {module: others for module, others in waiting.items() if module not in free}
    # what is left holds the circles, and what imports them; the latter is peeled off
    while outer := {m for m in waiting if not any(m in others for others in waiting.values())}:
        waiting = {module: others for module, others in waiting.items() if module not in outer}
    assert not waiting, "\n".join(f"{m} imports {', '.join(sorted(o & waiting.keys()))}" for m, o in waiting.items())
