"""Runs algorithms of fusion_bench: run_fusion_bench.py JOBS.json DONE.json, in its environment (make peers)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fusion_bench.method as methods
import torch
from fusion_bench.method.dare import DareSimpleAverage, DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.linear.expo import ExPOAlgorithm
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.slerp import SlerpMergeAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.wudi import WUDIMerging
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

OWN = {
    kind.__name__: kind
    for kind in (
        DareSimpleAverage,
        DareTaskArithmetic,
        DareTiesMerging,
        ExPOAlgorithm,
        ModelStock,
        SlerpMergeAlgorithm,
        TaskSingularVectorMerging,
        WUDIMerging,
    )
} | {"ISO_C_Merge": ISO_C_Merge, "ISO_CTS_Merge": ISO_CTS_Merge}


def state(model):
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def emr(models, expert):
    """The released model switches tasks at run time: what it would be, from the parts that its merge makes."""
    base, *experts = map(state, models.values())
    unified, masks, rescalers = emr_merge([{k: v - base[k] for k, v in own.items()} for own in experts])
    if not expert:
        return {name: base[name] + tensor for name, tensor in unified.items()}
    own = expert - 1
    return {name: base[name] + tensor * masks[name][own] * rescalers[own] for name, tensor in unified.items()}


def fisher(models, folders, normalize):
    experts = list(map(state, models.values()))
    values = {name: [expert[name] for expert in experts] for name in experts[0]}
    weights = [load_file(Path(folder) / "fisher.safetensors") for folder in folders]
    return merging_with_fisher_weights(values, weights, torch.ones(len(experts)), normalize_fisher_weight=normalize)


def regmean(models, folders, ratio):
    experts = list(map(state, models.values()))
    values = {name: [expert[name] for expert in experts] for name in experts[0]}
    grams = [load_file(Path(folder) / "gram.safetensors") for folder in folders]
    return merging_with_regmean_weights(values, grams, reduce_non_diagonal_ratio=ratio)


def run(job):
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for name, folder in job["models"].items()
    }
    arguments, algorithm = job["arguments"], job["algorithm"]
    by_hand = {"EMR": emr, "Fisher": fisher, "RegMean": regmean}
    if algorithm in by_hand:
        more = [job["statistics"]] if algorithm != "EMR" else []
        return by_hand[algorithm](models, *more, **arguments)
    torch.manual_seed(0)
    kind = OWN.get(algorithm) or getattr(methods, algorithm)
    pool = models if algorithm != "DepthUpscalingForLlama" else {"_pretrained_": next(iter(models.values()))}
    return state(kind(**arguments).run(BaseModelPool(pool)))


done = {}
for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    began = time.perf_counter()
    try:
        merged = run(job)
        Path(job["out"]).mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in merged.items()}, Path(job["out"]) / "model.safetensors")
        done[name] = {"seconds": time.perf_counter() - began}
    except Exception as error:  # whatever the peer says is part of the result
        done[name] = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[2]).write_text(json.dumps(done))
