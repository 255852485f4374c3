"""WEMoE's cost beside its dense base, in the same run: ViT-B/32 (CLIP's vision tower), 8 experts, 50 tokens.

    python tests/benchmarks/wemoe.py [--batch 1 8 32] [--experts 8] [--repeats 7] [--storage exact bfloat16 …]
    python tests/benchmarks/wemoe.py --memory exact      # peak memory of a forward at batch 32
    python tests/benchmarks/wemoe.py --decode            # per token after the prompt, SmolLM2-135M's shape

One thread, process CPU time, interleaved, minimum of several. Routers have 2 layers, coefficients differ by sample
and layer. A step is a forward, the entropy of class probabilities, and a backward pass: into the routers for WEMoE,
into all weights for the dense model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_fusion import WEMoEConfig, WEMoEForGeneration, WEMoEModel
from hf_fusion.evaluation.machine import machine
from hf_fusion.models.assembly_wemoe import find_units
from hf_fusion.models.configuration_wemoe import LOW_RANK, TASK_VECTORS
from hf_fusion.models.linears_wemoe import rows_of_block

RANK, CLASSES, PROMPT, ANSWER = 32, 100, 64, 16
# what the project asks for, (storage or step, batch) -> most of the dense model's time
BARS = {
    ("exact", 1): 1.9,
    ("exact", 8): 1.8,
    ("exact", 32): 2.0,
    ("bfloat16", 1): 1.6,
    ("bfloat16", 8): 1.5,
    ("bfloat16", 32): 1.6,
    ("low-rank-bfloat16", 1): 1.4,
    ("low-rank-bfloat16", 8): 1.3,
    ("low-rank-bfloat16", 32): 1.3,
    ("exact step", 8): 3.0,
    ("exact step", 32): 3.0,
}


def vit_b32() -> CLIPVisionModel:
    """The vision tower of CLIP ViT-B/32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=32)).eval()


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M's shape."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).eval()


def fused(base: PreTrainedModel, head: str, experts: int, storage: str) -> Any:
    """Random experts, made in place and never held twice."""
    units = []
    for name, paths in find_units(base, "mlp"):
        numbers = [base.get_submodule(path).weight.numel() for path in paths]
        low_rank = [[RANK] * experts for _ in numbers]
        sizes: list[Any] = {
            **dict.fromkeys(LOW_RANK, low_rank),
            "sparse": [experts * (number // 10) for number in numbers],
            "bfloat16": [rows_of_block(*base.get_submodule(path).weight.shape) for path in paths],
        }.get(storage, [None] * len(paths))
        units.append({"name": name, "paths": paths, "sizes": sizes})
    config = WEMoEConfig(
        head=head,
        backbone={k: v for k, v in base.config.to_dict().items() if k != "dtype"},
        experts=[{"name": f"e{e}", "labels": []} for e in range(experts)],
        units=units,
        task_vectors=storage,
    )
    family = WEMoEForGeneration if head == "causal-lm" else WEMoEModel
    weights = base.state_dict()
    model = family(config, copy.deepcopy(base)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for unit in model.units:
            for path, linear in zip(unit.paths, unit.linears, strict=True):
                linear.fill(weights[f"{path}.weight"], vectors(linear, experts, generator))
            for parameter in unit.routers[0].parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def vectors(linear: Any, experts: int, generator: torch.Generator) -> Any:
    """Random task vectors of one linear, one after the other."""
    size = linear.out_features, linear.in_features
    for _ in range(experts):
        if linear.is_low_rank:
            yield tuple(0.02 * torch.randn(RANK, width, generator=generator) for width in reversed(size))
        elif linear.kind == "sparse":
            number = size[0] * size[1]
            places = torch.randperm(number, generator=generator)[: number // 10].sort().values
            yield places, 0.02 * torch.randn(len(places), generator=generator)
        else:
            yield 0.002 * torch.randn(size, generator=generator)


def measure(jobs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of every job, interleaved."""
    best = dict.fromkeys(jobs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in jobs.items():
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                best[name] = min(best[name], time.process_time() - start)
    return best


def step(model: Any, pixels: torch.Tensor, head: torch.Tensor) -> Callable[[], None]:
    """One step of entropy minimisation."""

    def run() -> None:
        logits = model(pixel_values=pixels).pooler_output @ head
        torch.special.entr(logits.softmax(-1)).sum(-1).mean().backward()
        model.zero_grad()

    return run


def report(name: str, batch: int, ratio: float, dense: float) -> dict[str, Any]:
    bar = BARS.get((name, batch))
    row = {"what": name, "batch": batch, "ratio": round(ratio, 3), "bar": bar, "dense ms": round(1000 * dense, 1)}
    print(json.dumps(row), flush=True)
    return row


def forwards(
    storages: Sequence[str], batches: Sequence[int], experts: int, repeats: int, steps: bool = True
) -> list[dict[str, Any]]:
    """The table: forwards of every storage, and with `steps` a step of exact task vectors."""
    base = vit_b32()
    models = {storage: fused(base, "features", experts, storage) for storage in storages}
    head = torch.randn(768, CLASSES, generator=torch.Generator().manual_seed(2))
    rows = []
    for batch in batches:
        pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            systems = {"dense": base, **models}
            jobs = {name: partial(model, pixel_values=pixels) for name, model in systems.items()}
            times = measure(jobs, repeats)
        for storage in storages:
            rows.append(report(storage, batch, times[storage] / times["dense"], times["dense"]))
        if steps and batch > 1:
            systems = {"dense": base, "exact": models["exact"]} if "exact" in models else {}
            times = measure({name: step(m, pixels, head) for name, m in systems.items()}, max(2, repeats // 2))
            if times:
                rows.append(report("exact step", batch, times["exact"] / times["dense"], times["dense"]))
    return rows


def decoding(storages: Sequence[str], batches: Sequence[int], experts: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds per step after the prompt, against the dense model."""
    base = smollm2()
    rows: list[dict[str, Any]] = []
    for storage in storages:
        model = fused(base, "causal-lm", experts, storage)
        for batch in batches:
            prompts = {
                "input_ids": torch.randint(3, 40000, (batch, PROMPT), generator=torch.Generator().manual_seed(4))
            }
            prompts["attention_mask"] = torch.ones_like(prompts["input_ids"])

            def job(system: Any, tokens: int, prompts: Any = prompts) -> Callable[[], object]:
                return lambda: system.generate(**prompts, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

            # The first step after the prompt merges what all others use, so a step is what 1 + ANSWER cost beyond 2.
            jobs = {
                f"{name} {tokens}": job(system, tokens)
                for name, system in (("dense", base), (storage, model))
                for tokens in (1, 2, 2 + ANSWER)
            }
            times = measure(jobs, repeats)
            per_token = {n: (times[f"{n} {2 + ANSWER}"] - times[f"{n} 2"]) / ANSWER for n in ("dense", storage)}
            row: dict[str, Any] = {
                "what": f"{storage} decoding",
                "batch": batch,
                "ratio": round(per_token[storage] / per_token["dense"], 3),
                "dense token ms": round(1000 * per_token["dense"], 2),
                "prompt ratio": round(times[f"{storage} 1"] / times["dense 1"], 3),
                "first step ms": round(1000 * (times[f"{storage} 2"] - times[f"{storage} 1"]), 1),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def short_text(batches: Sequence[int], experts: int, repeats: int) -> dict[int, float]:
    """Batch size -> time of exact task vectors over the dense model's: BERT-base's shape, 32 tokens."""
    torch.manual_seed(0)
    base = BertModel(BertConfig()).eval()
    systems = {"dense": base, "exact": fused(base, "features", experts, "exact")}
    ratios = {}
    for batch in batches:
        words = torch.randint(1000, 30000, (batch, 32), generator=torch.Generator().manual_seed(5))
        inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        with torch.no_grad():
            times = measure({name: partial(model, **inputs) for name, model in systems.items()}, repeats)
        ratios[batch] = times["exact"] / times["dense"]
    return ratios


def resident(field: str) -> int:
    """VmRSS or VmHWM (the peak) of this process in bytes; Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def memory(storage: str, batch: int, experts: int) -> None:
    """What is stored, and the peak of a forward above what is resident before it, beside the dense model's."""
    base = vit_b32()
    pixels = torch.randn(batch, 3, 224, 224)
    row: dict[str, Any] = {"what": f"{storage} memory", "batch": batch}
    for name, build in (("dense", lambda: base), (storage, lambda: fused(base, "features", experts, storage))):
        model = build()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        with torch.no_grad():
            model(pixel_values=pixels)
        row[f"{name} weights MB"] = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6)
        row[f"{name} forward MB"] = round((resident("VmHWM") - before) / 1e6)
    row["weights / dense"] = round(row[f"{storage} weights MB"] / row["dense weights MB"], 2)
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--storage", nargs="*", choices=TASK_VECTORS, default=list(TASK_VECTORS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decode", action="store_true", help="only measure decoding")
    parser.add_argument("--memory", choices=TASK_VECTORS, help="only measure memory, of one storage")
    parser.add_argument("--output", type=Path, help="where the ratios go, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"# {machine()}, {args.experts} experts")
    if args.memory:
        memory(args.memory, max(args.batch), args.experts)
    elif args.decode:
        decoding(args.storage, [b for b in args.batch if b < 32], args.experts, args.repeats)
    else:
        rows = forwards(args.storage, args.batch, args.experts, args.repeats)
        if args.output:
            found = {
                "command": f"python {' '.join(sys.argv)}",
                "machine": machine(),
                "experts": args.experts,
                "rows": rows,
            }
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
