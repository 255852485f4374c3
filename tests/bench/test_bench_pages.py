"""The report as files, the command that writes it, and the README's block."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from made_cells import cell, made_cells

from hf_fusion.bench.cells import read_cells, write_cell, write_lines
from hf_fusion.bench.pages import README_SECTION, readme_block, report_markdown, write_report
from hf_fusion.bench.report import summarise
from hf_fusion.cli.app import main
from hf_fusion.hub.readme import put_section

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "results", (ROOT / "docs/benchmark/results.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder: two suites, one of them with a failed cell."""
    cells = [
        *made_cells(tasks=2, seeds=1, corruptions=("jpeg",), severities=2, unseen=False),
        cell("ties", "b", 0.7, suite="other | suite"),
        cell("wemoe", "b", None, suite="other | suite", reason="killed"),
    ]
    for one in cells:
        write_cell(tmp_path / "run", one)
    return tmp_path / "run"


def test_the_command_writes_all_files_and_shows_the_main_table(run, tmp_path, capsys):
    assert main(["bench", "report", str(run)]) == 0
    said = capsys.readouterr()
    assert "made: methods and tasks" in said.out
    assert re.search(r"^TIES, tuned +6\d\.\d ±", said.out, re.MULTILINE)
    assert "failed: killed" in said.err
    report = tmp_path / "run-report"
    files = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    pictures = {f"pictures/made-{n}.{e}" for n in ("cost", "tasks", "corruption", "normalised") for e in ("png", "svg")}
    tables = {f"tables/made-{n}.{e}" for n in ("main", "corruption", "cost") for e in ("csv", "tex")}
    assert pictures | tables | {"report.md", "leaderboard.json", "cells.jsonl", "tables/overview.csv"} <= files
    assert "tables/other---suite-main.tex" in files
    cells = read_cells(run)
    assert read_cells(report / "cells.jsonl") == cells
    assert json.loads((report / "leaderboard.json").read_text()) == json.loads(json.dumps(summarise(cells)))
    text = (report / "report.md").read_text()
    addresses = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(addresses) == 6  # of the other suite two
    assert set(addresses) <= files
    assert "## other &#124; suite" in text
    with (report / "tables" / "made-main.csv").open() as file:
        line = next(row for row in csv.DictReader(file) if row["method"] == "WEMoE")
    wemoe = next(c for c in cells if (c.method, c.task, c.condition) == ("wemoe", "task-1", "clean"))
    assert float(line["task-1"]) == pytest.approx(wemoe.score)
    assert float(line["task-1 low"]) == pytest.approx(wemoe.ci95[0])


@pytest.mark.long
def test_json_is_the_summary_and_quiet_the_path(run, tmp_path, capsys):
    assert main(["bench", "report", str(run), "--output", str(tmp_path / "out"), "--format", "json"]) == 0
    assert [suite["name"] for suite in json.loads(capsys.readouterr().out)["suites"]] == ["made", "other | suite"]
    assert main(["bench", "report", str(tmp_path / "out" / "cells.jsonl"), "--format", "quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "cells-report" / "report.md")


@pytest.mark.parametrize("where", [".", "report"])
def test_a_report_among_the_cells_is_refused(run, where, capsys):
    assert main(["bench", "report", str(run), "--output", str(run / where)]) == 2
    assert "would be read as results" in capsys.readouterr().err


def test_an_empty_folder_says_how_to_get_cells(tmp_path, capsys):
    assert main(["bench", "report", str(tmp_path)]) == 1
    assert "hf-fusion bench run" in capsys.readouterr().err


def test_the_page_says_where_it_was_measured_and_how():
    cells = made_cells(tasks=1, seeds=1)
    text = report_markdown(summarise(cells), {})
    assert "Measured on x86_64, 1 CPU thread, with torch 2.13.0." in text
    assert "hf-fusion bench run --suite made --methods wemoe\n" in text
    assert "All suites" not in text


def test_report_is_deterministic(tmp_path):
    cells = made_cells(tasks=1, seeds=1)
    for name in ("one", "two"):
        write_report(cells, tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_readme_block_equals_the_committed_cells(tmp_path):
    """First with synthetic cells, then with the committed ones in the folder results."""
    write_lines(tmp_path / "made.jsonl", made_cells(tasks=2, seeds=1))
    block = readme_block(read_cells(tmp_path))
    assert block.startswith("| method | made | made, tuned |\n")
    edited = put_section("# Title\n", README_SECTION, block)
    assert put_section(edited, README_SECTION, block) == edited
    files = list(RESULTS.glob("*.jsonl"))
    begin = f"<!-- {README_SECTION}:begin -->"
    assert (begin in PAGE) == bool(files), "the page shows the committed cells, and nothing else"
    if files:
        assert put_section(PAGE, README_SECTION, readme_block(read_cells(RESULTS))) == PAGE
