"""Look whether the models and data sets of a suite can be had, and say what to do where they cannot."""

from __future__ import annotations

import argparse

from hf_fusion.cli.checks import check_folder
from hf_fusion.cli.output import Out
from hf_fusion.cli.progress import start
from hf_fusion.errors import FusionError
from hf_fusion.progress import phase

EXAMPLES = (
    ("hf-fusion bench check clip-vit-base-patch32", "every id of a suite, with the commit that it stands for"),
    ("hf-fusion bench check minilm-8 --data DIR --format json", "what is made already of a suite that is run here"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which suite, and where its data are."""
    parser.add_argument("suite", metavar="SUITE", help="a suite's name, or the path of its YAML file")
    parser.add_argument("--data", metavar="DIR", help="folder with a folder for each data set, for suites run here")


def run(args: argparse.Namespace, out: Out) -> None:
    """One row for each base, expert and data set.

    Raises:
        FusionError: after the table, where something is not there.
    """
    from dataclasses import asdict

    from hf_fusion.bench.suite import load_suite

    check_folder(args.data, "--data")
    suite = load_suite(args.suite)

    start("bench.check")
    from datasets import disable_progress_bars

    from hf_fusion.bench.check import check_suite

    disable_progress_bars()
    with phase("Looking for models and data"):
        found = check_suite(suite, args.data)
    rows = [asdict(row) for row in found]
    shown = [{**row, "pinned": "yes" if row["pinned"] else "no" if row["sha"] else ""} for row in rows]
    out.table(shown, title=f"{suite.name}: {suite.title}", key="source", data=rows)
    lacking = [row for row in found if row.status != "there"]
    if lacking:
        raise FusionError(
            f"{len(lacking)} of the {len(found)} things that {suite.name} names cannot be had; the first is "
            f"{lacking[0].source}: {lacking[0].reason}",
            hint=lacking[0].hint or None,
        )
    data = f" --data {args.data}" if args.data else ""
    out.hint(f"hf-fusion bench run --suite {args.suite}{data} --output results")
