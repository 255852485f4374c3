"""What is declared of a merging method beside its signature: the decorator of its function."""

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
    """Declares a function of this folder a static merging method, whose name is the function's.

    The command line, the benchmark, mergekit's recipes and the table of the docs follow from it. It is read from the
    text of the file, so that listing all methods imports none of them: its arguments must be literals, or made of what
    `hf_fusion.merging.mergekit.parameters`, as ``mk``, defines.

    Args:
        title: what cards and tables call it.
        base: whether it needs the model that the experts were fine-tuned from, or takes it if it is there; "" where it
            has no use for it.
        needs: what of a tensor is in memory at once: "chunks" of it, read once; chunks read twice or more for their
            "norms" or their "thresholds"; or the "whole" of it, for all experts.
        experts: how many it merges: at least, at most (None: any number).
        paper: arXiv number or address.
        statistics: what must have been measured of every expert on its own data, if anything: a folder that its
            ``parameters: {statistics: FOLDER}`` names (`hf_fusion.training.expert_statistics`).
        merges: whole models, or LoRA adapters into one adapter (`hf_fusion.merging.lora`): its function is then of
            a module's factors.
        expert_settings: settings that every expert may have beside the parameters.
        stochastic: whether another seed gives another model.
        matrices_only: it decomposes matrices, and averages all other tensors.
        plans: whether the function ``plan`` of its file plans the merged model, whose tensors are not those of its
            models.
        mergekit: mergekit's parameters of its method of the same name; None where mergekit has none.
        mergekit_always: our parameters whose values mergekit's method always has.
    """
    return lambda function: function


@dataclass(frozen=True)
class MergeMethod:
    """A static merging method; see `merge_method` for what is declared of it.

    Attributes:
        name: of its function, and in recipes.
        file: where the function is: (`Tensors`, parameters) -> `Combination`, a function of a `Chunk`, or the merged
            tensor.
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
        """Where its paper is; empty where there is none."""
        return f"https://arxiv.org/abs/{self.paper}" if self.paper[:1].isdigit() else self.paper

    @cached_property
    def parameters(self) -> dict[str, Field]:
        """Its parameters, by name: read from its file, which is not imported for it where that can be avoided."""
        try:
            return declared(self.file, self.name)
        except NameError:  # its annotations use names that another file defines
            return parameters_of(self.function)


def methods_in(folder: Path) -> dict[str, MergeMethod]:
    """All methods that the files of a folder declare, by name; those that just sum weights first."""
    found = {}
    for file in sorted(folder.glob("[!_]*.py"), key=lambda file: (file.stem != "linear", file.stem)):
        for name, words, facts in decorated(file, merge_method.__name__, {"mk": mk}):
            found[name] = MergeMethod(name, file, *words, **facts)
    return found


__all__ = ["MergeMethod", "merge_method", "methods_in"]
