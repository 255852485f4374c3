"""Run the whole pipeline once: experts on a Hub are fused into one model, which is published and loaded again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.families import FAMILIES

EXAMPLES = (
    ("hf-fusion demo", "a Fusion of Experts, all on this machine, in the folder ./demo"),
    ("hf-fusion demo phatgoose", "a language model that routes every token among LoRA experts"),
    ("hf-fusion demo wemoe", "an image classifier whose weights are merged per input"),
    ("hf-fusion demo --real-hub --namespace me --yes", "the same on the Hub at HF_ENDPOINT, in your own namespace"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo, its folder and its Hub."""
    demos = {name: family.demo for name, family in FAMILIES.items() if family.demo}
    shown = "; ".join(f"{name}: {demo.shows}" for name, demo in demos.items())
    parser.add_argument(
        "demo", nargs="?", default="foe", choices=list(demos), metavar="DEMO", help=f"{shown} (default: foe)"
    )
    parser.add_argument("--folder", default="demo", metavar="DIR", help="folder for all files (default: demo)")
    parser.add_argument("--real-hub", action="store_true", help="use the Hub at HF_ENDPOINT instead of an embedded one")
    parser.add_argument("--namespace", metavar="NAME", help="owner of the repos (default on the embedded Hub: demo)")
    parser.add_argument("--yes", action="store_true", help="with --real-hub: confirm that repos are created there")


def run(args: argparse.Namespace, out: Out) -> None:
    """Start or connect to the Hub, and run the demo."""
    if args.real_hub and not args.yes:
        raise UsageError(
            f"this would create about 15 public repos under {args.namespace or 'your name'} on the Hub",
            "add --yes, or omit --real-hub",
        )
    if not args.real_hub:  # keeps the demo out of the user's cache; read when huggingface_hub is imported
        os.environ["HF_HOME"] = str(Path(args.folder).resolve() / "cache")
    demo = FAMILIES[args.demo].demo
    if demo and demo.one_thread:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ[bars] = "1"  # the demo prints one line per repo

    from hf_fusion.demo import DEMOS
    from hf_fusion.demo.workspace import open_workspace

    with open_workspace(Path(args.folder), args.namespace, args.real_hub) as workspace:
        summary = DEMOS[args.demo](workspace, out, 0)
    if out.mode == "json":
        out.dict(summary)
    else:
        out.result("Done", **{name: value for name, value in summary.items() if not isinstance(value, dict)})
