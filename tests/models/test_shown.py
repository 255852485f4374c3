"""Representations of fused models: short reprs, and summaries as tables, in each family."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping

import pytest
import torch
from models.test_phatgoose import LLAMA, experts_of
from tiny import TEXTS, grey_processor, image_processor, images, llama, make_tokenizer, resnet, vit
from tiny_fused import experts_of as fine_tunes_of
from transformers import pipeline

from hf_fusion import Expert, FoEModel, PhatgooseRouter, WEMoEModel
from hf_fusion.models.fused_html import MOST
from hf_fusion.models.fused_summary import Summary


def foe(count: int = 2) -> FoEModel:
    experts = [
        Expert(f"me/vit-{seed}", vit(["a", "b"], seed), None, image_processor(16), ["a", "b"])
        for seed in range(count - 1)
    ]
    return FoEModel.from_experts(
        [*experts, Expert("me/grey", vit(["a", "b"], 9, 1), None, grey_processor(16), ["a", "b"])]
    )


FUSED = {
    "foe": foe,
    "phatgoose": lambda: PhatgooseRouter.from_experts(experts_of(llama(), [(4, LLAMA)] * 3)),
    "wemoe": lambda: WEMoEModel.from_experts(*_with_base()),
}


def _with_base():
    base = llama()
    return fine_tunes_of(base), base


@pytest.mark.parametrize("family", FUSED)
def test_repr_describes_a_model_in_a_few_lines(family):
    model = FUSED[family]()
    text = repr(model)
    assert 5 <= text.count("\n") + 1 <= 20, text
    assert text.startswith(f"{type(model).__name__}(\n")
    for expert in model.config.experts:
        assert expert["name"] in text
    assert f"{sum(p.numel() for p in model.parameters()):,} (float32, cpu)" in text
    inner = text.partition("print(model.")[2].partition(")")[0]
    assert repr(getattr(model, inner)).count("\n") > 20  # as torch shows it
    assert repr(model.to("meta")).endswith(")")


@pytest.mark.parametrize("family", FUSED)
def test_a_summary_prints_as_a_table_and_is_a_mapping(family):
    summary = FUSED[family]().summary()
    assert isinstance(summary, Mapping)
    assert json.loads(json.dumps(summary)) == dict(summary)
    lines = str(summary).splitlines()
    assert str(summary) == repr(summary)
    assert "{" not in str(summary)
    assert not any(line.endswith(" ") for line in lines)
    assert any(line.split() == ["parameters", f"{summary['parameters']:,}"] for line in lines)
    starts = {len(line) - len(line.lstrip()) if line.startswith(" ") else line.index("  ") for line in lines}
    assert max(starts) <= 24


def test_summary_omits_empty_values_and_shortens_long_lists():
    shown = Summary(
        name="x", a_share=0.123456, number=1234567, none=None, text="", empty=[], nothing={}, yes=True,
        few=["a", "b"], many=[f"expert-{i}" for i in range(MOST + 5)], costs={"a": 0.25, "long name": 1},
    )  # fmt: skip
    assert str(shown).splitlines() == [
        "name     x",
        "a share  0.1235",
        "number   1,234,567",
        "yes      yes",
        "few      a",
        "         b",
        "many     expert-0",
        *(f"         expert-{i}" for i in range(1, MOST - 1)),
        "         … and 6 more",
        "costs    a          0.25",
        "         long name  1",
    ]


@pytest.mark.parametrize("family", ["phatgoose", "wemoe"])
def test_the_processor_of_a_loaded_model_comes_without_warnings(family, caplog, tmp_path):
    model = FUSED[family]()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    logger = logging.getLogger("transformers")  # which does not propagate
    logger.addHandler(caplog.handler)
    try:
        tokenizer = loaded.processor
    finally:
        logger.removeHandler(caplog.handler)
    assert tokenizer(TEXTS)["input_ids"] == make_tokenizer()(TEXTS)["input_ids"]
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_pipeline_casts_the_pixels_of_every_expert_and_warns_of_nothing(dtype, caplog, tmp_path):
    experts = [
        Expert("me/vit", vit(["a", "b"]), None, image_processor(16), ["a", "b"]),
        Expert("me/resnet", resnet(["a", "b"]), None, image_processor(32), ["a", "b"]),
    ]
    model = FoEModel.from_experts(experts).to(dtype)
    inputs = model.processor(images=images(2)).to(dtype)
    assert {name: value.dtype for name, value in inputs.items()} == {"pixel_values": dtype, "pixel_values_1": dtype}
    model.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), dtype=dtype, trust_remote_code=True)
    logger = logging.getLogger("transformers")  # which does not propagate
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            [best, _] = classify(images(1)[0])
    finally:
        logger.removeHandler(caplog.handler)
    assert best["label"] in ("a", "b")
    assert caplog.text == ""
