"""Reads declarations from the text of Python files, since importing the files would take seconds."""

from __future__ import annotations

import ast
import typing
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hf_fusion import schema
from hf_fusion.schema import Field, parameters_of


@cache
def declared(file: Path, name: str) -> dict[str, Field]:
    """`parameters_of` for a function or method in a file that is not imported.

    Its annotations and defaults may use the names of `hf_fusion.schema` and `typing`, `Path`, and the file's plain
    constants.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known: dict[str, Any] = {**vars(typing), **vars(schema), "Path": Path}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            with suppress(Exception):  # it uses torch, or something else that was not imported
                exec(compile(ast.Module([node], []), str(file), "exec"), known)
    [given] = [node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    with_default = given.args[len(given.args) - len(given.defaults) :]
    arguments = ast.arguments(
        [], [], None, [*with_default, *given.kwonlyargs], [*given.defaults, *given.kw_defaults], None, []
    )
    stub = ast.FunctionDef(name, arguments, [ast.Pass()], [], None, None, lineno=1, col_offset=0)
    exec(compile(ast.fix_missing_locations(ast.Module([stub], [])), str(file), "exec"), known)
    return parameters_of(known[name])


def docstring(file: Path, name: str = "") -> str:
    """The docstring of a file that is not imported, or of its first function or method of that name."""
    tree = ast.parse(file.read_text("utf-8"))
    if not name:
        return ast.get_docstring(tree) or ""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return next((ast.get_docstring(node) or "" for node in functions if node.name == name), "")


def decorated(file: Path, decorator: str, known: Mapping[str, Any]) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """The functions of a file that have a decorator, with the decorator's arguments, without importing the file.

    Args:
        file: Python source.
        decorator: name of the decorator.
        known: names that its arguments may use beside literals.

    Returns:
        (name of the function, positional arguments, keyword arguments) of each decorator, from top to bottom.
    """
    found = []
    functions = [node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    for node in functions:
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                words, facts = (
                    ast.List(call.args, ast.Load()),
                    ast.Dict(
                        [ast.Constant(given.arg) for given in call.keywords], [given.value for given in call.keywords]
                    ),
                )
                both = ast.fix_missing_locations(ast.Expression(ast.Tuple([words, facts], ast.Load())))
                found.append((node.name, *eval(compile(both, str(file), "eval"), dict(known))))
    return found
