"""PHATGOOSE's cost beside its dense base, in the same run, and PEFT's Arrow beside it.

    python tests/benchmarks/phatgoose.py [--experts 8 32 128 512] [--arrow 8 32] [--repeats 7]
    python tests/benchmarks/phatgoose.py --smollm2       # SmolLM2-135M's shape with 8 experts

One thread, process CPU time, interleaved, minimum of several. T5 has flan-t5-small's shape (all 144 linears, r=16,
top-2, fp32), a forward reads 4 x 64 tokens and writes 4 x 16; generation is the time per step of 4 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_fusion import PhatgooseConfig, PhatgooseForGeneration
from hf_fusion.evaluation.machine import machine

RANK, BATCH, PROMPT, ANSWER = 16, 4, 64, 16


def t5_small() -> T5ForConditionalGeneration:
    """flan-t5-small's shape."""
    torch.manual_seed(0)
    sizes = {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 6, "num_layers": 8, "vocab_size": 32128}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M's shape."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).eval()


def linears_of(base: PreTrainedModel) -> list[str]:
    """The linears of the blocks: not the head."""
    return [path for path, module in base.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]


def router_of(base: PreTrainedModel, experts: int) -> PhatgooseForGeneration:
    """Random experts on every linear of the blocks, with random gates: filled in place, never held twice."""
    encoder_decoder = bool(base.config.is_encoder_decoder)
    config = PhatgooseConfig(
        head="seq2seq-lm" if encoder_decoder else "causal-lm",
        backbone={k: v for k, v in base.config.to_dict().items() if k != "dtype"},
        experts=[{"name": f"e{e}", "gates": "trained", "labels": [], "profile": 0} for e in range(experts)],
        profiles=[{"ranks": dict.fromkeys(linears_of(base), RANK), "saved": {}}],
        is_encoder_decoder=encoder_decoder,
    )
    router = PhatgooseForGeneration(config).eval()
    router.backbone.load_state_dict(base.state_dict(), strict=False, assign=True)
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            if ".experts." in name:
                nn.init.normal_(parameter, std=0.3 if name.endswith("gates") else 0.02)
    return router


def arrow_of(base: PreTrainedModel, experts: int) -> Any:
    """PEFT's Arrow over as many random adapters."""
    import copy

    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import ArrowConfig, create_arrow_model

    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    config = LoraConfig(r=RANK, task_type=task, target_modules=sorted({p.split(".")[-1] for p in linears_of(base)}))
    with tempfile.TemporaryDirectory() as folder:
        adapted = get_peft_model(copy.deepcopy(base), config)
        for index in range(experts):
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.02)
            adapted.save_pretrained(f"{folder}/{index}")
        paths = [f"{folder}/{index}" for index in range(experts)]
        return create_arrow_model(copy.deepcopy(base), paths, ArrowConfig(top_k=2)).eval()


def jobs(model: Any, base: PreTrainedModel, batch: int = BATCH) -> dict[str, Callable[[], object]]:
    """What is timed: a forward, and generations of 1 and of 1 + ANSWER tokens, whose difference is ANSWER steps."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 30000, (batch, PROMPT), generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    forward = dict(inputs)
    if base.config.is_encoder_decoder:
        forward["decoder_input_ids"] = torch.randint(3, 30000, (batch, ANSWER), generator=generator)

    def generate(tokens: int) -> Callable[[], object]:
        return lambda: model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

    return {"forward": lambda: model(**forward), "short": generate(1), "long": generate(1 + ANSWER)}


def measure(systems: Mapping[str, dict[str, Callable[[], object]]], repeats: int) -> dict[str, dict[str, float]]:
    """Least CPU seconds of every job of every system, interleaved."""
    best = {name: dict.fromkeys(own, float("inf")) for name, own in systems.items()}
    for repeat in range(repeats + 1):
        for name, own in systems.items():
            for job, run in own.items():
                start = time.process_time()
                run()
                if repeat:  # the first round warms up
                    best[name][job] = min(best[name][job], time.process_time() - start)
    return {
        name: {"forward": own["forward"], "token": (own["long"] - own["short"]) / ANSWER} for name, own in best.items()
    }


def ratios(base: PreTrainedModel, experts: int, with_arrow: bool, repeats: int, batch: int = BATCH) -> dict[str, Any]:
    """One row of the table."""
    router = router_of(base, experts)
    systems = {"base": jobs(base, base, batch), "router": jobs(router, base, batch)}
    if with_arrow:
        systems["arrow"] = jobs(arrow_of(base, experts), base, batch)
    with torch.no_grad():
        times = measure(systems, repeats)
    row: dict[str, Any] = {"experts": experts, "floor": router.summary()["relative_cost"]}
    for name in list(systems)[1:]:
        for job in ("forward", "token"):
            row[f"{name} {job}"] = times[name][job] / times["base"][job]
    row["base forward ms"], row["base token ms"] = (1000 * times["base"][job] for job in ("forward", "token"))
    return row


def loading(base: PreTrainedModel, experts: int) -> dict[str, float]:
    """Seconds to load a published router against reading its safetensors into memory."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSeq2SeqLM

    with tempfile.TemporaryDirectory() as folder:
        router_of(base, experts).save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)

        def read() -> list[torch.Tensor]:
            return [tensor.clone() for file in files for tensor in load_file(file).values()]

        def load() -> Any:
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
            for tensor in model.state_dict().values():
                tensor.sum()  # what was only mapped is read now
            return model

        best = {"read": float("inf"), "load": float("inf")}
        for _ in range(3):
            for name, run in (("read", read), ("load", load)):
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
    return {"experts": experts, "MB": size / 1e6, **best, "load / read": best["load"] / best["read"]}


def resident(field: str) -> int:
    """VmRSS or VmHWM (the peak) of this process in bytes; Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak_memory(base: PreTrainedModel, experts: int) -> dict[str, float]:
    """Peak resident memory of a forward and a generation above what is resident before, over the weights."""
    router = router_of(base, experts)
    weights = sum(p.numel() * p.element_size() for p in router.parameters())
    own = jobs(router, base)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    with torch.no_grad():
        own["forward"]()
        own["long"]()
    return {"experts": experts, "weights MB": weights / 1e6, "extra / weights": (resident("VmHWM") - before) / weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 32, 128, 512])
    parser.add_argument("--arrow", type=int, nargs="*", default=[8, 32], help="numbers of experts to measure PEFT at")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M's shape instead of T5's")
    parser.add_argument("--loading", type=int, help="only measure loading, with so many experts")
    parser.add_argument("--memory", type=int, help="only measure peak memory, with so many experts")
    parser.add_argument("--output", type=Path, help="where the ratios go, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base: PreTrainedModel = smollm2() if args.smollm2 else t5_small()
    print(f"# {type(base).__name__}, {machine()}")
    for option, job in ((args.loading, loading), (args.memory, peak_memory)):
        if option:
            print(json.dumps(job(base, option)))
            return
    rows = []
    for experts in [8] if args.smollm2 else args.experts:
        row = ratios(base, experts, experts in args.arrow, args.repeats)
        rows.append({key: round(value, 3) for key, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    if args.output:
        command = f"python {' '.join(sys.argv)}"
        found = {"command": command, "machine": machine(), "model": type(base).__name__, "rows": rows}
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
