"""Checks from headers whether a model's weights can be merged with its base's, by the rules of WEMoE."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from hf_fusion.hub.headers import build_on_meta
from hf_fusion.models.assembly_wemoe import ExpertSource, check_experts, head_paths, part_of, renamed
from hf_fusion.models.fused_heads import head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_problems(model: PreTrainedModel, base: PreTrainedModel) -> list[str]:
    """The problems for which `hf_fusion.fuse` would refuse to merge a model, one line each.

    Args:
        model: a full fine-tune, built from its headers on the meta device.
        base: the model that it was fine-tuned from, with the same head, another one or none; on the meta device.
    """
    try:
        part, head = part_of(base, model), head_of(model)
        template = base if part else _with_head_of(model, base)
        heads = head_paths(template, head)
        tensors = renamed(model.state_dict(), model, template, part)
        base_tensors = renamed(base.state_dict(), base, template)
        shared = {key: tensor for key, tensor in base_tensors.items() if key in template.state_dict()}
        check_experts([ExpertSource({"name": "it", "adapter": False, "part": part}, tensors)], shared, heads)
    except ValueError as error:
        return [str(error)]
    head_prefixes = tuple(f"{path}." for path in heads)
    return [
        f"{key} has shape {list(tensor.shape)}, but {list(shared[key].shape)} in the base"
        for key, tensor in tensors.items()
        if key in shared and not key.startswith(head_prefixes) and tensor.shape != shared[key].shape
    ]


def _with_head_of(model: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """A model with the class of an expert and the sizes of the base; experts may lack tensors that it does not have."""
    if type(model.config) is not type(base.config):
        return model
    config = copy.deepcopy(base.config)
    if model.config.num_labels is not None:
        config.num_labels = model.config.num_labels  # a base without a head has none
    template: PreTrainedModel = build_on_meta(lambda: type(model)._from_config(config))
    return template
