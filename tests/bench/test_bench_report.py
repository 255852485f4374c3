"""Summary and tables from cells: numbers computed by hand, missing cells, and escaping."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess

import pytest
from made_cells import cell, made_cells

from hf_fusion.bench.report import summarise
from hf_fusion.bench.suite_tables import (
    corruption_table,
    cost_table,
    main_table,
    overview_table,
    tables_of,
    unseen_table,
)
from hf_fusion.bench.tables import Section, Table, TableEntry, mark_best, to_csv, to_latex, to_markdown


def row_of(cells, method: str, variant: str = "default", split: str = "all") -> dict:
    rows = summarise(cells)["suites"][0]["rows"]
    return next(row for row in rows if (row["method"], row["variant"], row["split"]) == (method, variant, split))


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))


def test_a_score_is_the_mean_over_seeds_and_so_are_the_ends_of_its_interval():
    cells = [
        cell("ties", "a", 0.70, seed=0, ci95=(0.60, 0.75)),
        cell("ties", "a", 0.80, seed=1, ci95=(0.75, 0.90)),
        cell("ties", "a", 0.75, seed=2, ci95=(0.66, 0.81)),
    ]
    row = row_of(cells, "ties")
    found = row["scores"]["clean"]["a"]
    assert found["score"] == pytest.approx(0.75)
    assert found["ci95"] == pytest.approx([0.67, 0.82])
    assert found["spread"] == pytest.approx(0.05)
    assert (found["n"], row["seeds"]) == (1000, [0, 1, 2])


def test_a_mean_over_tasks_is_taken_seed_by_seed():
    cells = [
        cell("ties", "a", 0.6, seed=0, ci95=(0.57, 0.63)),
        cell("ties", "b", 0.8, seed=0, ci95=(0.76, 0.82)),  # 0.7, below √(0.03² + 0.04²) / 2 = 0.025
        cell("ties", "a", 0.8, seed=1, ci95=(0.74, 0.84)),
        cell("ties", "b", 0.8, seed=1, ci95=(0.72, 0.83)),  # 0.8, below √(0.06² + 0.08²) / 2 = 0.05
    ]
    mean = row_of(cells, "ties")["means"]["clean"]["held-in"]
    assert mean["score"] == pytest.approx(0.75)
    assert mean["ci95"][0] == pytest.approx((0.7 - 0.025 + 0.8 - 0.05) / 2)
    above = math.hypot(0.03, 0.02) / 2, math.hypot(0.04, 0.03) / 2
    assert mean["ci95"][1] == pytest.approx((0.7 + above[0] + 0.8 + above[1]) / 2)
    assert mean["spread"] == pytest.approx(0.05)


def test_one_seed_has_no_spread_and_no_column_for_it():
    cells = [cell("ties", "a", 0.7), cell("individual", "a", 0.8)]
    assert row_of(cells, "ties")["scores"]["clean"]["a"]["spread"] == 0
    table = main_table(summarise(cells)["suites"][0])
    assert table.columns == ("method", "a", "mean", "of experts", "cost")
    assert line_of(to_markdown(table), "TIES").endswith("| **70.0 ±2.0** | **70.0 (68.0–72.0)** | 87.5 % | 1.00 |")


def test_missing_cells_have_a_reason_and_no_mean():
    cells = [
        cell("ties", "a", 0.7),
        cell("ties", "b", None, reason="out | of <memory>"),
        cell("wemoe", "a", 0.8),
        cell("smile", "a", 0.6, seed=0),
        cell("smile", "a", None, seed=1, reason="killed"),
        cell("smile", "b", 0.7, seed=0),
        cell("smile", "b", math.nan, seed=1),
    ]
    suite = json.loads(json.dumps(summarise(cells), allow_nan=False))["suites"][0]
    by_method = {row["method"]: row for row in suite["rows"]}
    assert by_method["ties"]["scores"]["clean"]["b"] == {"status": "failed", "reason": "out | of <memory>"}
    assert by_method["ties"]["means"] == {}
    assert by_method["wemoe"]["scores"]["clean"]["b"] == {"status": "not run", "reason": "not run"}
    assert by_method["smile"]["means"]["clean"]["held-in"]["score"] == pytest.approx(0.65)  # of the seed that has both
    assert by_method["smile"]["scores"]["clean"]["b"]["note"] == "without seed 1: the score is nan"
    text = to_markdown(main_table(suite))
    assert line_of(text, "TIES").startswith("| TIES | 70.0 ±2.0 | –<sup>1</sup> | – |")
    assert "<sup>1</sup> failed: out &#124; of &#60;memory&#62;" in text
    assert "<sup>2</sup> not run" in text
    assert "without seed 1: killed" in text


def test_normalised_is_the_share_of_the_experts_on_the_same_tasks_and_condition():
    cells = [
        cell("individual", "a", 0.8),
        cell("individual", "b", 1.0),
        cell("ties", "a", 0.6),
        cell("ties", "b", 0.75),
        cell("individual", "a", 0.5, condition="jpeg:1"),
        cell("ties", "a", 0.4, condition="jpeg:1"),
    ]
    row = row_of(cells, "ties")
    assert row["normalised"]["clean"]["held-in"] == pytest.approx(0.675 / 0.9)
    assert row["normalised"]["jpeg:1"]["held-in"] == pytest.approx(0.8)
    assert row["drop"] == {"jpeg:1": pytest.approx(1 - 0.4 / 0.6)}  # against clean rows of a alone
    assert row_of(cells, "individual")["normalised"]["clean"]["held-in"] == pytest.approx(1)


def test_error_metrics_invert_relative_scores_and_drops():
    given = {"metric": "perplexity"}
    cells = [
        cell("individual", "a", 8.0, **given),
        cell("ties", "a", 10.0, **given),
        cell("average", "a", 16.0, **given),
        cell("ties", "a", 15.0, condition="typos:1", **given),
    ]
    row = row_of(cells, "ties")
    assert row["normalised"]["clean"]["held-in"] == pytest.approx(0.8)
    assert row["drop"]["typos:1"] == pytest.approx(0.5)
    text = to_markdown(main_table(summarise(cells)["suites"][0]))
    assert "**10.00 ±0.02**" in line_of(text, "TIES")
    assert "**" not in line_of(text, "Simple average")


def test_perplexity_and_accuracy_have_no_mean_together():
    cells = [cell("ties", "a", 0.7), cell("ties", "b", 10.0, metric="perplexity")]
    assert row_of(cells, "ties")["means"] == {}


def test_relative_scores_have_a_mean_across_metrics():
    cells = [
        *(cell("individual", *own) for own in (("a", 0.8), ("b", 0.5))),
        *(cell("individual", task, score, metric="angle") for task, score in (("c", 20.0), ("d", 30.0))),
        *(cell("ties", *own) for own in (("a", 0.6), ("b", 0.5))),
        *(cell("ties", task, score, metric="angle") for task, score in (("c", 25.0), ("d", 40.0))),
        *(cell("average", task, 0.4) for task in "ab"),
        cell("average", "c", 25.0, metric="angle"),
        cell("average", "d", None, metric="angle"),
    ]
    share = (0.75 + 1 + 0.8 + 0.75) / 4
    assert row_of(cells, "ties")["normalised"]["clean"]["held-in"] == pytest.approx(share)
    assert row_of(cells, "individual")["normalised"]["clean"]["held-in"] == pytest.approx(1)
    assert row_of(cells, "average")["normalised"] == {}
    assert "82.5 %" in line_of(to_markdown(main_table(summarise(cells)["suites"][0])), "TIES")


def test_unseen_split_has_separate_groups_and_all_experts():
    cells = [
        *(cell("individual", task, score) for task, score in (("a", 0.9), ("b", 0.8))),
        *(cell("pretrained", task, score) for task, score in (("a", 0.3), ("b", 0.5))),
        cell("ties", "a", 0.81),
        cell("ties", "b", 0.72),
        cell("ties", "a", 0.85, split="without-b"),
        cell("ties", "b", 0.6, split="without-b", group="held-out"),
    ]
    suite = summarise(cells)["suites"][0]
    assert suite["groups"] == {"all": {"held-in": ["a", "b"]}, "without-b": {"held-in": ["a"], "held-out": ["b"]}}
    assert row_of(cells, "ties", split="without-b")["normalised"]["clean"]["held-out"] == pytest.approx(0.75)
    text = to_markdown(unseen_table(suite))
    assert line_of(text, "TIES") == "| TIES | **85.0 (83.0–87.0)** | **60.0 (58.0–62.0)** |"
    assert line_of(text, "Pre-trained") == "| Pre-trained | 30.0 (28.0–32.0) | 50.0 (48.0–52.0) |"
    assert unseen_table(summarise(cells[:6])["suites"][0]) is None


def test_corruptions_are_shown_as_drops_over_their_severities():
    cells = [
        cell("ties", "a", 0.8),
        cell("ties", "b", 0.9),  # not corrupted
        cell("ties", "a", 0.6, condition="gaussian_noise:1"),
        cell("ties", "a", 0.4, condition="gaussian_noise:2"),
        cell("ties", "a", 0.7, condition="jpeg:1"),
    ]
    table = corruption_table(summarise(cells)["suites"][0])
    assert table.columns == ("method", "clean", "corrupted", "gaussian noise", "jpeg", "mean drop")
    # drops 25, 50 and 12.5 %
    assert (
        line_of(to_markdown(table), "TIES").replace("*", "")
        == "| TIES | 80.0 (78.0–82.0) | 56.7 | 37.5 | 12.5 | 29.2 |"
    )


def test_rows_are_ordered_by_family_with_variants_adjacent():
    cells = [
        *made_cells(tasks=1, seeds=1),
        cell("expert:task-1", "task-1", 0.5, family="expert"),
        cell("mystery", "task-1", 0.5, family="alien"),
    ]
    rows = summarise(cells)["suites"][0]["rows"]
    order = [(row["method"], row["variant"]) for row in rows]
    assert order[:2] == [("pretrained", "default"), ("expert:task-1", "default")]
    assert order[-2:] == [("multitask", "default"), ("individual", "default")]
    place = order.index(("ties", "default"))
    assert order[place + 1] == ("ties", "tuned")
    assert [row["title"] for row in rows if row["method"] == "mystery"] == ["mystery"]
    headings = [section.title for section in main_table(summarise(cells)["suites"][0]).sections]
    assert headings[0] == "Floors"
    assert headings[-2:] == ["alien", "Ceilings"]


def test_best_and_equal_entries_are_marked_except_floors_and_ceilings():
    cells = [
        cell("individual", "a", 0.9),
        cell("ties", "a", 0.70004),
        cell("average", "a", 0.69996),
        cell("fisher", "a", 0.6994),
        cell("fisher", "a", 0.69, variant="tuned"),
    ]
    text = to_markdown(main_table(summarise(cells)["suites"][0]))
    assert [name for name in ("TIES", "Simple average", "Fisher", "Fisher, tuned", "Individual experts") if
            "**" in line_of(text, name)] == ["TIES", "Simple average"]  # fmt: skip


def test_costs_of_one_model_are_shown():
    cells = [
        cell("ties", task, 0.5, seed=seed, seconds=2.0 + seed, fuse_cpu_seconds=7.0, stored=22_000_000,
             active=11_000_000, peak_bytes=5_000_000, cost=1.5, parameters={"scaling": 0.30000001, "weight": [1.0] * 5})
        for task in "ab" for seed in (0, 1)
    ]  # fmt: skip
    row = row_of(cells, "ties")
    assert (row["seconds"], row["fuse_cpu_seconds"]) == (5.0, 7.0)  # 4 s and 6 s
    text = to_markdown(cost_table(summarise(cells)["suites"][0]))
    parameters = "scaling 0.3, weight &#91;1, 1, 1, …&#93;"
    assert line_of(text, "TIES") == f"| TIES | {parameters} | 7.0 | 5.0 | 22.0 | 11.0 | 5.0 | 1.50 |"


def test_overview_has_a_column_per_suite_and_one_for_tuned_rows():
    cells = [
        cell("ties", "a", 0.7, suite="one"),
        cell("ties", "a", 0.75, suite="one", variant="tuned"),
        cell("ties", "a", 0.6, suite="two"),
        cell("slerp", "a", None, suite="two", status="left out", reason="for two experts"),
        cell("foe", "a", 0.5, suite="foe-domains"),
    ]
    table = overview_table(summarise(cells))
    assert table.columns == ("method", "foe-domains", "one", "one, tuned", "two")
    text = to_markdown(table)
    assert line_of(text, "TIES").replace("*", "") == (
        "| TIES | –<sup>1</sup> | 70.0 (68.0–72.0) | 75.0 (73.0–77.0) | 60.0 (58.0–62.0) |"
    )
    assert line_of(text, "SLERP") == "| SLERP | –<sup>1</sup> | –<sup>2</sup> | – | –<sup>3</sup> |"
    assert "<sup>1</sup> predicts with the head of a known task; here the task of a row is unknown" in text
    assert "<sup>2</sup> not run" in text
    assert "<sup>3</sup> a: not applicable: for two experts" in text


HOSTILE = "a|b\\c_{d}&50% $x$ #1 ~^ <i> [l](u) *s* `t` --set λ é 中"


def hostile() -> Table:
    rows = (
        (TableEntry(HOSTILE), TableEntry("1.5", 1.5, (1.0, 2.0), best=True)),
        (TableEntry("=SUM(A1)"), TableEntry(note=HOSTILE)),
    )
    return Table("hostile_name", HOSTILE, ("method", HOSTILE), (Section("*", rows),), "100 % & more")


def test_markdown_escapes_text():
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable("table").render(to_markdown(hostile()))
    assert html.count("<tr>") == 4
    assert html.count("<td") == 6
    assert "<i>" not in html
    assert "<a" not in html
    assert "<em>s</em>" not in html
    assert "<strong>1.5</strong>" in html


def test_csv_has_numbers_with_their_intervals_and_no_formulas():
    head, first, second = csv.reader(io.StringIO(to_csv(hostile())))
    assert head == ["section", "method", HOSTILE, f"{HOSTILE} low", f"{HOSTILE} high", "notes"]
    assert first == ["*", HOSTILE, "1.5", "1.0", "2.0", ""]
    assert second == ["*", "'=SUM(A1)", "", "", "", f"{HOSTILE}: {HOSTILE}"]


def test_latex_escapes_special_characters():
    text = to_latex(hostile())
    text.encode("ascii")
    escaped = (
        r"a\textbar{}b\textbackslash{}c\_\{d\}\&50\% \$x\$ \#1 \textasciitilde{}\textasciicircum{} "
        r"\textless{}i\textgreater{} {[}l](u) {*}s{*} `t` -{}-set $\lambda$ e U+4E2D"
    )
    assert rf"{escaped} & \textbf{{1.5}} \\" in text
    assert r"=SUM(A1) & --\textsuperscript{1} \\" in text
    assert r"\multicolumn{2}{l}{\textit{{*}}} \\" in text
    assert r"\label{tab:hostile-name}" in text
    assert text.count("{") - 2 * text.count(r"\{") == text.count("}") - 2 * text.count(r"\}")


@pytest.mark.process
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path):
    suite = summarise(made_cells(seeds=2, corruptions=("jpeg",), severities=1, unseen=True))["suites"][0]
    tables = [hostile(), *tables_of(suite)]
    body = "\n".join(map(to_latex, tables))
    (tmp_path / "t.tex").write_text(
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_no_best_entry_in_a_column_without_numbers():
    rows = [(TableEntry("a"), TableEntry()), (TableEntry("b"), TableEntry())]
    assert mark_best(rows, 1) == rows
