"""The public names: every class of the families is among them, and all of them are documented."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

import hf_fusion
from hf_fusion import models
from hf_fusion.families import FAMILIES, family_of

FUNCTIONS = [name for name in hf_fusion.__all__ if inspect.isfunction(getattr(hf_fusion, name))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_of_a_family_is_public(family):
    files = [
        import_module(f"{models.__name__}.{module.name}")
        for module in pkgutil.iter_modules(models.__path__)
        if module.name.endswith(f"_{family}")
    ]
    found = {
        name: value
        for module in files
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        # models and configs, and what models return or are fed by
        and (issubclass(value, (PreTrainedModel, PreTrainedConfig)) or name.endswith(("Trace", "Processor")))
    }
    assert len(found) >= 3
    for name, value in found.items():
        assert getattr(hf_fusion, name) is value
        assert name in hf_fusion.__all__


def test_there_are_as_many_public_names_as_one_page_shows():
    assert 25 <= len(hf_fusion.__all__) <= 40


@pytest.mark.parametrize("name", hf_fusion.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(hf_fusion, name)
    assert value.__doc__ and (inspect.isfunction(value) or value.__doc__ != value.__base__.__doc__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_documents_arguments_and_errors(name):
    function = getattr(hf_fusion, name)
    text = inspect.getdoc(function) or ""
    assert "Args:" in text and "Raises:" in text
    assert undocumented(function) == []


def undocumented(function):
    """Parameters without a line of their own: tools that read docstrings lose those that share one."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    entries = re.findall(r"^    (\w+): ", inspect.getdoc(function) or "", re.MULTILINE)
    return [name for name in names if name not in entries]


@pytest.mark.parametrize("name", sorted(set(hf_fusion.__all__) - set(FUNCTIONS)))
def test_every_parameter_of_a_public_method_is_documented(name):
    cls = getattr(hf_fusion, name)
    methods = [
        getattr(cls, key) for key in vars(cls) if not key.startswith("_") and inspect.isroutine(getattr(cls, key))
    ]
    own = [method for method in methods if method.__qualname__.startswith(f"{name}.")]
    assert {method.__name__: missing for method in own if (missing := undocumented(method))} == {}


def test_the_page_of_help_names_every_function():
    assert [name for name in FUNCTIONS if not re.search(rf"\b{name}\b", hf_fusion.__doc__)] == []


def test_every_qualified_name_in_the_code_exists():
    """In docstrings, comments, errors and hints: a reader types or imports what they name."""
    root = Path(hf_fusion.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in root.rglob("*.py")]
    names = {name for text in texts for name in re.findall(r"\bhf_fusion(?:\.[A-Za-z_]\w*)+(?:\{\w+\})?", text)}
    assert len(names) > 200
    missing = []
    for name in sorted(names):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError):
            missing.append(name)
    assert missing == []


def test_editors_and_type_checkers_find_the_same_names():
    tree = ast.parse(Path(hf_fusion.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {
        (alias.name, node.module) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert found == {(name, f"hf_fusion.{module}") for module, names in hf_fusion._PUBLIC.items() for name in names}


def test_type_checkers_know_the_class_of_each_method():
    tree = ast.parse(Path(inspect.getfile(hf_fusion.fuse)).read_text(encoding="utf-8"))
    overloads = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "fuse"]
    typed = {}
    for node in overloads[:-2]:  # then come static merges, and the function itself
        names = ast.literal_eval(node.args.args[0].annotation.slice)
        typed |= dict.fromkeys([names] if isinstance(names, str) else names, ast.unparse(node.returns))
    assert typed.keys() >= {"foe", "phatgoose", "wemoe"}  # another family's is a PreTrainedModel to them
    assert typed == {name: family_of(name).classes().model.__name__ for name in typed}


def test_the_types_of_all_public_names_are_checked():
    text = (Path(__file__).parent / "typed_api.py").read_text(encoding="utf-8")
    assert [name for name in hf_fusion.__all__ if not re.search(rf"\bhf\.{name}\b", text)] == []
