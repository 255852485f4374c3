"""Teach a fused model what it has to learn; the experts in it stay as they are."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from .output import Out

EXAMPLES = (
    ("hf-fusion fit fuser fused --data train.parquet --frugal", "fit the fuser, and learn to ask fewer experts"),
    ("hf-fusion fit fuser fused --data me/rows --split train --by loss", "choose by least loss, on a Hub data set"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command per thing that can be fitted."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART", title="what to fit")
    fuser = parts.add_parser("fuser", help="the fuser of a Fusion of Experts")
    fuser.add_argument("folder", metavar="MODEL_DIR", help="a folder that hf-fusion fuse wrote; it is updated")
    fuser.add_argument("--data", required=True, help="a parquet, csv or json file, a folder, or a Hub data set's id")
    fuser.add_argument("--split", default="train", help="of a folder or Hub data set (default: train)")
    fuser.add_argument("--frugal", action="store_true", help="also learn to answer from few of the experts")
    fuser.add_argument(
        "--by", choices=("domain", "loss"), default="domain", help="in selection, the expert to choose is that of ..."
    )
    fuser.add_argument("--label-column", default="label", metavar="NAME", help="column of the labels (default: label)")
    fuser.add_argument("--expert-column", default="expert", metavar="NAME", help="column of the domains")
    fuser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (default: 0)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Loads, fits and writes back, all of it or nothing."""
    from hf_fusion.data import load_rows
    from hf_fusion.fusion import load_fused, save_fused
    from hf_fusion.training.fuser import fit_fuser

    model, recipe = load_fused(args.folder)
    rows = load_rows(args.data, args.split)
    fit = fit_fuser(
        model,
        rows,
        by=args.by,
        frugal=args.frugal,
        seed=args.seed,
        label_column=args.label_column,
        expert_column=args.expert_column,
    )
    folder = save_fused(model, args.folder, recipe)
    out.result("Fitted", folder=str(folder), **asdict(fit))
    out.hint(f"hf-fusion eval {args.folder} --data {args.data} --split test")
