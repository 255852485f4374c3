"""A step of gate training against a step of LoRA training by PEFT: same base, batch and linears, in the same run.

    python tests/benchmarks/gate_training.py [--batch 8] [--tokens 64] [--rank 8] [--dtype float32] [--repeats 7]

The shape is SmolLM2-135M's with fewer layers (--layers 30 for all of it) and random weights. One thread, process CPU
time, interleaved, minimum of several. A step is forward, loss, backward, clipping and AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fusion import Expert
from hf_fusion.evaluation.machine import machine
from hf_fusion.hub.lora import read_adapter
from hf_fusion.training.gates import gated

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BAR = 1.15


def smollm2(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def lora(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[torch.nn.Module, Expert]:
    """PEFT's model in training, and the same adapter as an expert on a base of its own."""
    config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
    trained = get_peft_model(smollm2(arguments.layers, dtype), config, autocast_adapter_dtype=False).train()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        adapter = read_adapter(Path(folder), "adapter")
    return trained, Expert("adapter", smollm2(arguments.layers, dtype).eval(), adapter)


def step(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter], batch: dict) -> Callable[[], None]:
    """One optimizer step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained, expert = lora(arguments, getattr(torch, arguments.dtype))
    ids = torch.randint(3, 49152, (arguments.batch, arguments.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    best = {"lora": float("inf"), "gates": float("inf")}
    with gated(expert) as gates:
        steps = {
            "lora": step(trained, [p for p in trained.parameters() if p.requires_grad], batch),
            "gates": step(expert.model, list(gates.values()), batch),
        }
        for repeat in range(arguments.repeats + 1):  # the first warms up
            for name, run in steps.items():
                start = time.process_time()
                run()
                if repeat:
                    best[name] = min(best[name], time.process_time() - start)
    ratio = best["gates"] / best["lora"]
    print(f"LoRA step {best['lora']:.3f} s, gate step {best['gates']:.3f} s, ratio {ratio:.3f} (bar {BAR})")
    row = {**best, "ratio": ratio, **vars(arguments)}
    print(json.dumps({"command": " ".join(sys.argv), "machine": machine(), **row}))
    if ratio > BAR:
        sys.exit(f"a gate step costs {ratio:.3f} LoRA steps, more than {BAR}")


if __name__ == "__main__":
    main()
