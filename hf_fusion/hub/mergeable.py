"""Can a model's weights be merged with those of its base? Answered by WEMoE's own rules, from headers alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from hf_fusion.hub.headers import build_on_meta
from hf_fusion.models.assembly_wemoe import ExpertSource, check_experts, head_paths, part_of, renamed
from hf_fusion.models.fused_heads import head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_problems(model: PreTrainedModel, base: PreTrainedModel) -> list[str]:
    """What `hf_fusion.fuse` would refuse to merge, one line each.

    Args:
        model: a full fine-tune as its headers promise it, on the meta device.
        base: the model that it was fine-tuned from, with another head or none.
    """
    try:
        part, head = part_of(base, model), head_of(model)
        template = base if part else _under_the_head_of(model, base)
        heads = head_paths(template, head)
        own, known = renamed(model.state_dict(), model, template, part), renamed(base.state_dict(), base, template)
        shared = {key: tensor for key, tensor in known.items() if key in template.state_dict()}
        check_experts([ExpertSource({"name": "it", "adapter": False, "part": part}, own)], shared, heads)
    except ValueError as error:
        return [str(error)]
    apart = tuple(f"{path}." for path in heads)
    return [
        f"{key} is {list(tensor.shape)}, in the base {list(shared[key].shape)}"
        for key, tensor in own.items()
        if key in shared and not (apart and key.startswith(apart)) and tensor.shape != shared[key].shape
    ]


def _under_the_head_of(model: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """A model of an expert's class and the base's sizes: what of the base is not in it, such as a pooler, may lack."""
    if type(model.config) is not type(base.config):
        return model
    config = copy.deepcopy(base.config)
    if model.config.num_labels is not None:
        config.num_labels = model.config.num_labels  # a base without a head has none
    made: PreTrainedModel = build_on_meta(lambda: type(model)._from_config(config))
    return made
