"""Experts of a router as one PEFT adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from tiny import SUMS, llama
from tiny_exports import logits, lora_of, read, router, saved, wemoe, with_update

from hf_fusion import FusionError
from hf_fusion.exporting.export import export


@pytest.mark.parametrize("task, weights, rank", [("me/lora-1", (0, 1), 4), (None, (0.5, 0.5), 7)])
def test_peft_computes_the_base_with_the_updates(tmp_path, task, weights, rank):
    done = export(saved(router(), tmp_path / "router"), tmp_path / "lora", "adapter", task=task)
    expected = logits(with_update(llama(), *((lora_of(k), weight) for k, weight in enumerate(weights))), read())
    adapted = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert torch.allclose(logits(adapted, read()), expected, atol=SUMS * expected.abs().max())
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == rank
    assert done.facts["relative_error"] < 1e-6
    assert done.tensors == 2 * 2 * 2  # two layers, q and v, A and B


def test_a_truncated_adapter_says_its_error(tmp_path):
    saved(router(), tmp_path / "router")
    done = export(tmp_path / "router", tmp_path / "lora", "adapter", rank=2)
    update = {path: 0.5 * sum(lora_of(k)[path][1] @ lora_of(k)[path][0] for k in range(2)) for path in lora_of(0)}
    singular = [torch.linalg.svdvals(each) for each in update.values()]
    lost, norm = sum(s[2:].square().sum() for s in singular), sum(s.square().sum() for s in singular)
    assert done.facts["relative_error"] == pytest.approx(float((lost / norm).sqrt()), rel=1e-4)


def test_only_a_router_has_adapters(tmp_path):
    saved(wemoe(), tmp_path / "wemoe")
    with pytest.raises(FusionError, match=r"a WEMoE, not a router of LoRA adapters\n.*--to dense"):
        export(tmp_path / "wemoe", tmp_path / "lora", "adapter")
    with pytest.raises(FusionError, match="a rank goes with an adapter"):
        export(tmp_path / "wemoe", tmp_path / "dense", rank=3)
