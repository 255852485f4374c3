"""The dense model, of a class of transformers, that a fused model becomes for one task or for given rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_fusion.data import match_experts_by_name
from hf_fusion.errors import FusionError, listed, suggestion
from hf_fusion.models.fused_heads import AUTO_CLASSES
from hf_fusion.models.heads_wemoe import name_classes
from hf_fusion.models.modeling_foe import FoEModel
from hf_fusion.models.modeling_phatgoose import PhatgooseRouter
from hf_fusion.models.modeling_wemoe import WEMoEModel
from hf_fusion.models.options_foe import settings_of
from hf_fusion.training.batches import unlabelled

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.models.fused import FusedPreTrainedModel

BATCH_SIZE = 16
_NAME = "name one: --task NAME"


@dataclass
class Dense:
    """A dense model, and how it was made.

    Attributes:
        model: of a class of transformers, in evaluation mode.
        processor: its tokenizer or image processor; None if unknown.
        sentence: what it is, for its card.
        facts: the weights of the experts, as plain data.
    """

    model: PreTrainedModel
    processor: Any
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)


def dense_model(fused: FusedPreTrainedModel, task: str | None = None, rows: Dataset | None = None) -> Dense:
    """The dense model that a fused model becomes.

    A WEMoE is merged with an expert's weights, or with the mean coefficients of rows; then `task` chooses the head.
    A PHATGOOSE router's base gets the update of one expert, the experts' mean weighted by their use on rows, or their
    plain mean. Of a Fusion of Experts one expert remains: the named one, or the one that is selected for most rows.

    Args:
        fused: a model of one of the families; its weights are shared where they are not merged.
        task: name of an expert, with or without its owner.
        rows: with the model's inputs, such as ``text``, ``prompt`` or ``image``.

    Raises:
        FusionError: no dense model computes the same; the expert is unknown; or the rows cannot be read.
    """
    for family, build in _BUILDERS.items():
        if isinstance(fused, family):
            if rows is not None and not len(rows):
                raise FusionError("the input has no rows", "give at least one row")
            with torch.no_grad():
                return build(fused, None if task is None else expert_named(task, fused), rows)
    raise FusionError(f"{type(fused).__name__} is a dense model already", "use its folder as it is")


def expert_named(task: str, fused: FusedPreTrainedModel) -> str:
    """The full name of an expert that is named with or without its owner.

    Raises:
        FusionError: no expert has this name.
    """
    names = [row["name"] for row in fused.config.experts]
    if task in names:
        return task
    if found := match_experts_by_name([task], names):
        return found[task]
    raise FusionError(f"there is no expert {task!r}", suggestion(task, names))


# ---------------------------------------------------------------- WEMoE


def _of_wemoe(fused: WEMoEModel, task: str | None, rows: Dataset | None) -> Dense:
    from hf_fusion.evaluation.coefficient_map import map_coefficients

    if fused.config.routing == "smile":
        raise FusionError(
            "SMILE chooses experts token by token: no dense model does the same",
            "merge its experts instead: hf-fusion fuse --method task_arithmetic",
        )
    if rows is None and task is None:
        raise FusionError(
            "a WEMoE is merged per input: what is exported must be merged for an expert's task or for rows",
            f"name an expert of {', '.join(fused.experts)}: --task NAME, or rows: --input FILE",
        )
    facts: dict[str, Any] = {} if task is None else {"task": task}
    if rows is None:
        assert task is not None
        sentence = f"The WEMoE merged with the weights of {task} alone."
        model = fused.merge_for(task=task)
    else:
        found = map_coefficients(fused, {"input": rows}, batch_size=BATCH_SIZE)
        table = dict(zip(found.layers, found.coefficients[0], strict=True))
        if unread := [unit.name for unit in fused.units if unit.name not in table]:
            raise FusionError(f"these rows do not reach {unread[0]}, so its coefficients are unknown", _NAME)
        facts |= {"rows": len(rows), "coefficients": {name: _by_expert(fused, w) for name, w in table.items()}}
        sentence = f"The WEMoE merged with the mean coefficients of {len(rows)} rows."
        model = fused.merge_for(coefficients={name: torch.tensor(w) for name, w in table.items()}, task=task)
    if fused.config.task_heads:
        head = task or fused.task or fused.experts[0]
        facts["head"], sentence = head, f"{sentence} Its head is that of {head}."
    return Dense(model, fused.processor, sentence, facts)


def _by_expert(fused: Any, weights: Sequence[float]) -> dict[str, float]:
    return dict(zip((row["name"] for row in fused.config.experts), map(float, weights), strict=True))


# ---------------------------------------------------------------- PHATGOOSE


def expert_weights(fused: PhatgooseRouter, task: str | None, rows: Dataset | None) -> tuple[dict[str, float], str]:
    """The weight of each expert in one update, and a description of it.

    Raises:
        FusionError: both a task and rows are given, or the rows cannot be read.
    """
    from hf_fusion.evaluation.routing_map import map_routing

    if task is not None and rows is not None:
        raise FusionError("either the task or the rows determine the weights of the experts", "omit one of them")
    if task is not None:
        return {task: 1.0}, f"the update of {task}"
    if rows is None:
        return dict.fromkeys(fused.experts, 1 / len(fused.experts)), "the mean of the experts' updates"
    if fused.config.head == "causal-lm" and "target" not in rows.column_names:
        weights = _use(fused, rows)
    else:
        given = rows if "target" in rows.column_names else unlabelled(rows)
        weights = map_routing(fused, {"input": given}, batch_size=BATCH_SIZE).weights[0]
    return _by_expert(fused, weights), f"the experts' updates, weighted by their use on {len(rows)} rows"


def _use(fused: PhatgooseRouter, rows: Dataset) -> list[float]:
    """The share of the routing weight of all tokens of prompts that each expert gets."""
    column, total = _column(rows, ("prompt", "text")), torch.zeros(len(fused.experts))
    before, fused.record_routing = fused.record_routing, 1
    try:
        for text in rows[column]:
            fused(**fused.processor(text, return_tensors="pt").to(fused.device))
            total += torch.tensor([*fused.routing_trace().usage().values()]) / len(rows)
    finally:
        fused.record_routing = before
    return list((total / total.sum()).tolist())


def _column(rows: Dataset, names: Sequence[str]) -> str:
    """The first of these columns that the rows have.

    Raises:
        FusionError: they have none of them.
    """
    for name in names:
        if name in rows.column_names:
            return name
    raise FusionError(f"the input has the columns {listed(rows.column_names)}, but no {' or '.join(names)}")


def _of_phatgoose(fused: PhatgooseRouter, task: str | None, rows: Dataset | None) -> Dense:
    weights, what = expert_weights(fused, task, rows)
    entries = [(entry, w) for entry in fused._entries() if (w := weights.get(entry.row["name"], 0.0))]
    if len({tuple(entry.row["labels"]) for entry, _ in entries}) > 1:
        raise FusionError("these experts have different labels, which no single head can serve", _NAME)
    inserted = (".experts.", ".gate_point.")
    routed_heads = tuple(f"{path}." for path in fused._heads)
    state = {
        name: tensor
        for name, tensor in fused.backbone.state_dict().items()
        if not any(part in name for part in inserted) and not (routed_heads and name.startswith(routed_heads))
    }
    config = copy.deepcopy(fused.config.backbone_config())
    if labels := entries[0][0].row["labels"]:
        name_classes(config, labels)
    model: PreTrainedModel = AUTO_CLASSES[fused.config.head].from_config(config, trust_remote_code=False)
    updates: dict[str, torch.Tensor] = {}
    for entry, weight in entries:
        for path, (*_, a, b) in entry.lora.items():
            update = weight * (b.float().T @ a.float())
            updates[path] = updates[path] + update if path in updates else update
    for path, update in updates.items():
        _add(model, state, path, update)
    for path in entries[0][0].heads:
        known = dict(model.get_submodule(path).named_parameters())
        for index, leaf in enumerate(("weight", "bias")):
            if leaf in known:
                parts = [weight * entry.heads[path][index].float() for entry, weight in entries]
                state[f"{path}.{leaf}"] = torch.stack(parts).sum(0).to(fused.backbone.dtype)
    _fill(model, state)
    if fused.can_generate():
        model.generation_config = copy.deepcopy(fused.generation_config)
    base = fused.config.base.get("id") or "the base"
    return Dense(model, fused.processor, f"{base} with {what}.", {"weights": weights})


def _add(model: PreTrainedModel, state: dict[str, torch.Tensor], path: str, update: torch.Tensor) -> None:
    """Adds an update (d_out, d_in) to a linear's weight in `state`; a head tied to embeddings is untied first."""
    name, module = f"{path}.weight", model.get_submodule(path)
    old = state[name]
    change = update.T if isinstance(module, Conv1D) else update
    state[name] = (old.float() + change).to(old.dtype)
    if module is model.get_output_embeddings() and getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
        module.weight = torch.nn.Parameter(torch.empty_like(old))


def _fill(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Gives a model the tensors of a state, which it shares, all of them."""
    model.load_state_dict(dict(state), strict=True, assign=True)
    model.tie_weights()
    model.requires_grad_(True).eval()


# ---------------------------------------------------------------- Fusion of Experts


def _of_foe(fused: FoEModel, task: str | None, rows: Dataset | None) -> Dense:
    config = fused.config
    if task is not None and rows is not None:
        raise FusionError("either the task or the rows choose the expert", "omit one of them")
    names = [row["name"] for row in config.experts]
    facts: dict[str, Any] = {}
    if rows is not None and config.mode == "selection":
        shares = _selected(fused, rows)
        task, facts = max(shares, key=lambda name: shares[name]), {"rows": len(rows), "selected": shares}
    if task is None:
        raise FusionError(
            "a Fusion of Experts runs several models: no dense model computes the same",
            f"export one of its experts: --task NAME ({', '.join(names)}); or merge them into one model: "
            "hf-fusion fuse --method linear",
        )
    index = names.index(task)
    row = config.experts[index]
    plan, backbone = config.backbones[row["backbone"]], fused.backbones[row["backbone"]]
    local = fused._members(row["backbone"]).index(index)
    inner = copy.deepcopy(config.backbone_config(row["backbone"]))
    if row["labels"]:
        name_classes(inner, row["labels"])
    elif plan["saved"]:
        inner.num_labels = plan["num_labels"][local]
    model: PreTrainedModel = AUTO_CLASSES[plan["head"]].from_config(inner, trust_remote_code=False)
    state = dict(backbone.model.state_dict())
    for path, ranks in plan["ranks"].items():
        linear: Any = backbone.model.get_submodule(path)
        for leaf, _ in list(linear.linear.named_parameters()):
            state[f"{path}.{leaf}"] = state.pop(f"{path}.linear.{leaf}")
        a, b = state.pop(f"{path}.lora_A"), state.pop(f"{path}.lora_B")
        slots = slice(sum(ranks[:local]), sum(ranks[: local + 1]))
        if ranks[local]:
            _add(model, state, path, b[:, slots].float() @ a[slots].float())
    for path in plan["saved"]:
        for name in [name for name in state if name.startswith(f"{path}.variants.")]:
            number, _, leaf = name.removeprefix(f"{path}.variants.").partition(".")
            tensor = state.pop(name)
            if int(number) == local:
                state[f"{path}.{leaf}"] = tensor
    _fill(model, state)
    if model.can_generate():
        model.generation_config = settings_of(config, index)
    processors = getattr(fused.processor, "processors", [fused.processor])
    chosen = f"Of a Fusion of Experts, the expert {task} alone"
    if facts:
        chosen += f", which the fuser selects for {facts['selected'][task]:.0%} of {len(rows or ())} rows"
    return Dense(model, processors[plan["inputs"]], f"{chosen}.", {"task": task, **facts})


def _selected(fused: FoEModel, rows: Dataset) -> dict[str, float]:
    """The share of rows for which each expert is selected."""
    column = _column(rows, ("prompt", "text", "image"))
    counts = torch.zeros(fused.config.num_experts)
    before, fused.record_routing = fused.record_routing, True
    try:
        for start in range(0, len(rows), BATCH_SIZE):
            given = list(rows[start : start + BATCH_SIZE][column])
            inputs = fused.processor(images=given) if column == "image" else fused.processor(text=given)
            select: Callable[[Any], Any] | None = getattr(fused, "select", None)
            if select is None:
                fused(**inputs)
            else:
                select(inputs)
            trace = fused.routing_trace()
            chosen = trace["scores"].argmax(1)
            counts += torch.nn.functional.one_hot(chosen, len(counts)).sum(0)
    finally:
        fused.record_routing = before
    return _by_expert(fused, (counts / counts.sum()).tolist())


_BUILDERS: dict[type[Any], Callable[..., Dense]] = {
    WEMoEModel: _of_wemoe,
    PhatgooseRouter: _of_phatgoose,
    FoEModel: _of_foe,
}
