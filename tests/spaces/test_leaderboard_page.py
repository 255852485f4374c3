"""The leaderboard's data, URLs, tables and plots: the summary's numbers, and escaping."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from spaces.leaderboard_cells import FAILED, HOSTILE, LEFT_OUT, TASKS, cells

from hf_fusion.bench.report import summarise

SPACE = Path(__file__).parents[2] / "spaces" / "leaderboard"
STRANGE = f"stranger {HOSTILE}"


@pytest.fixture(scope="module")
def space(space_modules):
    """The Space's modules by name."""
    names = ("data", "view", "tables", "page", "plots")
    return SimpleNamespace(**dict(zip(names, space_modules("leaderboard", *names), strict=True)))


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads(json.dumps(summarise(cells())))


@pytest.fixture(scope="module")
def suites(space, summary):
    return space.data.parse(summary)


def table(space, suites, query: str):
    view, suite = space.view.View.from_query(query, suites)
    return space.tables.table_of(suite, view)


def rows_of(summary, split: str = "all") -> dict[str, dict]:
    """Key in links → the summary's row, of the suite minilm-8."""
    [suite] = [suite for suite in summary["suites"] if suite["name"] == "minilm-8"]
    return {f"{row['method']}.{row['variant']}": row for row in suite["rows"] if row["split"] == split}


def column(shown, key: str) -> dict[str, Any]:
    """Key of a row → its cell of a column."""
    place = [own.key for own in shown.columns].index(key)
    return {line.row.key: line.cells[place] for line in shown.lines}


# ---------------------------------------------------------------- data


def test_summary_round_trips(space, suites, summary):
    assert [suite.name for suite in suites] == ["minilm-8", STRANGE]
    for suite, given in zip(suites, summary["suites"], strict=True):
        assert [row.key for row in suite.rows] == [f"{row['method']}.{row['variant']}" for row in given["rows"]]
        assert suite.groups == {s: {g: tuple(t) for g, t in own.items()} for s, own in given["groups"].items()}
    score, given = suites[0].rows[0].scores["clean"]["sst2"], summary["suites"][0]["rows"][0]["scores"]["clean"]["sst2"]
    assert (score.score, list(score.ci95), score.n) == (given["score"], given["ci95"], given["n"])


BROKEN = {
    "suites[0].rows[3].cost is 'x', not a number": ("cost", "x"),
    "suites[0].rows[3].cost is nan, not a number": ("cost", math.nan),
    "suites[0].rows[3].title is None, not a string": ("title", None),
    "suites[0].rows[3].scores.clean is 3, not an object": ("scores", {"clean": 3}),
    "suites[0].rows[3].scores.clean.sst2 has no 'status'": ("scores", {"clean": {"sst2": {}}}),
    "suites[0].rows[3].scores.clean.sst2.ci95 has 3 values": (
        "scores", {"clean": {"sst2": {"score": 0.5, "ci95": [0.1, 0.2, 0.3]}}},
    ),
    "suites[0].rows[3].part is 'top'; it must be floor, fused or ceiling": ("part", "top"),
    "suites[0].rows[3].seeds is True, not a whole number": ("seeds", [True]),
    "suites[0].rows[3].shas.a is 1, not a string": ("shas", {"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("said", "change"), BROKEN.items())
def test_broken_summary_is_reported_with_its_position(space, summary, said, change):
    broken = deepcopy(summary)
    broken["suites"][0]["rows"][3][change[0]] = change[1]
    with pytest.raises(space.data.BrokenError, match=re.escape(said)):
        space.data.parse(broken)


def test_invalid_summary_is_reported(space, tmp_path):
    path = tmp_path / "leaderboard.json"
    files = {"{": "is not JSON", "[]": "not an object", "{}": "has no 'suites'", "[" * 9999: "is not JSON"}
    for text, said in files.items():
        path.write_text(text)
        with pytest.raises(space.data.BrokenError, match=re.escape(said)):
            space.data.read(str(path), "", None)
    path.write_text('{"suites": []}')
    with pytest.raises(space.data.EmptyError, match="contains no measurements"):
        space.data.read(str(path), "", None)
    with pytest.raises(space.data.EmptyError, match="There is no file other.json"):
        space.data.read(str(tmp_path / "other.json"), "", None)
    assert "hf-fusion bench run" in space.page.empty("") and "hf-fusion bench report" in space.page.broken("")


# ---------------------------------------------------------------- addresses


def test_an_address_comes_back_from_its_view(space, suites):
    query = "?suite=minilm-8&show=cost&split=far&tasks=held-out&condition=typos%3A3&family=merge&variant=tuned&find=a+b"
    query += "&sort=-mean&row=ties.tuned"
    view, suite = space.view.View.from_query(query, suites)
    assert view.to_query() == query and suite is suites[0]
    assert space.view.View.from_query(view.to_query(find=HOSTILE), suites)[0].find == HOSTILE
    assert space.view.View("minilm-8").to_query() == "?suite=minilm-8"


def test_the_board_opens_on_the_suite_with_the_most_methods(space, summary):
    [suite] = [suite for suite in summary["suites"] if suite["name"] == "minilm-8"]
    small = {**suite, "name": "a-small-one", "rows": suite["rows"][:2]}
    suites = space.data.parse({"suites": [small, suite]})
    assert [each.name for each in suites] == ["a-small-one", "minilm-8"]
    assert space.view.View.from_query("", suites)[1].name == "minilm-8"
    assert space.view.View.from_query("?suite=a-small-one", suites)[1].name == "a-small-one"


def test_unknown_query_values_fall_back_to_defaults(space, suites):
    names = ("suite", "show", "split", "tasks", "condition", "family", "variant", "sort", "row", "other")
    query = "&".join(f"{name}=x%ff" for name in names) + f"&find={'y' * 999}"
    view, suite = space.view.View.from_query(query, suites)
    default = space.view.View("minilm-8", find="y" * 200, sort="x\ufffd", row="x\ufffd")
    assert view == default and suite is suites[0]
    assert "No method matches these filters" in space.page.board(suites, query)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("condition", ["clean", "typos:3"])
def test_scores_equal_the_summary(space, suites, summary, condition):
    shown = table(space, suites, f"?condition={condition}")
    for key, row in rows_of(summary).items():
        if condition not in row["scores"]:
            continue
        for task in TASKS:
            cell, given = column(shown, f"task.{task}")[key], row["scores"][condition][task]
            if given.get("score") is None:
                assert cell.reason == given["reason"] == FAILED and cell.value is None
                continue
            assert cell.text == f"{100 * given['score']:.1f}"
            assert cell.interval == f"{100 * given['ci95'][0]:.1f}–{100 * given['ci95'][1]:.1f}"
        mean = row["means"].get(condition, {}).get("held-in")
        assert column(shown, "mean")[key].value == (mean and pytest.approx(100 * mean["score"]))
        share = row["normalised"].get(condition, {}).get("held-in")
        assert column(shown, "experts")[key].value == (share and pytest.approx(100 * share))
        assert column(shown, "cost")[key].text == f"{row['cost']:.2f}"
    if condition == "clean":
        assert column(shown, "mean")["fisher.default"].reason == "no score on cola"
        assert column(shown, "seeds")["dare.tuned"].value == pytest.approx(
            100 * rows_of(summary)["dare.tuned"]["means"]["clean"]["held-in"]["spread"]
        )


def test_drops_and_unseen_means_equal_the_summary(space, suites, summary):
    shown = table(space, suites, "?show=corruptions")
    for key, row in rows_of(summary).items():
        if row["drop"]:
            values = {name: [row["drop"][f"{name}:{s}"] for s in range(1, 6)] for name in ("typos", "truncation")}
            for name, own in values.items():
                assert column(shown, f"drop.{name}")[key].value == pytest.approx(100 * sum(own) / 5)
            assert column(shown, "drop")[key].value == pytest.approx(100 * sum(map(sum, values.values())) / 10)
    shown = table(space, suites, "?show=unseen")
    for split in ("near", "far"):
        for key, row in rows_of(summary, split).items():
            for group, word in (("held-in", "seen"), ("held-out", "unseen")):
                cell, mean = column(shown, f"{split}.{word}")[key], row["means"].get("clean", {}).get(group)
                assert cell.value == (mean and pytest.approx(100 * mean["score"]))
    base = rows_of(summary)["pretrained.default"]["scores"]["clean"]
    unseen = column(shown, "near.unseen")["pretrained.default"]
    assert unseen.value == pytest.approx(50 * (base["sst2"]["score"] + base["snips"]["score"]))
    half = [own["ci95"][1] - own["score"] for own in (base["sst2"], base["snips"])]
    assert unseen.ci95[1] == pytest.approx(unseen.value + 50 * math.hypot(*half))
    html = space.page.board(suites, "?show=scores&split=far")
    assert f'title="{LEFT_OUT}"' in html and f">{LEFT_OUT}</li>" in html  # by the pointer, and to be read


def test_only_fused_models_are_marked_as_best(space, suites):
    shown = table(space, suites, "")
    for key in ("mean", "task.mrpc", "experts"):
        cells = column(shown, key)
        fused = [line.row.key for line in shown.lines if line.row.part == "fused" and cells[line.row.key].value]
        best = max(fused, key=lambda own: cells[own].value)
        marked = {own for own, cell in cells.items() if cell.best}
        assert best in marked and {cells[own].text for own in marked} == {cells[best].text} and marked <= set(fused)
    assert not any(cell.best for cell in column(shown, "cost").values())
    filtered = table(space, suites, "?family=merge")  # the best of all is not shown, so nothing is marked
    assert not any(cell.best for cell in column(filtered, "mean").values())
    [best] = [row for row in suites[0].rows if row.key == "wemoe.default" and row.split == "all"]
    with_twin = replace(suites[0], rows=(*suites[0].rows, replace(best, method="twin", part="ceiling")))
    cells = column(table(space, [with_twin], ""), "mean")
    assert cells["wemoe.default"].best and not cells["twin.default"].best
    lower = table(space, suites, space.view.View(STRANGE).to_query())
    assert [line.row.method for line in lower.lines if line.cells[1].best] == ["second"]
    assert [line.cells[1].text for line in lower.lines] == ["4.25", "5.50", "8.12"]  # less is better: first


def test_rows_are_sorted_within_their_part_and_variants_stay_together(space, suites):
    for sort, sign in (("mean", 1), ("-mean", -1)):
        shown = table(space, suites, f"?sort={sort}")
        assert [title for title, _ in shown.sections] == ["Ceilings", "Fused models", "Floors"]
        for _, lines in shown.sections:
            methods = list(dict.fromkeys(line.row.method for line in lines))
            assert [line.row.method for line in lines] == sorted((line.row.method for line in lines), key=methods.index)
            pairs = [[line for line in lines if line.row.method == method] for method in methods]
            values = [max([line.cells[1].value or -1 for line in pair]) for pair in pairs]
            known = [value for value in values if value >= 0]
            assert known == sorted(known, key=lambda value: -sign * value)
            assert values[len(known) :] == [-1] * (len(values) - len(known))  # missing ones last
            assert all([line.row.variant for line in pair][0] == "default" for pair in pairs)
    costs = [line.cells[-1].value for line in dict(table(space, suites, "?sort=cost").sections)["Fused models"]]
    assert costs == sorted(costs)


def test_filters_keep_matching_rows(space, suites):
    fused = lambda query: {line.row.key for line in table(space, suites, query).lines if line.row.part == "fused"}  # noqa: E731
    assert fused("?variant=tuned") == {"task_arithmetic.tuned", "ties.tuned", "dare.tuned", "tsv_m.tuned"}
    assert fused("?family=mixture") == {"emr.default", "smile.default", "wemoe.default"}
    assert fused("?find=Arithmetic") == {f"{m}.{v}" for m in ("task_arithmetic", "dare") for v in ("default", "tuned")}
    parts = {line.row.part for line in table(space, suites, "?family=mixture").lines}
    assert parts == {"floor", "fused", "ceiling"}  # to compare with
    keys = [own.key for own in table(space, suites, "?split=near&tasks=held-out").columns]
    assert keys[:4] == ["method", "mean-unseen", "task.sst2", "task.snips"]


def test_download_has_the_shown_data(space, suites):
    for query in ("?sort=-task.cola", "?show=cost", "?show=corruptions&family=merge", "?show=unseen"):
        shown = table(space, suites, query)
        rows = list(csv.DictReader(io.StringIO(space.tables.to_csv(shown))))
        assert [(row["method"], row["variant"]) for row in rows] == [
            (line.row.title, line.row.variant) for line in shown.lines
        ]
        for row, line in zip(rows, shown.lines, strict=True):
            for own, cell in zip(shown.columns[1:], line.cells[1:], strict=True):
                assert row[own.title] == ("" if cell.value is None else str(cell.value))
                if cell.ci95:
                    assert [row[f"{own.title} low"], row[f"{own.title} high"]] == [str(end) for end in cell.ci95]
                assert (cell.reason or "") in row["notes"]
    strange = space.tables.to_csv(table(space, suites, space.view.View(STRANGE).to_query()))
    assert [row["method"] for row in csv.DictReader(io.StringIO(strange))][-1] == "'=cmd()"


# ---------------------------------------------------------------- HTML


class Tags(HTMLParser):
    """All elements and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        self.links += [value for name, value in attributes if name in ("href", "src")]


@pytest.mark.parametrize("show", ["scores", "cost", "corruptions", "unseen"])
def test_untrusted_text_is_escaped(space, suites, show):
    for row in ("second.default", f"first {HOSTILE}.default"):
        query = space.view.View(STRANGE, show, find="", row=row).to_query(sort=f"task.task {HOSTILE}")
        found = Tags(space.page.board(suites, query))
        assert not found.tags & {"img", "script"} and not any(name.startswith("on") for name in found.names)
        assert all(link.startswith(("?", "#", "data:text/csv")) for link in found.links)
    assert HOSTILE not in space.page.board(suites, f"?find={HOSTILE}")


def test_recipe_yaml_has_all_inputs(space, suites, summary):
    for row in (row for suite in suites for row in suite.rows):
        read = yaml.safe_load(space.page.recipe_text(row))
        assert (read["method"], read["variant"], read["fused"]) == (row.method, row.variant, row.split)
        assert read["parameters"] == row.parameters
        assert read["sources"] == [f"{name}@{sha}" for name, sha in row.shas.items()]
    html = space.page.board(suites, "?row=ties.tuned")
    row = rows_of(summary)["ties.tuned"]
    assert html.count("lb-recipe") == 1 and f">{row['command']}</pre>" in html and "torch 2.9.0" in html


# ---------------------------------------------------------------- pictures


def test_labels_overlap_neither_each_other_nor_marks(space):
    rng, boxes = random.Random(0), 0
    for count in (2, 12, 40):
        names = ["m" * rng.randint(4, 24) for _ in range(count)]
        places = [(rng.choice([60, 60, 64, 300, rng.uniform(60, 900)]), rng.uniform(30, 400)) for _ in names]
        found = space.plots.place_labels(names, places, range(count), (50, 10, 940, 440), 18)
        own = [label[3] for label in found.values()]
        marks = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
        for k, box in enumerate(own):
            assert box[0] >= 50 and box[2] <= 940 and box[1] >= 10 and box[3] <= 440
            for other in [*own[:k], *marks]:
                assert box[0] >= other[2] or other[0] >= box[2] or box[1] >= other[3] or other[1] >= box[3]
        boxes += len(own)
    assert boxes > 20


def test_pareto_front_excludes_dominated_models(space, suites):
    shown = table(space, suites, "?show=cost")
    points = space.plots.points_of(shown)
    best = space.plots.front(points, False)
    fused = [point for point in points if point.is_fused]
    for point in fused:
        beaten = any(o.cost <= point.cost and o.score > point.score for o in fused)
        assert beaten or point in best or any(o.score == point.score for o in best)
    assert [p.line.row.method for p in best] == ["emr", "smile", "wemoe"]
    html = str(space.plots.cost_figure(shown, space.view.View("minilm-8", "cost")))
    assert html.count('class="front"') == 2 and html.count('class="point ') == 2 * len(points)
    lower = table(space, suites, space.view.View(STRANGE, "cost").to_query())
    assert [p.score for p in space.plots.front(space.plots.points_of(lower), True)] == [5.5, 4.25]


def test_corruptions_are_plotted_and_tabulated(space, suites, summary):
    html = space.page.board(suites, "?show=corruptions&find=wemoe")
    means = rows_of(summary)["wemoe.default"]["means"]
    for name in ("typos", "truncation"):
        wanted = [means["clean"]["held-in"]["score"], *(means[f"{name}:{s}"]["held-in"]["score"] for s in range(1, 6))]
        cells = "".join(f"<td>{100 * value:.1f}</td>" for value in wanted)
        assert f'<th scope="row">1 WEMoE</th>{cells}' in html
    curve = re.findall(r'class="curve numbered"[^>]*points="([^"]*)"', html)
    assert [len(points.split()) for points in curve] == [2, 6, 6]  # its key, and a panel for each corruption
    heights = [float(point.split(",")[1]) for point in curve[2].split()]
    assert heights == sorted(heights)  # worse rows, lower scores
