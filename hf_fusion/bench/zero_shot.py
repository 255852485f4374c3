"""Zero-shot heads: what texts say of classes, read once and not by a tower with every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_fusion.bench.suite import Suite, Task
from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

TEXTS_AT_ONCE = 256


class ClassTexts(nn.Module):
    """Replaces CLIP's text tower by precomputed features of classes, selected by index.

    Args:
        features: (N, d) of all classes of all tasks.
    """

    features: torch.Tensor

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, input_ids: torch.Tensor, **_: object) -> BaseModelOutputWithPooling:
        """Of classes (C, 1), (C, d) as `pooler_output`."""
        return BaseModelOutputWithPooling(pooler_output=self.features[input_ids[:, 0]])


@torch.no_grad()
def fix_classes(model: PreTrainedModel, processor: ProcessorMixin, suite: Suite) -> Mapping[str, torch.Tensor]:
    """Puts the classes of a suite's tasks in the place of a model's text tower, which no expert changes.

    A class is the mean of the features, each of length 1, of its name in all of the task's templates (Radford et al.,
    arXiv 2103.00020, and fusion_bench).

    Args:
        model: `CLIPModel`; changed in place.
        processor: its own.
        suite: its tasks have classes and templates.

    Returns:
        Task → what the model takes as ``input_ids``: numbers of its classes (C, 1).

    Raises:
        FusionError: a task has none.
    """
    features: list[torch.Tensor] = []
    numbers: dict[str, torch.Tensor] = {}
    for task in suite.tasks.values():
        start = sum(map(len, features))
        features.append(_class_features(model, processor, task, suite))
        numbers[task.name] = torch.arange(start, start + len(features[-1]))[:, None]
    model.text_model, model.text_projection = ClassTexts(torch.cat(features)), nn.Identity()
    return numbers


def _class_features(model: Any, processor: ProcessorMixin, task: Task, suite: Suite) -> torch.Tensor:
    """(C, d), not of length 1: the model sees to that."""
    if not task.classes or not task.templates:
        raise FusionError(
            f"{suite.name}: {task.name} needs classes and templates for its zero-shot head",
            hint='classes: [cat, dog], templates: ["a photo of a {}."]',
        )
    texts = [template.format(name) for name in task.classes for template in task.templates]
    parts = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        read = processor(text=texts[start : start + TEXTS_AT_ONCE], padding=True, return_tensors="pt")
        parts.append(model.get_text_features(**read.to(model.device)).pooler_output)
    features = nn.functional.normalize(torch.cat(parts), dim=-1)
    return features.view(len(task.classes), len(task.templates), -1).mean(1)
