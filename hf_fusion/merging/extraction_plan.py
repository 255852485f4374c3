"""Plans the extraction of an adapter: what of a fine-tune becomes LoRA, what is saved in full, what is left out.

Names are those of the fine-tune's class in the installed transformers, whose modules PEFT adapts; no values are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_fusion.errors import FusionError
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.hub.parameter_names import build_meta_model, loaded_names
from hf_fusion.hub.peft_names import PREFIX
from hf_fusion.hub.task_heads import Head, head_of_architecture
from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.tied_weights import missing_tied_entries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# heads that PEFT saves in full, whatever the configuration says, for these types of tasks
_SAVED_BY_PEFT = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


@dataclass(frozen=True)
class Pair:
    """A tensor of a fine-tune and of its base.

    Attributes:
        name: in the loaded model.
        tuned: its name in the fine-tune's files.
        base: its name in the base's files; None if the base has none of that shape.
        resized: whether the base has one of another shape.
    """

    name: str
    tuned: str
    base: str | None
    resized: bool = False


@dataclass
class ExtractionPlan:
    """What of a fine-tune goes where, before it is known what has changed.

    Attributes:
        tuned: the fine-tune.
        base: its base.
        model: of the fine-tune's class, on the meta device.
        head: its head, or None if it is unknown.
        linears: weights of linear layers that the base has in the same shape, by module path.
        biases: their biases, by module path.
        others: all other tensors that may have changed, by name in the loaded model.
        unplaced: tensors that no adapter can hold -> why.
        tied: parameters that share their values with another one, as in the fine-tune.
    """

    tuned: Model
    base: Model
    model: PreTrainedModel
    head: Head | None
    linears: dict[str, Pair] = field(default_factory=dict)
    biases: dict[str, Pair] = field(default_factory=dict)
    others: dict[str, Pair] = field(default_factory=dict)
    unplaced: dict[str, tuple[Pair, str]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def transposed(self) -> bool:
        """Whether linear layers store their weights as (d_in, d_out), as GPT-2's Conv1D does."""
        return any(not isinstance(self.model.get_submodule(path), nn.Linear) for path in self.linears)

    @property
    def task_type(self) -> str | None:
        """PEFT's type of the task."""
        return self.head.peft if self.head else None

    def owner(self, name: str) -> str | None:
        """The module that must be saved in full to save a tensor; None if linear layers belong to it.

        Saving those in full would save most of the model.
        """
        path = name.rpartition(".")[0]
        below = any(linear == path or linear.startswith(f"{path}.") for linear in self.linears)
        return None if not path or below else path

    def wrapped(self, modules: set[str]) -> set[str]:
        """All modules that PEFT saves in full if these are in ``modules_to_save``, without those within another.

        PEFT compares the ends of paths, which do not begin at a dot, and expects the tensors of all modules that match.
        """
        ends = (*modules, *_SAVED_BY_PEFT.get(self.task_type or "", ()))
        paths = [path for path, _ in self.model.named_modules(remove_duplicate=False) if path]
        found = [path for path in paths if f"{PREFIX}{path}".endswith(ends)] if ends else []
        return {path for path in found if not any(path.startswith(f"{other}.") for other in found)}

    def tensors_of(self, module: str) -> list[Pair]:
        """All stored tensors of a module, those of linear layers included."""
        known = {pair.name: pair for pair in self._all()}
        return [known[name] for name in self.model.state_dict() if name.startswith(f"{module}.") and name in known]

    def _all(self) -> Iterator[Pair]:
        yield from self.others.values()
        yield from self.linears.values()
        yield from self.biases.values()
        yield from (pair for pair, _ in self.unplaced.values())


def plan_extraction(tuned: Model, base: Model) -> ExtractionPlan:
    """Plans which tensors are compared, and as what they are stored.

    Args:
        tuned: the fine-tune.
        base: its base; may lack the head, or have another one.

    Raises:
        FusionError: transformers does not know the fine-tune's class, or the models have no linear layer in common.
    """
    if base.adapter is not None:
        raise FusionError(f"{base.name} is an adapter, not the base of one", "--base owner/name of the whole model")
    made = build_meta_model(tuned.config, tuned.name, len(tuned.entries))
    if made.model is None:
        raise FusionError(
            f"the modules of {tuned.name} are unknown: {made.why}", "use a model of a class of transformers"
        )
    model = made.model
    tuned, base = (
        each if each.adapter else replace(each, entries=each.entries | missing_tied_entries(each))
        for each in (tuned, base)
    )
    names, known = _by_loaded_name(model, tuned), _by_loaded_name(model, base)
    head = head_of_architecture(type(model).__name__)
    plan = ExtractionPlan(tuned, base, model, head, tied=made.tied)
    state, tops = model.state_dict(), _head_modules(model, head)
    for name, stored in names.items():
        pair = _pair(name, stored, known, tuned, base)
        path, _, leaf = name.rpartition(".")
        is_linear = name in state and leaf == "weight" and pair.base is not None and _is_linear(model, path)
        if name not in state:
            why = "a module of sentence-transformers" if "/" in name else "part of a stacked parameter, or of no module"
            plan.unplaced[name] = (pair, why)
        elif is_linear and path.partition(".")[0] not in tops and not _is_shared(name, made.tied):
            plan.linears[path] = pair
        else:
            plan.others[name] = pair
    for path in plan.linears:
        bias = plan.others.get(f"{path}.bias")
        if bias is not None and bias.base is not None:
            plan.biases[path] = plan.others.pop(f"{path}.bias")
    if not plan.linears:
        raise FusionError(
            f"{tuned.name} has no linear layer of the name and shape of one of {base.name}",
            "name the base that it was fine-tuned from: --base owner/name",
        )
    for name in [name for name in plan.others if plan.owner(name) is None]:
        plan.unplaced[name] = (plan.others.pop(name), "a parameter of a module with linear layers")
    return plan


def _by_loaded_name(model: PreTrainedModel, stored: Model) -> dict[str, str]:
    """Name in the loaded model -> name in the files, in the order of the files; the first of several counts."""
    modules = [name for name in stored.entries if "/" in name]  # of sentence-transformers
    loaded = loaded_names(model, [name for name in stored.entries if "/" not in name])
    return {new: old for old, new in reversed(loaded.items())} | dict(zip(modules, modules, strict=True))


def _pair(name: str, stored: str, known: Mapping[str, str], tuned: Model, base: Model) -> Pair:
    under = known.get(name)
    if under is None or not base.entries[under].is_float or not tuned.entries[stored].is_float:
        return Pair(name, stored, None)
    is_same = base.shape(under) == tuned.shape(stored)
    return Pair(name, stored, under if is_same else None, not is_same)


def _is_linear(model: Any, path: str) -> bool:
    """Whether PEFT's LoRA applies to a module: it is called, unlike the projections of `MultiheadAttention`."""
    module = model.get_submodule(path)
    return linear_sizes(module) is not None and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def _is_shared(name: str, tied: Mapping[str, str]) -> bool:
    return name in tied or name in tied.values()


def _head_modules(model: PreTrainedModel, head: Head | None) -> set[str]:
    """The top modules of a head with labels, which is small and usually new; empty for other heads."""
    tops = {name for name, _ in model.named_children()}
    return tops - {model.base_model_prefix} if head and head.has_labels and model.base_model_prefix in tops else set()


__all__ = ["ExtractionPlan", "Pair", "plan_extraction"]
