"""The notebooks: they are their scripts, hold no trace of a machine, and executed again they give what they show."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from html_tables import Tables

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

from notebooks import SCRIPTS, execute, read  # noqa: E402

SCORE = re.compile(r"(-?[\d.]+) \((-?\d+) to (-?\d+)\)")  # with its 95 % interval, which follows from n
SHARE = re.compile(r"([\d.]+)%")


def stored(script: Path) -> Any:
    """The committed notebook of a script."""
    return nbformat.read(script.with_suffix(".ipynb"), 4)


def outputs(notebook: Any) -> list[str]:
    """The outputs of the code cells that are text: printed, or HTML."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [output.get("text") or output.get("data", {}).get("text/html") for output in shown]
    return [text for text in texts if text]


def tables(notebook: Any) -> list[list[list[str]]]:
    """The tables among the outputs."""
    return [table for text in outputs(notebook) if text.startswith("<table") for table in Tables(text).tables]


def printed(notebook: Any) -> list[str]:
    """The lines that cells print."""
    return [line for text in outputs(notebook) if not text.startswith("<") for line in text.splitlines()]


def test_there_is_a_notebook_for_each_way_to_fuse():
    assert [script.stem for script in SCRIPTS] == ["01_static_merging", "02_phatgoose", "03_wemoe", "04_foe"]
    assert sorted((ROOT / "examples").glob("*.ipynb")) == [script.with_suffix(".ipynb") for script in SCRIPTS]
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert re.findall(r"examples/(\w+)\.ipynb", page) == [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_its_script_with_outputs(script):
    notebook, fresh = stored(script), read(script)
    assert [(cell.cell_type, cell.id, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.id, cell.source) for cell in fresh.cells
    ]
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(code) <= 12
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert len(tables(notebook)) >= 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_holds_no_trace_of_a_machine(script):
    text = re.sub(r'"image/png": "[^"]*"', "", script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    for trace in (
        r"/(home|root|tmp|Users|work)/",
        r"\b0x[0-9a-f]{6}",
        r"it/s\b",
        r"\bs/it",
        "stderr",
        "widget",
        "Warning",
    ):
        assert not re.search(trace, text), trace


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_links_of_a_notebook_lead_somewhere(script):
    links = re.findall(r"\]\(([^)]+)\)", script.read_text(encoding="utf-8"))
    assert any(link.startswith("../docs/guides/") for link in links)
    for link in links:
        assert link.startswith("https://") or (script.parent / link).is_file(), link


def assert_agrees(shown: str, again: str) -> None:
    """Same words; scores lie within the intervals that were shown, which are rounded to whole points."""
    assert SCORE.sub("#", shown).split() == SCORE.sub("#", again).split()
    for (_, low, high), (score, _, _) in zip(SCORE.findall(shown), SCORE.findall(again), strict=True):
        assert float(low) - 0.5 <= float(score) <= float(high) + 0.5, (shown, again)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_executed_again_a_notebook_gives_what_it_shows(script):
    shown, again = stored(script), execute(script)
    assert [len(cell.get("outputs", ())) for cell in again.cells] == [
        len(cell.get("outputs", ())) for cell in shown.cells
    ]
    for before, after in zip(printed(shown), printed(again), strict=True):
        if SCORE.search(before):
            assert_agrees(before, after)
        elif not re.search(r"\d", before):
            assert before == after
    measured = 0
    for before, after in zip(tables(shown), tables(again), strict=True):
        assert before[0] == after[0]  # headings, or the first fact
        head = before[0]
        if head[0] in ("task", "lead over") and SCORE.search(str(before)):
            assert_agrees(str(before), str(after))
            measured += 1
        elif head[:2] == ["predictor", "accuracy"]:
            for row, other in zip(before[1:], after[1:], strict=True):
                low, high = map(float, SHARE.findall(row[2]))
                assert row[0] == other[0] and low <= float(SHARE.findall(other[1])[0]) <= high, (row, other)
            measured += 1
        elif "rejected because" in head:
            column = head.index("rejected because")
            assert [(row[0], row[1], row[column]) for row in before] == [(r[0], r[1], r[column]) for r in after]
    assert measured
