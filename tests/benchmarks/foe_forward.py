"""FoE's forward against the sum of its experts' forwards, in the same run.

    python tests/benchmarks/foe_forward.py [--batch 8] [--tokens 32] [--repeats 7] [--output FILE]

One thread, process CPU time, interleaved, minimum of several. The experts stand alone as their users would run them:
full models by transformers, adapters by PEFT on the base.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_fusion import Expert, FoEModel
from hf_fusion.evaluation.machine import machine
from hf_fusion.hub.lora import read_adapter

sys.path.append(str(Path(__file__).parents[1]))
from tiny import image_processor, make_tokenizer

LABELS = [f"label-{index}" for index in range(10)]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}


def minilm(seed: int) -> BertForSequenceClassification:
    """MiniLM-L6's shape."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(vocab_size=30522, **sizes, **NAMES)).eval()


def vit(seed: int) -> ViTForImageClassification:
    """ViT-tiny's shape at 64 pixels."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, **sizes, **NAMES)).eval()


def full_models(count: int, arguments: argparse.Namespace) -> tuple[FoEModel, list[Callable], dict]:
    """K full MiniLM classifiers."""
    models = [minilm(seed) for seed in range(count)]
    tokenizer = make_tokenizer()
    fused = FoEModel.from_experts(
        [Expert(f"m/{i}", m, processor=tokenizer, labels=LABELS) for i, m in enumerate(models)]
    )
    return fused, models, text_inputs(arguments)


def images(count: int, arguments: argparse.Namespace) -> tuple[FoEModel, list[Callable], dict]:
    """K full ViTs."""
    models = [vit(seed) for seed in range(count)]
    experts = [Expert(f"m/{i}", m, processor=image_processor(64), labels=LABELS) for i, m in enumerate(models)]
    return FoEModel.from_experts(experts), models, {"pixel_values": torch.randn(arguments.batch, 3, 64, 64)}


def adapters(count: int, arguments: argparse.Namespace) -> tuple[FoEModel, list[Callable], dict]:
    """K LoRA adapters (r=8, all linears) of one MiniLM."""
    base, tokenizer, experts, peft_models = minilm(0), make_tokenizer(), [], []
    config = LoraConfig(r=8, task_type="SEQ_CLS", target_modules=["query", "key", "value", "dense"])
    for index in range(count):
        torch.manual_seed(index)
        adapted = get_peft_model(minilm(0), config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            adapter = read_adapter(Path(folder), f"m/{index}")
            peft_models.append(PeftModel.from_pretrained(minilm(0), folder).eval())
        experts.append(Expert(f"m/{index}", base, adapter, tokenizer, LABELS))
    return FoEModel.from_experts(experts), peft_models, text_inputs(arguments)


def text_inputs(arguments: argparse.Namespace) -> dict:
    shape = (arguments.batch, arguments.tokens)
    return {"input_ids": torch.randint(3, 300, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}


def interleaved(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Least process CPU seconds of each call, taken in turns so that noise meets all alike."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = time.process_time()
            call()
            best[index] = min(best[index], time.process_time() - start)
    return best


def ratio(build: Callable, count: int, arguments: argparse.Namespace, repeats: int) -> dict[str, float]:
    """Seconds of FoE and of its experts one after the other, and their ratio."""
    fused, experts, inputs = build(count, arguments)
    calls = [functools.partial(model, **inputs) for model in (fused, *experts)]
    for call in calls:
        call()
    times = interleaved(calls, repeats)
    return {"foe_s": times[0], "sum_of_experts_s": sum(times[1:]), "ratio": times[0] / sum(times[1:])}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for build in (full_models, images, adapters):
        row = rows[build.__doc__] = ratio(build, arguments.experts, arguments, arguments.repeats)
        seconds = f"FoE {row['foe_s']:.3f} s, experts {row['sum_of_experts_s']:.3f} s"
        print(f"{build.__doc__:45} {seconds}, ratio {row['ratio']:.3f}")
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    found = {"command": f"python {' '.join(sys.argv)}", "machine": machine(), **settings, "rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
