"""Static merging beside reading its inputs and writing its output, in the same process: CPU time of one thread.

    python tests/benchmarks/merging.py                       # 4 experts and a base of 0.5B, bfloat16, two shards each
    python tests/benchmarks/merging.py --methods ties della --repeat 5
    python tests/benchmarks/merging.py --mergekit .venv-peers/bin/mergekit-yaml    # beside it on the same files
    python tests/benchmarks/merging.py --methods tsv_m iso_c iso_cts wudi          # minutes of work, measured once

Files are in the page cache: every number is the minimum of several runs after a first one that is not counted. Each
method runs in a process of its own, whose peak memory it prints. "process" is the whole command, imports included.

Reading and writing is measured twice: with safetensors, every tensor copied out of its file and as many saved, as
programs do it (this is what the bars are multiples of); and by the engine's own means, in the size of pieces that was
found to be fastest: the "floor", half as much.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hf_fusion.merging.engine.checkpoint import OpenFiles, read_checkpoint
from hf_fusion.merging.engine.output import Shard, TensorSpec
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert

# Qwen2.5-0.5B's sizes
HIDDEN, LAYERS, INNER, WORDS, KEYS = 896, 24, 4864, 151_936, 128
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "vocab_size": WORDS,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
# method -> (experts, whether it takes the base, parameters, most times reading and writing, most MB)
METHODS: dict[str, tuple[int, bool, dict[str, Any], float, int]] = {
    "linear": (4, False, {}, 1.4, 500),
    "task_arithmetic": (4, True, {}, 1.4, 500),
    "slerp": (2, False, {"t": 0.5}, 3, 500),
    "dare_linear": (4, True, {}, 3, 500),
    "model_stock": (4, True, {}, 3, 500),
    "ties": (4, True, {}, 12, 600),
    "dare_ties": (4, True, {}, 12, 600),
    "della": (4, True, {}, 12, 600),
}
# singular vectors of every matrix, and 300 steps of Adam: no bar, one run, and of WUDI one layer instead of 24
LONG = ("tsv_m", "iso_c", "iso_cts", "wudi")
ONE_LAYER = ("wudi",)
METHODS |= {method: (4, True, {}, math.inf, 0) for method in LONG}
# method -> what mergekit calls it, and its parameters for each model
PEERS = {
    "linear": ("linear", {"weight": 0.25}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"weight": 0.3, "density": 0.2}),
}


def main() -> None:
    """Makes the models, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[m for m in METHODS if m not in LONG])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--models", type=Path, help="where the models are, or are made (default: a temporary folder)")
    parser.add_argument("--mergekit", type=Path, help="its mergekit-yaml, in an environment of its own")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--safetensors", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.models, args.repeat)))
        return
    if args.safetensors:
        print(min(by_safetensors(recipe_of(args.safetensors, args.models)) for _ in range(args.repeat + 3)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.models = args.models or Path(temporary)
        if not (args.models / "base").exists():
            make_models(args.models)
        if set(args.methods) & set(ONE_LAYER) and not (args.models / "layer").exists():
            make_layer(args.models)
        rows = []
        heads = ("merge s", 9), ("read+write s", 14), ("ratio", 9), ("bar", 6), ("floor s", 9), ("to it", 9), ("MB", 6)
        print(f"{'method':18}{''.join(f'{name:>{width}}' for name, width in heads)}{'process s':>18}  peer s, MB")
        for method in args.methods:
            row = run(method, args)
            rows.append(row)
            peer = f"{row['peer_seconds']:.1f}, {row['peer_mb']}" if "peer_seconds" in row else ""
            whole = f"layers {row['layers']}" if method in LONG else f"{row['process_seconds']:.2f}"
            print(
                f"{method:18}{row['seconds']:9.2f}{row['safetensors']:14.2f}{row['ratio']:9.2f}{METHODS[method][3]:6.1f}"
                f"{row['floor']:9.2f}{row['seconds'] / row['floor']:9.2f}{row['mb']:6d}{whole:>18}  {peer}",
                flush=True,
            )
            if args.output:  # what there is so far
                machine = f"{os.uname().machine}, 1 thread, torch {torch.__version__}"
                content = {"command": " ".join(["python", *sys.argv]), "machine": machine, "rows": rows}
                args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method, in processes of its own."""

    def alone(what: str) -> Any:
        command = [sys.executable, __file__, what, method, "--models", args.models, "--repeat", str(args.repeat)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, env=one_thread()).stdout)

    row = alone("--one") | {"safetensors": alone("--safetensors")}
    row["ratio"] = row["seconds"] / row["safetensors"]
    if method in LONG:
        return {"method": method, "layers": "1 of 24" if method in ONE_LAYER else "24 of 24", **row}
    with tempfile.TemporaryDirectory(dir=args.models) as place:
        file = Path(place) / "fusion.yaml"
        recipe_of(method, args.models).save(file)
        fuse = [sys.executable, "-m", "hf_fusion.cli", "fuse", file, "--threads", "1", "--output", f"{place}/out"]
        row["process_seconds"], _ = children(fuse)
        if args.mergekit and method in PEERS:
            peer = Path(place) / "peer.yaml"
            name, parameters = PEERS[method]
            models = [{"model": str(args.models / f"e{i}"), "parameters": parameters} for i in range(4)]
            content = {"merge_method": name, "models": models, "dtype": "bfloat16"}
            if METHODS[method][1]:
                content["base_model"] = str(args.models / "base")
            peer.write_text(yaml.safe_dump(content))
            row["peer_seconds"], row["peer_mb"] = children([args.mergekit, peer, f"{place}/peer"])
    return {"method": method, **row}


def children(command: list[Any]) -> tuple[float, int]:
    """CPU seconds and peak MB of a command, by a process that has no other child."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
        "r = resource.getrusage(resource.RUSAGE_CHILDREN); print(r.ru_utime + r.ru_stime, r.ru_maxrss // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, env=one_thread())
    seconds, mb = done.stdout.split()
    return float(seconds), int(mb)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(method: str, models: Path, repeat: int) -> dict[str, Any]:
    """Merging and its floor by turns; the least of each."""
    recipe, times, floors = recipe_of(method, models), [], []
    with tempfile.TemporaryDirectory(dir=models) as place:
        if method in LONG:
            repeat = 0
            read_and_write(recipe, Path(place))  # files into the page cache
        for _ in range(repeat + 1):
            began = time.process_time()
            merge(recipe, Path(place) / "out", threads=1)
            times.append(time.process_time() - began)
            shutil.rmtree(Path(place) / "out")
            floors.append(read_and_write(recipe, Path(place)))
    seconds, floor = (min(counted[1:] or counted) for counted in (times, floors))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"seconds": seconds, "floor": floor, "mb": peak}


def read_and_write(recipe: Recipe, place: Path) -> float:
    """CPU seconds of reading all inputs and writing as much as the output holds."""
    began, files = time.process_time(), OpenFiles()
    buffer = np.empty(1 << 19, np.uint8)  # a core's cache holds it: 8 MB take seven times as long to write
    names = [*([recipe.base] if recipe.base else []), *(expert.model for expert in recipe.experts)]
    entries = [read_checkpoint(Path(name), name) for name in names]
    for model in entries:
        for entry in model.values():
            for start in range(0, entry.numel, len(buffer) // entry.itemsize):
                size = min(len(buffer), (entry.numel - start) * entry.itemsize)
                files.read(entry, start, buffer[:size])
    specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries[0].values()]
    with Shard(place / "floor.safetensors", specs) as shard:
        for spec in specs:
            for start in range(0, spec.nbytes, len(buffer)):
                shard.write(spec.name, start // 2, buffer[: min(len(buffer), spec.nbytes - start)])
        shard.finish()
    files.close()
    seconds = time.process_time() - began
    (place / "floor.safetensors").unlink()
    return seconds


def by_safetensors(recipe: Recipe) -> float:
    """CPU seconds of reading all inputs and writing as much as the output holds, as anyone would with safetensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    began = time.process_time()
    names = [expert.model for expert in recipe.experts] + ([recipe.base] if recipe.base else [])
    with tempfile.TemporaryDirectory(dir=Path(names[0]).parent) as place:
        for name in names:
            for file in sorted(Path(name).glob("*.safetensors")):
                with safe_open(file, "pt") as opened:  # mapped: only a copy is read
                    held = {key: opened.get_tensor(key).clone() for key in opened.offset_keys()}
                if name == names[0]:
                    save_file(held, Path(place) / file.name, {"format": "pt"})
    return time.process_time() - began


def recipe_of(method: str, models: Path) -> Recipe:
    count, takes_base, parameters, *_ = METHODS[method]
    models = models / "layer" if method in ONE_LAYER else models
    experts = tuple(RecipeExpert(str(models / f"e{i}")) for i in range(count))
    return Recipe(method, experts, str(models / "base") if takes_base else None, parameters)


def make_models(place: Path) -> None:
    """A base of random weights and experts a little away from it."""
    from safetensors.torch import save_file

    layer = {
        **{f"self_attn.{part}_proj.weight": (rows, HIDDEN) for part, rows in zip("qkv", (HIDDEN, KEYS, KEYS))},
        **{f"self_attn.{part}_proj.bias": (rows,) for part, rows in zip("qkv", (HIDDEN, KEYS, KEYS))},
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    base = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    for name in ("base", "e0", "e1", "e2", "e3"):
        folder = place / name
        folder.mkdir(parents=True)
        moved = base if name == "base" else {k: (v + torch.randn(v.shape) * 1e-3).bfloat16() for k, v in base.items()}
        keys = list(moved)
        files = {f"model-{i + 1:05d}-of-00002.safetensors": keys[i * 150 : i * 150 + 150 + i * 999] for i in range(2)}
        for file, held in files.items():
            save_file({key: moved[key] for key in held}, folder / file, metadata={"format": "pt"})
        weight_map = {key: file for file, held in files.items() for key in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(CONFIG))


def make_layer(place: Path) -> None:
    """The first layer of each model, as a model."""
    from safetensors.torch import load_file, save_file

    for name in ("base", "e0", "e1", "e2", "e3"):
        folder = place / "layer" / name
        folder.mkdir(parents=True)
        held = [load_file(file) for file in (place / name).glob("*.safetensors")]
        layer = {key: value for part in held for key, value in part.items() if ".layers.0." in key}
        save_file(layer, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))


if __name__ == "__main__":
    main()
