"""The report: one page with tables and pictures, their files, and the block of the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from hf_fusion.bench.cells import LEADERBOARD, Cell, write_lines
from hf_fusion.bench.plots import PICTURES, save_pictures
from hf_fusion.bench.report import summarise
from hf_fusion.bench.suite_tables import overview_table, tables_of
from hf_fusion.bench.summary import BenchSummary, SuiteSummary
from hf_fusion.bench.tables import RENDERERS, file_name, to_markdown
from hf_fusion.hub.readme import escape_markdown
from hf_fusion.io.saving import in_folder, write_file

REPORT, CELLS = "report.md", "cells.jsonl"
README_SECTION = "hf-fusion-bench"
"""Name of the markers around the README's block (`card_edit.put_section`)."""


def report_markdown(summary: BenchSummary, pictures: Mapping[str, Mapping[str, str]]) -> str:
    """All suites as one page.

    Args:
        summary: what `summarise` gives.
        pictures: suite → name of a picture, a key of `PICTURES` → its address as seen from the page.
    """
    parts = ["# Benchmark of fusion methods"]
    if len(summary["suites"]) > 1:
        parts += ["## All suites", to_markdown(overview_table(summary))]
    for suite in summary["suites"]:
        parts.append(f"## {escape_markdown(suite['title'])}")
        shown = pictures.get(suite["name"], {})
        tables = {table.name.removeprefix(f"{suite['name']}-"): table for table in tables_of(suite)}
        for name in dict.fromkeys(["main", *PICTURES, *tables]):  # a picture stands before the table of its name
            if name in shown:
                parts.append(f"![{PICTURES[name][1]}]({shown[name]})")
            if name in tables:
                parts += [f"### {escape_markdown(tables[name].title)}", to_markdown(tables[name])]
        parts.append(_origin(suite))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def write_report(cells: Sequence[Cell], folder: str | Path) -> BenchSummary:
    """Writes report.md with its pictures, tables as CSV and LaTeX, leaderboard.json and cells.jsonl.

    Args:
        cells: what was measured.
        folder: created if missing; files of the same names are replaced.

    Returns:
        The summary.

    Raises:
        FusionError: matplotlib is not installed.
    """
    folder = Path(folder)
    summary = summarise(cells)
    pictures: dict[str, dict[str, str]] = {}
    for suite in summary["suites"]:
        made = save_pictures(suite, folder / "pictures")
        pictures[suite["name"]] = {
            name: PurePosixPath(files[0].relative_to(folder)).as_posix() for name, files in made.items()
        }
    tables = [table for suite in summary["suites"] for table in tables_of(suite)]
    with in_folder(folder / "tables"):
        for table in [*tables, overview_table(summary)]:
            for ending in ("csv", "tex"):
                write_file(folder / "tables" / f"{file_name(table.name)}.{ending}", RENDERERS[ending](table))
    write_lines(folder / CELLS, cells)
    write_file(folder / LEADERBOARD, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_file(folder / REPORT, report_markdown(summary, pictures))
    return summary


def readme_block(cells: Iterable[Cell]) -> str:
    """What the README says of the benchmark: methods by suites. Stands between the markers of `README_SECTION`.

    ``put_section(readme, README_SECTION, readme_block(read_cells("results")))`` renews it.
    """
    return to_markdown(overview_table(summarise(cells))).strip()


def _origin(suite: SuiteSummary) -> str:
    """Where and with what a suite was measured, and how to do it again."""
    rows = suite["rows"]
    machines = list(dict.fromkeys(row["machine"] for row in rows if row["machine"]))
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            versions.setdefault(name, {})[version] = None
    used = ", ".join(f"{name} {' and '.join(map(str, found))}" for name, found in sorted(versions.items()))
    commands = list(dict.fromkeys(row["command"] for row in rows if row["command"]))
    lines = []
    if machines or used:
        lines.append(
            escape_markdown(f"Measured on {'; '.join(machines) or 'an unnamed machine'}{used and f', with {used}'}.")
        )
    if commands:
        # Whatever a stranger's cells say, it leaves neither the block nor the markers around the page.
        code = "\n".join(" ".join(command.split()).replace("`", "'").replace("<!--", "< !--") for command in commands)
        lines.append(f"<details><summary>Commands</summary>\n\n```sh\n{code}\n```\n\n</details>")
    return "\n\n".join(lines)
