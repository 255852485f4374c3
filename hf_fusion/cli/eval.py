"""Measure a fused model beside its experts, their ensembles and the oracle expert; writes results.json."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .output import Out

EXAMPLES = (
    ("hf-fusion eval fused --data test.parquet", "on a file"),
    ("hf-fusion eval fused --data me/rows --split test --format json", "on a Hub data set, as JSON"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on what."""
    parser.add_argument("folder", metavar="MODEL_DIR", help="a fused model's folder; results.json is written into it")
    parser.add_argument("--data", required=True, help="a parquet, csv or json file, a folder, or a Hub data set's id")
    parser.add_argument("--split", default="test", help="of a folder or Hub data set (default: test)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="column of the labels (default: label)")
    parser.add_argument("--expert-column", default="expert", metavar="NAME", help="column of the domains")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="examples per step (default: 32)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Measures, writes and shows."""
    from hf_fusion.data import load_rows
    from hf_fusion.evaluate import RESULTS_FILE, evaluate_fusion
    from hf_fusion.fusion import load_fused

    model, _ = load_fused(args.folder)
    results = evaluate_fusion(
        model,
        load_rows(args.data, args.split),
        name=args.data,
        split=args.split,
        command=f"hf-fusion eval {args.folder} --data {args.data} --split {args.split}",
        label_column=args.label_column,
        expert_column=args.expert_column,
        batch_size=args.batch_size,
    )
    path = Path(args.folder) / RESULTS_FILE
    results.save(path)
    out.table(
        results.table(), title=f"{results.metric} on {results.n} examples", key=results.metric, data=asdict(results)
    )
    out.log(f"Written to {path}")
    out.hint(f"hf-fusion publish {args.folder} OWNER/NAME --dry-run")
