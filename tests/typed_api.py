"""Uses of the public names, type-checked by `make check` and never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from typing_extensions import assert_type

import hf_fusion as hf
from hf_fusion.evaluation.results import Results
from hf_fusion.exporting.export import Export
from hf_fusion.hub.discover import Experts
from hf_fusion.merging.extraction_report import Extraction
from hf_fusion.merging.merge_report import MergeReport
from hf_fusion.models.fused_summary import Summary
from hf_fusion.publishing.push import PublishResult
from hf_fusion.search.report import SearchReport
from hf_fusion.training.adaptation import Adaptation
from hf_fusion.training.fuser import Fit


def find() -> list[hf.Expert]:
    found = hf.discover(author="me")
    assert_type(found, Experts)
    assert_type(hf.check_compatibility(found).accepted, list[hf.ExpertInfo])
    experts = hf.load_experts([*found, "owner/name@revision", Path("folder")], base="owner/base")
    assert_type(experts, list[hf.Expert])
    return experts


def fuse(experts: list[hf.Expert], rows: Dataset) -> None:
    foe, router, wemoe = hf.fuse("foe", experts), hf.fuse("phatgoose", experts), hf.fuse("wemoe", experts, "owner/base")
    assert_type(foe, hf.FoEModel)
    assert_type(hf.fuse("ensemble", experts, rule="max_model"), hf.FoEModel)
    assert_type(router, hf.PhatgooseRouter)
    assert_type(wemoe, hf.WEMoEModel)
    assert_type(hf.fuse("ties", ["a/b", hf.RecipeExpert("c/d")], "owner/base", density=0.2), PreTrainedModel)
    assert_type(foe.config, hf.FoEConfig)
    assert_type(foe.processor, hf.FoEProcessor)
    assert_type(foe.summary(), Summary)
    assert_type(foe.routing_trace(), hf.FoETrace)
    assert_type(router.routing_trace(), hf.PhatgooseTrace)
    assert_type(wemoe.routing_trace(), hf.WEMoETrace)
    assert_type(hf.FoEModel.from_pretrained("me/fused"), hf.FoEModel)
    assert_type(hf.FoEForGeneration.from_pretrained("folder", revision="main"), hf.FoEForGeneration)
    assert_type(hf.PhatgooseForGeneration.from_experts(experts).config, hf.PhatgooseConfig)
    assert_type(hf.WEMoEForGeneration.from_experts(experts).config, hf.WEMoEConfig)
    assert_type(hf.merge(hf.load_recipe("recipe.yaml"), "folder"), MergeReport)
    assert_type(hf.extract_lora("me/tuned", "me/base", Path("folder"), rank=16), Extraction)
    assert_type(hf.search_recipe("recipe.yaml", {"task": rows}, "folder", budget=20), SearchReport)
    assert_type(hf.export("fused", Path("dense"), task="me/expert"), Export)


def fit(foe: hf.FoEModel, wemoe: hf.WEMoEModel, rows: Dataset) -> None:
    assert_type(hf.fit_fuser(foe, rows), Fit)
    assert_type(hf.adapt_routers(wemoe, {"task": rows}), Adaptation)
    assert_type(hf.fit_routers(wemoe, {"task": rows}), Adaptation)
    gates = hf.train_gates("me/adapter", rows)
    assert_type(gates, hf.Gates)
    assert_type(hf.save_gates(gates, "folder"), Path)
    assert_type(hf.push_gates(gates, "me/adapter"), PublishResult)


def measure_and_publish(foe: hf.FoEModel, wemoe: hf.WEMoEModel, rows: Dataset, more: dict[str, Any]) -> None:
    assert_type(hf.evaluate(foe, rows, batch_size=8), Results)
    assert_type(hf.evaluate(wemoe, {"task": rows}, **more), Results)
    assert_type(hf.evaluate("me/merged", {"task": rows}), Results)
    try:
        folder = hf.save_fused(foe, "folder")
    except hf.FusionError as error:
        assert_type(error.hint, str | None)
        raise
    assert_type(folder, Path)
    assert_type(hf.load_fused(folder), tuple[PreTrainedModel, hf.Recipe])
    assert_type(hf.publish(folder, "me/fused"), PublishResult | None)
