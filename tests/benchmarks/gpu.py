"""Correctness and speed on a GPU: what the CPU suite cannot say.

    python tests/benchmarks/gpu.py [--output gpu.json]
    python tests/benchmarks/gpu.py --device cpu --quick       # the same code without a GPU

Correctness: logits in fp32 and bf16 on the device, against the CPU's in float64. The device may be twice as far from
them as the CPU is in the same dtype, or 64 roundings. Speed: tokens per second of PHATGOOSE and WEMoE (exact) over
their dense base, and merging with `--device`, least of several. Exits with 1 if a check fails, 2 without the device.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import merging
import phatgoose
import torch
import wemoe
from transformers import PreTrainedModel

from hf_fusion.evaluation.machine import machine
from hf_fusion.merging.merge import merge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDINGS = 64  # of one value, after some 50 layers in a row


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """How far the values are off, relative to their size: median over the rows of the last dimension.

    The median, because rounding may route a token to another expert, which changes that row altogether.
    """
    difference = (found.double().cpu() - right).norm(dim=-1) / right.norm(dim=-1)
    return float(difference.median())


def within(device: float, cpu: float, dtype: torch.dtype) -> bool:
    """Whether the device's error is one that the dtype explains."""
    return device <= max(2 * cpu, ROUNDINGS * torch.finfo(dtype).eps)


def moved(inputs: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}


def correctness(
    name: str, model: PreTrainedModel, inputs: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """A row for each dtype."""

    def run(dtype: torch.dtype, where: torch.device) -> torch.Tensor:
        copied = copy.deepcopy(model).to(where, dtype)
        output = copied(**moved(inputs, where, dtype))
        return output.logits if "logits" in output else output.pooler_output

    cpu = torch.device("cpu")
    right = run(torch.float64, cpu)
    rows = []
    for label, dtype in DTYPES.items():
        on_device, on_cpu = (error(run(dtype, where), right) for where in (device, cpu))
        row = {"what": f"{name}, {label}", "error": on_device, "cpu error": on_cpu}
        rows.append(row | {"ok": within(on_device, on_cpu, dtype)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Least wall seconds of a call, after one that is not counted, until the device has finished."""
    best = float("inf")
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def speed(
    name: str, models: tuple[Any, Any], inputs: dict[str, Any], items: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Items (tokens or pictures) per second of the dense base and of the fused model, and their ratio, by dtype."""
    rows = []
    for label, dtype in DTYPES.items():
        base, fused = (model.to(device, dtype) for model in models)
        here = moved(inputs, device, dtype)
        dense, ours = (seconds(partial(m, **here), device, repeats) for m in (base, fused))
        row = {"what": f"{name}, {label}", "dense per s": items / dense, "ours per s": items / ours}
        rows.append(row | {"time ÷ base": ours / dense})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


def routing(device: torch.device, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """PHATGOOSE: checks at E = 8, speed at several."""
    checks, speeds = [], []
    batch = 2 if quick else 32
    for experts in (8,) if quick else (8, 128, 512):
        base = phatgoose.t5_small()
        router = phatgoose.router_of(base, experts)
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "input_ids": torch.randint(3, 30000, (batch, 64), generator=generator),
            "decoder_input_ids": torch.randint(3, 30000, (batch, 64), generator=generator),
        }
        if experts == 8:
            few = {key: value[:2] for key, value in inputs.items()}
            checks = correctness("PHATGOOSE E = 8", router, few, device)
        # The router shares its base's weights, so the base is copied before either changes dtype.
        models = (copy.deepcopy(base), router)
        speeds += speed(f"PHATGOOSE E = {experts}", models, inputs, batch * 128, device, 2 if quick else 10)
    return checks, speeds


def merging_per_input(device: torch.device, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """WEMoE, exact: a check at batch 2, speed at several."""
    base = wemoe.vit_b32()
    model = wemoe.fused(base, "features", 8, "exact")
    pixels = torch.randn(2 if quick else 32, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    checks = correctness("WEMoE exact", model, {"pixel_values": pixels[:2]}, device)
    speeds = []
    for batch in (1,) if quick else (1, 8, 32):
        few = {"pixel_values": pixels[:batch]}
        name, pair = f"WEMoE exact, batch {batch}", (copy.deepcopy(base), copy.deepcopy(model))
        speeds += speed(name, pair, few, batch, device, 2 if quick else 10)
    return checks, speeds


def static(device: torch.device, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Merging on the device and on the CPU: one layer of Qwen2.5-0.5B's shape; the weights must agree to bf16.

    With `--device cpu` the CPU is compared with itself: that shows that the merge runs, no more.
    """
    from safetensors.torch import load_file

    checks, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        merging.make_models(models)
        merging.make_layer(models)
        for method in ("iso_c",) if quick else ("tsv_m", "iso_c", "iso_cts"):
            recipe = merging.recipe_of(method, models)
            recipe = type(recipe)(  # one layer of every method: the whole model takes minutes on the CPU
                method,
                tuple(type(e)(e.model.replace(f"{folder}/e", f"{folder}/layer/e")) for e in recipe.experts),
                str(models / "layer" / "base"),
                recipe.parameters,
            )
            took, merged = {}, {}
            for where in (torch.device("cpu"), device):
                output = models / f"{method}-{len(merged)}-{where.type}"
                start = time.perf_counter()
                merge(recipe, output, device=where)
                took[len(took)] = time.perf_counter() - start
                merged[len(merged)] = load_file(next(output.glob("*.safetensors")))
            worst = max(
                float((merged[1][key].double() - value.double()).norm() / value.double().norm())
                for key, value in merged[0].items()
            )
            # Both are rounded to bf16 at the end: where they differ, it is by one rounding.
            checks.append({"what": f"merge {method}", "error": worst, "ok": worst <= torch.finfo(torch.bfloat16).eps})
            speeds.append({"what": f"merge {method}", "cpu s": took[0], "device s": took[1]})
            print(json.dumps(checks[-1] | speeds[-1]), flush=True)
    return checks, speeds


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("not measured: no GPU that torch can use (--device cpu runs the same code)", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"# {name}, {machine()}")
    found: dict[str, Any] = {"command": f"python {' '.join(sys.argv)}", "machine": machine(), "device": name}
    found |= {"checks": [], "speeds": []}
    for part in (routing, merging_per_input, static):
        checks, speeds = part(device, args.quick)
        found["checks"] += checks
        found["speeds"] += speeds
        if args.output:  # what there is so far
            args.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [check["what"] for check in found["checks"] if not check["ok"]]
    print("all checks passed" if not failed else f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
