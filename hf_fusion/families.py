"""The families: methods of fusion with model classes of their own, and their options, without importing torch."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion import models
from hf_fusion.errors import FusionError, suggestion
from hf_fusion.merging.methods import MERGE_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    """A way to fuse.

    Attributes:
        module: where it is defined; imported when it is used.
        model_type: of its models' configs.
        function: dotted name in the module, called with loaded experts and the method's options.
        weighs: whether experts carry weights.
        check: a function with the same arguments, called before anything is loaded, if there is one.
        takes_base: whether it is given the loaded base, an `Expert`, as ``base=``; None where the caller named none.
    """

    module: str
    model_type: str
    function: str
    weighs: bool = False
    check: Callable[..., None] | None = None
    takes_base: bool = False

    def load(self) -> Callable[..., PreTrainedModel]:
        """The function itself."""
        found: Any = import_module(self.module)
        for part in self.function.split("."):
            found = getattr(found, part)
        return found

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options: read from its file, which is not imported for it."""
        return tuple(name for name in _arguments(self.function) if name not in ("cls", "experts", "base"))


def _check_phatgoose(*args: Any, **options: Any) -> None:
    from hf_fusion.models.assembly_phatgoose import check_options

    check_options(*args, **options)


def _check_wemoe(*args: Any, **options: Any) -> None:
    from hf_fusion.models.build_wemoe import check_options

    check_options(*args, **options)


# A new method is one more row; the static merging methods have a table of their own, `MERGE_METHODS`.
METHODS = {
    "foe": Method("hf_fusion.fused_models", "foe", "FoEModel.from_experts"),
    "ensemble": Method("hf_fusion.fused_models", "foe", "FoEModel.ensemble", weighs=True),
    "phatgoose": Method("hf_fusion.fused_models", "phatgoose", "PhatgooseRouter.from_experts", check=_check_phatgoose),
    "wemoe": Method("hf_fusion.fused_models", "wemoe", "WEMoEModel.from_experts", check=_check_wemoe, takes_base=True),
}


def family_named(name: str, parameters: Mapping[str, Any]) -> Method:
    """The row of a method, once its name and its options are known to be right.

    Raises:
        FusionError: there is no such method, or it has no such option.
    """
    if name not in METHODS:
        raise FusionError(f"There is no method {name!r}.", hint=suggestion(name, [*METHODS, *MERGE_METHODS]))
    options = METHODS[name].options
    if unknown := [option for option in parameters if option not in options]:
        raise FusionError(f"Method {name} has no parameter {unknown[0]!r}.", hint=suggestion(unknown[0], options))
    return METHODS[name]


@cache
def _arguments(function: str) -> tuple[str, ...]:
    """The arguments of a class's function, by the text of the families' files."""
    owner, name = function.split(".")
    for file in sorted(Path(models.__file__).parent.glob("modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == owner:
                [found] = [own for own in node.body if isinstance(own, ast.FunctionDef) and own.name == name]
                return tuple(argument.arg for argument in [*found.args.args, *found.args.kwonlyargs])
    raise AssertionError(f"no family has {function}")
