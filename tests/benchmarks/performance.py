"""The performance measurements in one table: work, ours, peer, floor, bar, and whether the bar is met.

    python tests/benchmarks/performance.py [--quick] [--only phatgoose wemoe …] [--output bench.json]

Each number is a ratio to the dense base (or to what the row names) measured in the same run, process CPU time of one
thread. `--quick` takes fewer repeats and leaves out the rows that need many experts or large files; a row that was not
measured says so. The measurements themselves are those of phatgoose.py, wemoe.py, foe_forward.py and merging.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import foe_forward
import merging
import phatgoose
import torch
import wemoe

from hf_fusion.evaluation.machine import machine

# work -> (the least it could be, where that is known; the most that the project accepts, where it says so)
Goals = dict[str, tuple[float | None, float | None]]
GOALS: dict[str, Goals] = {
    "phatgoose": {
        "PHATGOOSE forward, E = 8": (1.13, 1.25),
        "PHATGOOSE forward, E = 32": (1.17, 1.45),
        "PHATGOOSE forward, E = 128": (1.35, 1.75),
        "PHATGOOSE token, batch 1": (1.13, 1.3),
        "PHATGOOSE token, batch 8": (1.13, 1.3),
        "PHATGOOSE token, batch 32": (1.13, 1.25),
    },
    "loading": {"PHATGOOSE loading ÷ reading, E = 128": (1, 1.3)},
    "wemoe": {
        "WEMoE exact, batch 1": (1.8, 1.85),
        "WEMoE exact, batch 8": (1.16, 1.4),
        "WEMoE exact, batch 32": (1.16, 1.35),
        "WEMoE bfloat16, batch 1": (None, 1.4),
        "WEMoE bfloat16, batch 8": (None, 1.35),
        "WEMoE bfloat16, batch 32": (None, 1.3),
        "WEMoE exact, K = 32, batch 1": (None, 2.5),
    },
    "short-text": {"WEMoE exact, BERT, batch 1": (None, 2), "WEMoE exact, BERT, batch 8": (None, 1.7)},
    "decoding": {"WEMoE exact, first step ÷ dense token": (1, 1.5), "WEMoE exact, token": (1, None)},
    "foe": {"FoE ÷ its experts, full models": (1, None), "FoE ÷ its experts, adapters": (1, None)},
    "merging": {
        "linear ÷ read + write": (1, 1.4),
        "ties ÷ read + write": (None, 7),
        "della ÷ read + write": (None, 10),
        "dare_ties ÷ read + write": (None, None),
        "dare_linear ÷ read + write": (None, 3),
        "linear, whole command ÷ merge": (1.1, 1.5),
    },
}
Found = Iterator[tuple[str, float, float | None]]  # work, ours, peer


def of_phatgoose(args: argparse.Namespace) -> Found:
    base = phatgoose.t5_small()
    for experts in (8,) if args.quick else (8, 32, 128):
        row = phatgoose.ratios(base, experts, with_arrow=experts < 128, repeats=args.repeats)
        yield f"PHATGOOSE forward, E = {experts}", row["router forward"], row.get("arrow forward")
    for batch in (1, 8) if args.quick else (1, 8, 32):
        row = phatgoose.ratios(base, 8, with_arrow=not args.quick, repeats=args.repeats, batch=batch)
        yield f"PHATGOOSE token, batch {batch}", row["router token"], row.get("arrow token")


def of_loading(args: argparse.Namespace) -> Found:
    if not args.quick:
        yield "PHATGOOSE loading ÷ reading, E = 128", phatgoose.loading(phatgoose.t5_small(), 128)["load / read"], None


def of_wemoe(args: argparse.Namespace) -> Found:
    batches = (1, 8) if args.quick else (1, 8, 32)
    for row in wemoe.forwards(("exact", "bfloat16"), batches, 8, args.repeats, steps=False):
        yield f"WEMoE {row['what']}, batch {row['batch']}", row["ratio"], None
    gc.collect()  # the next models take 7 GB
    if not args.quick:
        [row] = wemoe.forwards(("exact",), (1,), 32, args.repeats, steps=False)
        yield "WEMoE exact, K = 32, batch 1", row["ratio"], None


def of_short_text(args: argparse.Namespace) -> Found:
    for batch, ratio in wemoe.short_text((1, 8), 8, args.repeats).items():
        yield f"WEMoE exact, BERT, batch {batch}", ratio, None


def of_decoding(args: argparse.Namespace) -> Found:
    if not args.quick:
        [row] = wemoe.decoding(("exact",), (1,), 8, args.repeats)
        yield "WEMoE exact, first step ÷ dense token", row["first step ms"] / row["dense token ms"], None
        yield "WEMoE exact, token", row["ratio"], None


@torch.inference_mode()
def of_foe(args: argparse.Namespace) -> Found:
    settings = argparse.Namespace(batch=8, tokens=32)
    for name, build in (("full models", foe_forward.full_models), ("adapters", foe_forward.adapters)):
        yield f"FoE ÷ its experts, {name}", foe_forward.ratio(build, 6, settings, args.repeats)["ratio"], None


def of_merging(args: argparse.Namespace) -> Found:
    if args.quick:
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(models=Path(folder), repeat=1, mergekit=args.mergekit)
        merging.make_models(settings.models)
        for method in ("linear", "ties", "della", "dare_ties", "dare_linear"):
            row = merging.run(method, settings)
            peer = row["peer_seconds"] / row["safetensors"] if "peer_seconds" in row else None
            yield f"{method} ÷ read + write", row["ratio"], peer
            if method == "linear":
                yield "linear, whole command ÷ merge", row["process_seconds"] / row["seconds"], None


MEASURES: dict[str, Callable[[argparse.Namespace], Found]] = {
    "phatgoose": of_phatgoose,
    "loading": of_loading,
    "wemoe": of_wemoe,
    "short-text": of_short_text,
    "decoding": of_decoding,
    "foe": of_foe,
    "merging": of_merging,
}


def verdict(ours: float | None, bar: float | None) -> str:
    """The last column of a row."""
    if ours is None:
        return "not measured"
    if bar is None:
        return "no bar"
    return "met" if ours <= bar else "not met"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a line each under a heading."""

    def cell(value: float | None) -> str:
        return f"{'–' if value is None else format(value, '.2f'):>8}"

    width = max(len(row["work"]) for row in rows)
    lines = [f"{'work':{width}}{'ours':>8}{'peer':>8}{'floor':>8}{'bar':>8}  met"]
    for row in rows:
        cells = "".join(cell(row[name]) for name in ("ours", "peer", "floor", "bar"))
        lines.append(f"{row['work']:{width}}{cells}  {row['met']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and rows: under 5 minutes")
    parser.add_argument("--only", nargs="*", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--mergekit", type=Path, help="path of mergekit-yaml in its own environment")
    parser.add_argument("--output", type=Path, help="where the table goes, as JSON")
    args = parser.parse_args(arguments)
    args.repeats = 2 if args.quick else 5
    torch.set_num_threads(1)
    rows, began = [], time.perf_counter()
    for name in args.only:
        start = time.perf_counter()
        found = {work: (ours, peer) for work, ours, peer in MEASURES[name](args)}
        unknown = found.keys() - GOALS[name].keys()
        if unknown:
            raise ValueError(f"GOALS[{name!r}] has no row for {sorted(unknown)}")
        for work, (floor, bar) in GOALS[name].items():
            ours, peer = found.get(work, (None, None))
            rows.append(
                {"work": work, "ours": ours, "peer": peer, "floor": floor, "bar": bar, "met": verdict(ours, bar)}
            )
        gc.collect()
        print(f"# {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(table(rows))
    if args.output:
        seconds = round(time.perf_counter() - began)
        command = f"python {' '.join(sys.argv)}"
        content = {"command": command, "machine": machine(), "quick": args.quick, "seconds": seconds, "rows": rows}
        args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
