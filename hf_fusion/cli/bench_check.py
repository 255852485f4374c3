"""Check which models and data sets of a suite are available, and show what to do about the others."""

from __future__ import annotations

import argparse

from hf_fusion.cli.checks import check_folder, suite_named
from hf_fusion.cli.output import Out
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.errors import FusionError
from hf_fusion.progress import phase

EXAMPLES = (
    ("hf-fusion bench check clip-vit-base-patch32", "every id of a suite, with its newest commit"),
    ("hf-fusion bench check minilm-8 --data DIR --format json", "what is available of a suite with local experts"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite and the folder of its data."""
    parser.add_argument("suite", metavar="SUITE", help="a suite's name, or the path of its YAML file")
    parser.add_argument("--data", metavar="DIR", help="folder that contains one folder per data set, for local suites")


def run(args: argparse.Namespace, out: Out) -> None:
    """Print one row for each base, expert and data set.

    Raises:
        FusionError: after the table, if something is not available.
    """
    from dataclasses import asdict

    check_folder(args.data, "--data")
    suite = suite_named(args.suite)

    with loading_libraries():
        from datasets import disable_progress_bars

        from hf_fusion.bench.check import check_suite

    disable_progress_bars()
    with phase("Checking models and data"):
        found = check_suite(suite, args.data)
    rows = [asdict(row) for row in found]
    printed = [{**row, "pinned": "yes" if row["pinned"] else "no" if row["sha"] else ""} for row in rows]
    out.table(printed, title=f"{suite.name}: {suite.title}", key="source", data=rows)
    unavailable = [row for row in found if row.status != "there"]
    if unavailable:
        raise FusionError(
            f"{len(unavailable)} of the {len(found)} models and data sets of {suite.name} are not available; "
            f"the first is {unavailable[0].source}: {unavailable[0].reason}",
            hint=unavailable[0].hint or None,
        )
    data = f" --data {args.data}" if args.data else ""
    out.hint(f"hf-fusion bench run --suite {args.suite}{data} --output results")
