"""Evaluate methods on the tasks of a suite. Existing cells are kept; a cell that fails records its error."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from hf_fusion.cli.checks import check_folder, suite_named
from hf_fusion.cli.errors import checking_arguments
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, SEED
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.errors import FusionError, path_suggestion

EXAMPLES = (
    ("hf-fusion bench run --suite minilm-8 --data DIR --methods static --output results", "all static merges"),
    (
        "hf-fusion bench run --suite clip-vit-base-patch32 --methods average ties --limit 100",
        "two methods, on experts from the Hub",
    ),
)
BATCH_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add suite, methods, data and sampling."""
    add = parser.add_argument
    add("--suite", required=True, metavar="NAME", help="a suite's name, or the path of its YAML file")
    add(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="methods, families, FILE.py, static, or all (default)",
    )
    add("--data", metavar="DIR", help="folder that contains one folder per data set, for local suites")
    add("--output", default="results", metavar="DIR", help="folder for the results (default: results)")
    add("--seeds", nargs="+", type=SEED, default=[0], metavar="N", help="seeds of stochastic methods (default: 0)")
    add(
        "--corruptions", nargs="+", default=[], metavar="NAME",
        help="also evaluate on corrupted test rows: NAME, NAME:SEVERITY, all or all:SEVERITY",
    )  # fmt: skip
    add(
        "--unseen", nargs="+", default=[], metavar="SPLIT",
        help="also evaluate on tasks whose experts are held out, by these splits of the suite, or all",
    )  # fmt: skip
    add("--limit", type=COUNT, default=500, metavar="N", help="maximum test rows per task (default: 500)")
    add("--tuned-on", type=COUNT, default=100, metavar="N", help="maximum validation rows per task (default: 100)")
    add("--batch-size", type=COUNT, default=BATCH_SIZE, metavar="N", help="rows per batch (default: 16)")
    add("--device", metavar="NAME", help="device to run on (default: chosen by accelerate)")
    add(
        "--allow-pickle",
        action="store_true",
        help="read pickle weights (.bin), which can run code, where an expert has no safetensors",
    )


def run(args: argparse.Namespace, out: Out) -> None:
    """Evaluate, and print how many cells were measured, left out and failed."""
    from hf_fusion.bench.corruptions import parse_corruptions
    from hf_fusion.bench.methods import chosen
    from hf_fusion.bench.suite import holdouts_named

    check_folder(args.data, "--data")
    suite = suite_named(args.suite)
    with checking_arguments():
        chosen([word for word in args.methods if not word.endswith(".py")] or ["all"], suite.kind)
    if missing := [word for word in args.methods if word.endswith(".py") and not Path(word).is_file()]:
        raise FusionError(
            f"{missing[0]} does not exist", path_suggestion(missing[0], "--methods FILE.py, or the name of a method")
        )
    with checking_arguments():
        parse_corruptions(args.corruptions, suite.is_of_images)
        holdouts_named(suite, args.unseen)

    with loading_libraries():
        from datasets import disable_progress_bars

        from hf_fusion.bench.run import run_suite
        from hf_fusion.merging.engine.processes import is_main

    disable_progress_bars()  # three for each data set
    cells = run_suite(
        args.suite,
        args.methods,
        output=args.output,
        data_dir=args.data,
        seeds=args.seeds,
        corruptions=args.corruptions,
        unseen=args.unseen,
        limit=args.limit,
        tuned_on=args.tuned_on,
        batch_size=args.batch_size,
        device=args.device,
        allow_pickle=args.allow_pickle,
        command=command(args),
        tell=out.log,
    )
    if not is_main():
        return
    counts = {status: sum(cell.status == status for cell in cells) for status in ("measured", "left out", "failed")}
    out.result(f"{args.suite}: {len(cells)} cells", **counts, folder=args.output)
    out.hint(f"hf-fusion bench report {args.output}")


def command(args: argparse.Namespace) -> str:
    """The command that repeats the run, without local paths."""
    words = ["hf-fusion", "bench", "run", "--suite", Path(args.suite).name]
    words += ["--data", "DIR"] if args.data else []
    for name in ("methods", "seeds", "corruptions", "unseen"):
        if values := getattr(args, name):
            words += [f"--{name}", *map(str, values)]
    words += ["--limit", str(args.limit), "--tuned-on", str(args.tuned_on)]
    words += [] if args.batch_size == BATCH_SIZE else ["--batch-size", str(args.batch_size)]
    return shlex.join([*words, *(["--allow-pickle"] if args.allow_pickle else [])])
