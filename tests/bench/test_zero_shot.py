"""Zero-shot heads of all templates, compared with encoding each text next to each image."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from standins import _clip, clip_base
from torch.nn.functional import normalize
from transformers import AutoProcessor

from hf_fusion.bench.suite import load_suite
from hf_fusion.bench.zero_shot import fix_classes
from hf_fusion.errors import FusionError


def test_a_class_is_the_mean_of_its_templates(tmp_path):
    clip_base("", 0, [], tmp_path)
    processor, model = AutoProcessor.from_pretrained(tmp_path), _clip(0)
    suite = load_suite("clip-vit-base-patch32")
    suite = replace(suite, tasks={name: suite.tasks[name] for name in ("eurosat", "gtsrb", "mnist")})
    torch.manual_seed(1)
    pixels = torch.randn(5, 3, 32, 32)
    fixed = copy.deepcopy(model)
    numbers = fix_classes(fixed, processor, suite)
    with torch.no_grad():
        images = normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        for name, task in suite.tasks.items():
            classes = []  # as in fusion_bench's HFCLIPClassifier.set_classification_task
            for own in task.classes:
                texts = processor(text=[t.format(own) for t in task.templates], padding=True, return_tensors="pt")
                classes.append(normalize(model.get_text_features(**texts).pooler_output, dim=-1).mean(0))
            wanted = model.logit_scale.exp() * images @ normalize(torch.stack(classes), dim=-1).T
            got = fixed(pixel_values=pixels, input_ids=numbers[name]).logits_per_image
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            assert got.shape == (5, len(task.classes))
    assert not any(name.startswith("text_model.") for name, _ in fixed.named_parameters())


def test_heads_need_classes_and_templates(tmp_path):
    clip_base("", 0, [], tmp_path)
    suite = load_suite("clip-vit-base-patch32")
    lacking = replace(suite, tasks={"dtd": replace(suite.tasks["dtd"], templates=())})
    with pytest.raises(FusionError, match="dtd needs classes and templates"):
        fix_classes(_clip(0), AutoProcessor.from_pretrained(tmp_path), lacking)
