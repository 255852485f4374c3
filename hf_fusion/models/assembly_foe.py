"""From loaded experts to the config of a Fusion of Experts: shared backbones, processors and labels."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_foe import HEADS, FoEConfig
from .experts_foe import Backbone
from .fused_adapters import refuse_tied
from .fused_heads import head_of
from .options_foe import generation_values
from .processing_foe import FoEProcessor

GENERIC_LABEL = re.compile(r"LABEL_\d+")
# config attributes with the width of the last hidden state, by architecture
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "hidden_sizes", "embed_dim", "projection_dim")
# removed from packed configs: one fp16 sub-config would turn everything fp16; paths must not leak
UNPACKED = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "auto_map")


def normalise(label: str) -> str:
    """A label name for comparison: without case, spaces, dashes and underscores."""
    return re.sub(r"[\s_\-]+", "_", label.strip().lower())


def fuse_labels(
    experts: Sequence[Any],
    mode: str,
    label_maps: Mapping[str, Mapping[str, str | None]] | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[list[str], list[list[int]]]:
    """One label space for all experts.

    In output mode, labels of the same name are one label. In selection mode too, if every expert has the same set;
    otherwise each expert keeps separate labels, named ``expert/label`` where two experts share a name.

    Args:
        experts: with `.name` and `.labels`.
        mode: "output" or "selection".
        label_maps: expert name -> {its label: fused label}; several of its labels may become one, None drops one.
            Labels not mentioned keep their name.
        labels: the fused labels in the desired order; default is the order of the experts' labels.

    Returns:
        The fused labels, and for each expert the fused index of each of its labels (-1 where dropped).

    Raises:
        ValueError: an expert has no label names, `label_maps` has unknown names, or labels are not in `labels`.
    """
    label_maps = label_maps or {}
    if unknown := set(label_maps) - {expert.name for expert in experts}:
        raise ValueError(f"label_maps names {sorted(unknown)}, but the experts are {[e.name for e in experts]}")
    renamed = [_rename(expert, dict(label_maps.get(expert.name, {}))) for expert in experts]
    spaces = [{normalise(label) for label in row if label is not None} for row in renamed]
    if mode == "selection" and any(space != spaces[0] for space in spaces):
        counts = [sum(normalise(str(label)) in space for space in spaces) for row in renamed for label in row]
        flat = iter(counts)
        renamed = [
            [f"{expert.name}/{label}" if next(flat) > 1 and label is not None else label for label in row]
            for expert, row in zip(experts, renamed, strict=True)
        ]
    order = list(labels) if labels is not None else []
    index = {normalise(label): i for i, label in enumerate(order)}
    for row in renamed if labels is None else []:
        for label in row:
            if label is not None and normalise(label) not in index:
                index[normalise(label)] = len(order)
                order.append(label)
    maps = []
    for expert, row in zip(experts, renamed, strict=True):
        if outside := [label for label in row if label is not None and normalise(label) not in index]:
            raise ValueError(
                f"{expert.name} has labels {outside} that are not among the fused labels {order}; map them with "
                f"label_maps={{{expert.name!r}: {{{outside[0]!r}: ...}}}} (None drops one)"
            )
        maps.append([-1 if label is None else index[normalise(label)] for label in row])
    return order, maps


def _rename(expert: Any, mapping: dict[str, str | None]) -> list[str | None]:
    """The expert's labels after its label map."""
    if unknown := set(mapping) - set(expert.labels):
        raise ValueError(f"label_maps[{expert.name!r}] names {sorted(unknown)}; its labels are {list(expert.labels)}")
    unnamed = [label for label in expert.labels if GENERIC_LABEL.fullmatch(label) and label not in mapping]
    if not expert.labels or unnamed:
        raise ValueError(
            f"{expert.name} has no names for its labels ({', '.join(unnamed) or 'none stored'}); say what they mean "
            f"with label_maps={{{expert.name!r}: {{'LABEL_0': ...}}}}"
        )
    return [mapping.get(label, label) for label in expert.labels]


def distinct_processors(experts: Sequence[Any]) -> tuple[list[Any], list[str | None], list[int]]:
    """The distinct processors, the PIL mode that the experts of each need, and each expert's processor index."""
    distinct: dict[tuple[str, str | None], int] = {}
    kept: list[Any] = []
    of_expert = []
    for expert in experts:
        mode = None
        if not hasattr(expert.processor, "tokenize"):
            mode = "L" if getattr(expert.model.config, "num_channels", 3) == 1 else "RGB"
        key = (_signature(expert.processor), mode)
        if key not in distinct:
            distinct[key] = len(kept)
            kept.append(expert.processor)
        of_expert.append(distinct[key])
    return kept, [mode for _, mode in distinct], of_expert


def _signature(processor: Any) -> str:
    """A value that is equal for processors with the same output for every input."""
    if hasattr(processor, "backend_tokenizer"):  # padding and truncation are set per call
        backend = json.loads(processor.backend_tokenizer.to_str())
        core = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
        core |= {
            "max": processor.model_max_length,
            "side": processor.padding_side,
            "pad": processor.pad_token,
        }
    else:
        volatile = ("name_or_path", "image_processor_type", "_processor_class", "transformers_version")
        core = {key: value for key, value in processor.to_dict().items() if key not in volatile}
        core["class"] = type(processor).__name__
    return json.dumps(core, sort_keys=True, default=str)


def pack_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as a plain dict for `AutoConfig.for_model`."""
    packed = {**config.to_diff_dict(), "model_type": config.model_type}
    for name in UNPACKED:
        packed.pop(name, None)
    return packed


def feature_size(config: PreTrainedConfig) -> int:
    """Width of the last hidden state.

    Raises:
        ValueError: the config has none of the known attributes.
    """
    text = config.get_text_config()
    for source in (text, config):
        for name in WIDTHS:
            value = getattr(source, name, None)
            if value is not None:
                return value[-1] if isinstance(value, list | tuple) else value
    raise ValueError(f"the width of {config.model_type}'s embedding is unknown; it has none of {', '.join(WIDTHS)}")


def plan_backbones(experts: Sequence[Any]) -> tuple[list[dict[str, Any]], list[PreTrainedModel], list[int]]:
    """Assign the experts to backbones.

    Returns:
        The backbones as they are stored (all but ``inputs``), their models, and each expert's backbone. Adapters of one
        base share a copy of it; a full model is a separate backbone, which is not copied.
    """
    backbones: list[dict[str, Any]] = []
    models: list[PreTrainedModel] = []
    members: dict[int, list[Any]] = {}
    of_expert: list[int] = []
    of_base: dict[int, int] = {}
    for expert in experts:
        if expert.adapter is not None:
            refuse_tied(expert)
        if expert.adapter is None or id(expert.model) not in of_base:
            of_base[id(expert.model)] = len(models)
            models.append(expert.model if expert.adapter is None else copy.deepcopy(expert.model))
            head = head_of(expert.model, HEADS, "an expert of a FoE")
            backbones.append({"config": pack_config(expert.model.config), "head": head})
        index = of_base[id(expert.model)]
        members.setdefault(index, []).append(expert)
        of_expert.append(index)
    for index, backbone in enumerate(backbones):
        adapters = [expert.adapter for expert in members[index] if expert.adapter is not None]
        targets = sorted({path for adapter in adapters for path in adapter.lora})
        backbone["ranks"] = {path: [_rank(adapter, path) for adapter in adapters] for path in targets}
        # the modules with a saved tensor: mostly linears of a head
        backbone["saved"] = sorted({name.rpartition(".")[0] for adapter in adapters for name in adapter.saved})
        backbone["num_labels"] = [max(1, len(expert.labels)) for expert in members[index]]
    return backbones, models, of_expert


def _rank(adapter: Any, path: str) -> int:
    return adapter.lora[path][0].shape[0] if path in adapter.lora else 0


def fill_adapters(backbone: Backbone, plan: Mapping[str, Any], experts: Sequence[Any], base: nn.Module) -> None:
    """Copy the adapters' tensors into a backbone built from `plan`, in place.

    Raises:
        ValueError: a shape does not fit the base; the message names adapter and module.
    """
    with torch.no_grad():
        for path in plan["ranks"]:
            adapted: Any = backbone.model.get_submodule(path)
            start = 0
            for expert in experts:
                if path not in expert.adapter.lora:
                    continue
                a, b = expert.adapter.lora[path]
                if a.shape[1] != adapted.lora_A.shape[1] or b.shape[0] != adapted.lora_B.shape[0]:
                    raise ValueError(
                        f"{expert.name}: LoRA on {path} maps {a.shape[1]} to {b.shape[0]} features, but the base maps "
                        f"{adapted.lora_A.shape[1]} to {adapted.lora_B.shape[0]}"
                    )
                adapted.lora_A[start : start + len(a)] = a
                adapted.lora_B[:, start : start + len(a)] = b
                start += len(a)
        for path in plan["saved"]:
            per_expert: Any = backbone.model.get_submodule(path)
            for expert, variant in zip(experts, per_expert.variants, strict=True):
                saved = {
                    n.rpartition(".")[2]: t for n, t in expert.adapter.saved.items() if n.rpartition(".")[0] == path
                }
                try:
                    variant.load_state_dict(saved or base.get_submodule(path).state_dict())
                except RuntimeError as error:
                    raise ValueError(f"{expert.name}: its copy of {path} does not fit the base: {error}") from error


def plan_config(
    experts: Sequence[Any],
    mode: str,
    label_maps: Mapping[str, Mapping[str, str | None]] | None,
    labels: Sequence[str] | None,
    costs: Sequence[float] | None,
    **fields: Any,
) -> tuple[FoEConfig, list[PreTrainedModel], FoEProcessor]:
    """Config, backbone models and processor of a fusion: everything but the fuser's weights."""
    backbones, models, of_expert = plan_backbones(experts)
    head = backbones[0]["head"]
    generates = [backbone["head"] in ("causal-lm", "seq2seq-lm") for backbone in backbones]
    if any(generates) and (len({b["head"] for b in backbones}) > 1 or mode == "output"):
        raise ValueError(
            f"experts with heads {sorted({b['head'] for b in backbones})} cannot be fused in mode {mode!r}: language "
            "models are fused by mode='selection', among their own kind"
        )
    if without := [expert.name for expert in experts if expert.processor is None]:
        raise ValueError(f"{', '.join(without)}: no tokenizer or image processor, so nothing can feed these experts")
    processors, modes, inputs = distinct_processors(experts)
    for expert_inputs, backbone in zip(inputs, of_expert, strict=True):
        backbones[backbone]["inputs"] = expert_inputs
    if costs is None:
        costs = [_parameters(expert) for expert in experts]
    if len(costs) != len(experts) or min(costs) <= 0:
        raise ValueError(f"costs must hold one positive number for each of the {len(experts)} experts, not {costs}")
    rows: list[dict[str, Any]] = [
        {
            "name": expert.name,
            "revision": expert.revision,
            "license": expert.license,
            "task": expert.task,
            "labels": list(expert.labels),
            "backbone": backbone,
            "feature_size": feature_size(models[backbone].config) if mode == "selection" else None,
            "cost": float(cost),
        }
        for expert, backbone, cost in zip(experts, of_expert, costs, strict=True)
    ]
    config = FoEConfig(mode=mode, head=head, experts=rows, backbones=backbones, **fields)
    if generates[0]:
        processors = [_for_generation(processor, head) for processor in processors]
        for row, expert in zip(rows, experts, strict=True):
            row["generation"] = generation_values(models[row["backbone"]], getattr(expert, "generation", None))
        config.vocabularies = [len(processor) for processor in processors]
        for model, plan in zip(models, backbones, strict=True):  # a model may have more rows than its tokenizer
            size = model.config.get_text_config().vocab_size
            config.vocabularies[plan["inputs"]] = max(config.vocabularies[plan["inputs"]], size)
        config.is_encoder_decoder = head == "seq2seq-lm"
        config.pad_token_id = processors[0].pad_token_id
        return config, models, FoEProcessor(processors, vocabularies=config.vocabularies)
    regression = {
        models[b].config.problem_type == "regression" or len(e.labels) == 1 for e, b in zip(experts, of_expert)
    }
    if regression == {True}:
        fused, maps = list(labels or ["score"]), [[0] for _ in experts]
        config.problem_type = "regression"
    elif True in regression:
        raise ValueError("regression and classification experts cannot be fused with each other")
    else:
        fused, maps = fuse_labels(experts, mode, label_maps, labels)
        config.problem_type = "single_label_classification"
    for row, label_map in zip(rows, maps, strict=True):
        row["label_map"] = label_map
    config.id2label = dict(enumerate(fused))
    config.label2id = {label: index for index, label in enumerate(fused)}
    return config, models, FoEProcessor(processors, modes=modes)


def _for_generation(tokenizer: Any, head: str) -> Any:
    """A copy that pads prompts: on the left for decoders, which continue from the right end."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if head == "causal-lm":
        tokenizer.padding_side = "left"
    return tokenizer


def _parameters(expert: Any) -> int:
    """Number of parameters used for an example: those of the model and of the adapter."""
    adapter = expert.adapter
    extra = sum(a.numel() + b.numel() for a, b in adapter.lora.values()) if adapter else 0
    return sum(p.numel() for p in expert.model.parameters()) + extra
