"""WEMoE and coefficients of dense prediction models: each expert keeps its decoder."""

from __future__ import annotations

from typing import Any

import torch
from tiny import image_processor, names, resnet
from torch import nn
from transformers import (
    AutoModel,
    BeitConfig,
    BeitForSemanticSegmentation,
)

from hf_fusion import Expert, WEMoEModel
from hf_fusion.models.configuration_wemoe import HEADS
from hf_fusion.models.fused_heads import AUTO_CLASSES
from hf_fusion.training.adamerging import CoefficientMerge

LABELS = (["sky", "sea", "land"], ["a", "b", "c", "d", "e"])


def segmenter(labels: list[str]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    shape = {"image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": False}
    return BeitForSemanticSegmentation(BeitConfig(**sizes, **shape, **names(labels))).eval()


def experts_of() -> tuple[nn.Module, list[Expert]]:
    """A base, and experts with classes of their own, whose trunks are a little elsewhere."""
    base, experts = segmenter(LABELS[0]), []
    for seed, labels in enumerate(LABELS, 1):
        model = segmenter(labels)
        model.beit.load_state_dict(base.beit.state_dict())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        experts.append(Expert(f"me/{seed}", model, labels=labels, processor=image_processor(32), revision="1" * 40))
    return base, experts


def test_auto_classes_and_heads_agree():
    assert set(AUTO_CLASSES) == set(HEADS)


@torch.no_grad()
def test_segmenters_keep_their_decoders(tmp_path):
    base, experts = experts_of()
    model = WEMoEModel.from_experts(experts, base)
    assert model.config.head == "semantic-segmentation"
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for expert, labels in zip(experts, LABELS, strict=True):
        found.append(model(pixel_values=pixels, task=expert.name).logits)
        assert found[-1].shape[:2] == (2, len(labels))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    for expert, logits in zip(experts, found, strict=True):
        torch.testing.assert_close(loaded(pixel_values=pixels, task=expert.name).logits, logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_negative_variances_count_as_zero():
    """Both experts have halved the base's, and the coefficients take both halves away."""
    models = [resnet(["no", "yes"]) for _ in range(3)]
    for model, factor in zip(models[1:], (0.4, 0.5), strict=True):
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(factor)
    base, *others = models
    experts = [Expert(f"me/{k}", model, labels=["no", "yes"]) for k, model in enumerate(others)]
    merge = CoefficientMerge(experts, base, "task", 1.0)
    pixels = torch.randn(2, 3, 32, 32)
    assert bool(merge(pixel_values=pixels).logits.isfinite().all())
    dense: Any = merge.dense()
    assert bool(dense(pixel_values=pixels).logits.isfinite().all())
    variances = [buffer for name, buffer in dense.named_buffers() if name.endswith("running_var")]
    assert variances and all(bool((own >= 0).all()) for own in variances)
