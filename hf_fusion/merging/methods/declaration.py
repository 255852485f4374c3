"""The decorator of static merging methods, and the rows that it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from hf_fusion.io.declarations import declared, decorated
from hf_fusion.merging.mergekit import parameters as mk
from hf_fusion.merging.mergekit.parameters import MergekitParameter
from hf_fusion.schema import Field, parameters_of

Function = TypeVar("Function", bound=Callable[..., Any])


def merge_method(
    title: str,
    *,
    base: Literal["", "optional", "needed"],
    needs: Literal["chunks", "norms", "thresholds", "whole"],
    experts: tuple[int, int | None] = (1, None),
    paper: str = "",
    statistics: Literal["", "fisher", "gram"] = "",
    merges: Literal["models", "adapters"] = "models",
    expert_settings: tuple[str, ...] = (),
    stochastic: bool = False,
    matrices_only: bool = False,
    plans: bool = False,
    mergekit: Mapping[str, MergekitParameter] | None = None,
    mergekit_always: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Declares a function of this folder as a static merging method, named like the function.

    The method's rows in the command line, the benchmark, mergekit's recipes and the docs follow from it. The decorator
    is read from the source file, so that listing all methods imports none of them: its arguments must be literals, or
    use names that `hf_fusion.merging.mergekit.parameters`, as ``mk``, defines.

    Args:
        title: its name in cards and tables.
        base: "needed", "optional", or "" if it does not use the model that the experts were fine-tuned from.
        needs: how much of a tensor is in memory at once: "chunks", read once; chunks that are read several times for
            "norms" or "thresholds"; or the "whole" tensor of all experts.
        experts: minimum and maximum number of experts (None: no maximum).
        paper: arXiv number or URL.
        statistics: the statistics that it needs of every expert's data, or "". An expert's ``parameters: {statistics:
            FOLDER}`` names their folder (`hf_fusion.training.expert_statistics`).
        merges: "models", or "adapters": LoRA adapters into one adapter (`hf_fusion.merging.lora`), where the function
            merges a module's factors.
        expert_settings: settings that each expert may have in addition to the parameters.
        stochastic: whether the result depends on the seed.
        matrices_only: whether it decomposes matrices, and averages all other tensors.
        plans: whether the file has a function ``plan``, for merged models whose tensors differ from the inputs'.
        mergekit: parameters of mergekit's method of the same name; None if mergekit has no such method.
        mergekit_always: parameters with the fixed values that they have in mergekit's method.
    """
    return lambda function: function


@dataclass(frozen=True)
class MergeMethod:
    """A static merging method; see `merge_method` for the other attributes.

    Attributes:
        name: the name of its function, and in recipes.
        file: the file of the function: (`Tensors`, parameters) -> `Combination`, a function of a `Chunk`, or the
            merged tensor.
    """

    name: str
    file: Path
    title: str
    base: Literal["", "optional", "needed"]
    needs: Literal["chunks", "norms", "thresholds", "whole"]
    experts: tuple[int, int | None] = (1, None)
    paper: str = ""
    statistics: Literal["", "fisher", "gram"] = ""
    merges: Literal["models", "adapters"] = "models"
    expert_settings: tuple[str, ...] = ()
    stochastic: bool = False
    matrices_only: bool = False
    plans: bool = False
    mergekit: Mapping[str, MergekitParameter] | None = None
    mergekit_always: Mapping[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        """The module of its function."""
        return import_module(f"{__package__}.{self.file.stem}")

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        function: Callable[..., Any] = getattr(self.module, self.name)
        return function

    @property
    def url(self) -> str:
        """URL of its paper, or ""."""
        return f"https://arxiv.org/abs/{self.paper}" if self.paper[:1].isdigit() else self.paper

    @cached_property
    def parameters(self) -> dict[str, Field]:
        """Its parameters by name, read from its source file; the file is imported only if that fails."""
        try:
            return declared(self.file, self.name)
        except NameError:  # its annotations use names that another file defines
            return parameters_of(self.function)


def methods_in(folder: Path) -> dict[str, MergeMethod]:
    """All methods that the files of a folder declare, by name; those of ``linear.py`` first."""
    methods = {}
    for file in sorted(folder.glob("[!_]*.py"), key=lambda file: (file.stem != "linear", file.stem)):
        for name, words, facts in decorated(file, merge_method.__name__, {"mk": mk}):
            methods[name] = MergeMethod(name, file, *words, **facts)
    return methods


__all__ = ["MergeMethod", "merge_method", "methods_in"]
