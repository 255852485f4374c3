"""Write tables and figures of benchmark results."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_fusion.cli.checks import check_results
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.progress import phase

EXAMPLES = (
    ("hf-fusion bench report runs/minilm-8", "the report is written to runs/minilm-8-report"),
    ("hf-fusion bench report results --output report --format json", "print the summary as JSON"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the results and the folder of the report."""
    parser.add_argument(
        "folder", metavar="DIR", help="results: the folder of a run, a folder of .jsonl files, or one .jsonl file"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the report (default: DIR-report)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Write the report, and print the main table of each suite."""
    from hf_fusion.bench.cells import read_cells
    from hf_fusion.bench.pages import REPORT, write_report
    from hf_fusion.bench.suite_tables import main_table

    check_results(args.folder)
    source = Path(args.folder)
    folder = Path(args.output) if args.output else source.with_name(f"{source.resolve().stem}-report")
    if folder.resolve() == source.resolve() or source.resolve() in folder.resolve().parents:
        raise UsageError(
            f"a report in {folder} would be read as results of {source}", "name a folder outside it: --output DIR"
        )
    cells = read_cells(source)
    with phase("Writing tables and figures"):
        summary = write_report(cells, folder)
    for suite in summary["suites"] if out.mode == "human" else ():
        if table := main_table(suite):
            rows = [
                dict(zip(table.columns, [entry.text for entry in row], strict=True))
                for section in table.sections
                for row in section.rows
            ]
            out.table(rows, title=table.title)
            for number, note in enumerate(table.notes, 1):
                out.log(f"{number}: {note}")
    if out.mode == "json":
        out.dict(summary)
    else:
        out.result(f"{len(cells):,} cells reported", report=str(folder / REPORT))
    out.hint(f"hf-fusion bench publish {args.folder} OWNER/NAME --dry-run")
