"""The leaderboard Space in use: results in a dataset repo, a copied folder, a real browser."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from gradio_client import Client
from huggingface_hub import HfApi
from spaces.leaderboard_cells import FAILED, HOSTILE, TASKS, TUNED, cells

from hf_fusion.bench.report import summarise
from hf_fusion.bench.suite import HARNESS_LOWER, LOWER, METRICS

SCREENS = [(1280, "light"), (390, "dark")]
STRANGE = f"stranger {HOSTILE}"


@pytest.fixture(scope="session")
def summary() -> dict[str, Any]:
    return summarise(cells())


@pytest.fixture(scope="session")
def url(hub, summary, run_space) -> str:
    """The Space, which reads an older commit of a data set: the newest one is broken."""
    api, file = HfApi(endpoint=hub.endpoint, token=hub.token("space-board")), json.dumps(summary).encode()
    repo: dict[str, Any] = {"repo_id": "space-board/results", "repo_type": "dataset"}
    api.create_repo(**repo)
    pinned = api.upload_file(path_in_repo="leaderboard.json", path_or_fileobj=file, **repo).oid
    api.upload_file(path_in_repo="leaderboard.json", path_or_fileobj=b"{", **repo)
    return run_space("leaderboard", RESULTS_DATASET="space-board/results", RESULTS_REVISION=pinned)


def rows_of(summary, split: str = "all") -> dict[str, dict]:
    """Key in links → the summary's row, of the suite minilm-8."""
    return {f"{row['method']}.{row['variant']}": row for row in summary["suites"][0]["rows"] if row["split"] == split}


def test_error_metrics_agree_with_the_package(space_modules):
    [data] = space_modules("leaderboard", "data")
    assert data.LOWER == LOWER
    assert METRICS.keys() >= LOWER - HARNESS_LOWER


def wait_for(page, query: str) -> None:
    """The view of an address is there, and its address in the bar."""
    page.locator(f".lb-board[data-address='{query}']").wait_for()
    page.wait_for_function("query => location.search == query", arg=query)


def line(page, key: str) -> list[str]:
    """What stands in a row of the table, without its intervals."""
    row = page.locator(f"tr:has([data-key='row {key}'])")
    return row.locator("td").evaluate_all(
        "cells => cells.map(c => [...c.childNodes].filter(n => n.nodeName != 'SMALL').map(n => n.textContent).join(''))"
    )


def methods(page) -> list[str]:
    """The fused models in their order."""
    keys = page.locator(".lb-table .fused [data-key^='row ']").evaluate_all("all => all.map(a => a.dataset.key)")
    return [key.removeprefix("row ") for key in keys]


def test_a_client_gets_tables(url, summary):
    client = Client(url, verbose=False)
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/table"]
    table = list(csv.DictReader(io.StringIO(client.predict("?show=cost&sort=cost", api_name="/table"))))
    costs = sorted(row["cost"] for row in rows_of(summary).values() if row["part"] == "fused")
    assert [float(row["Cost"]) for row in table if row["section"] == "Fused models"] == costs


@pytest.mark.browser
def test_tables_filters_and_addresses_in_the_browser(url, summary, visit):
    for width, scheme in SCREENS:
        page = visit(url, width, scheme)
        for show in ("Scores", "Cost", "Corruptions", "Unseen tasks"):
            page.locator("nav a", has_text=show).click()
            page.locator(f"nav [aria-current]:text-is('{show}')").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        first = page.locator(".lb-table tbody th[scope=row]").first
        left = first.bounding_box()["x"]
        page.locator(".lb-box").evaluate("box => box.scrollTo(400, 0)")
        assert first.bounding_box()["x"] == left  # the names of methods stay
        ground = page.locator(".lb-box").evaluate("e => getComputedStyle(e).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 25, 23)"}[scheme]

    page, rows = visit(url), rows_of(summary)
    for key, row in rows.items():
        scores = [row["scores"]["clean"][task].get("score") for task in TASKS]
        shown = [text.removeprefix("★").removesuffix(" best") for text in line(page, key)[1:7]]
        assert shown == [f"{100 * score:.1f}" if score is not None else "failed1" for score in scores]
    missing = page.locator("td.missing", has_text="failed")
    assert missing.get_attribute("title") == FAILED and page.locator("#lb-note-1").text_content() == FAILED
    missing.get_by_role("link").click()
    assert page.evaluate("[document.activeElement.id, location.search]") == ["lb-note-1", "?suite=minilm-8"]
    assert page.locator("td.best").count() > 0 and page.locator(".lb-table caption").count() == 1
    parts = page.locator(".lb-part").all_text_contents()
    assert parts == ["Ceilings", "Fused models", "Floors"]
    order = methods(page)
    assert order[0] == "wemoe.default" and order.index("ties.tuned") - order.index("ties.default") == 1

    page.locator("[data-key='sort task.cola']").focus()
    page.keyboard.press("Enter")
    wait_for(page, "?suite=minilm-8&sort=task.cola")
    head = page.locator("th[aria-sort=descending]")
    assert head.text_content() == "cola▼" and page.evaluate("document.activeElement.dataset.key") == "sort task.cola"
    values = {key: row["scores"]["clean"]["cola"].get("score") for key, row in rows.items()}
    single = [values[key] for key in methods(page) if key.split(".")[0] not in TUNED]
    assert single[-1] is None and single[:-1] == sorted(single[:-1], reverse=True)
    page.keyboard.press("Enter")
    wait_for(page, "?suite=minilm-8&sort=-task.cola")
    assert page.locator("th[aria-sort=ascending]").count() == 1

    page.get_by_label("Parameters").select_option("tuned")
    wait_for(page, "?suite=minilm-8&variant=tuned&sort=-task.cola")
    assert len(methods(page)) == 4
    page.get_by_label("Method").press_sequentially("ties", delay=20)
    wait_for(page, "?suite=minilm-8&variant=tuned&find=ties&sort=-task.cola")
    assert methods(page) == ["ties.tuned"] and "1 row: Scores in %" in page.get_by_role("status").all_text_contents()[0]
    assert page.evaluate("[document.activeElement.name, document.activeElement.value]") == ["find", "ties"]
    page.keyboard.press("Enter")  # the view is there: no step of the history
    with page.expect_download() as download:
        page.get_by_text("Download the table").click()
    [saved] = csv.DictReader(io.StringIO(Path(download.value.path()).read_text()))
    wanted = rows["ties.tuned"]
    assert download.value.suggested_filename == "minilm-8-scores.csv" and saved["variant"] == "tuned"
    for task in TASKS:
        score, (low, high) = wanted["scores"]["clean"][task]["score"], wanted["scores"]["clean"][task]["ci95"]
        assert [float(saved[own]) for own in (task, f"{task} low", f"{task} high")] == pytest.approx(
            [100 * score, 100 * low, 100 * high]
        )

    other = visit(page.url)  # the same view from its address
    assert methods(other) == ["ties.tuned"] and other.get_by_label("Parameters").input_value() == "tuned"
    assert other.locator("th[aria-sort=ascending]").text_content() == "cola▲"
    page.go_back()
    wait_for(page, "?suite=minilm-8&variant=tuned&sort=-task.cola")
    assert len(methods(page)) == 4 and page.get_by_label("Method").input_value() == ""
    page.go_back()
    wait_for(page, "?suite=minilm-8&sort=-task.cola")
    assert len(methods(page)) == len(order)
    page.go_forward()
    wait_for(page, "?suite=minilm-8&variant=tuned&sort=-task.cola")
    page.get_by_role("link", name="Reset").click()
    wait_for(page, "?suite=minilm-8")
    assert methods(page) == order

    page.get_by_label("Condition").select_option("typos:3")
    wait_for(page, "?suite=minilm-8&condition=typos%3A3")
    score = rows["smile.default"]["scores"]["typos:3"]["trec"]["score"]
    assert line(page, "smile.default")[2].removeprefix("★").removesuffix(" best") == f"{100 * score:.1f}"


@pytest.mark.browser
@pytest.mark.slow
def test_recipes_plots_and_a_strangers_texts_in_the_browser(url, summary, visit):
    row = rows_of(summary)["wemoe.default"]
    for width, picture in ((1280, "wide"), (390, "narrow")):
        page = visit(f"{url}?show=cost", width)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        boxes = "all => all.map(label => label.getBoundingClientRect().toJSON())"
        labels = page.locator(f"svg.{picture} .label").evaluate_all(boxes)
        for k, a in enumerate(labels):
            for b in labels[:k]:
                apart = a["left"] >= b["right"] or b["left"] >= a["right"]
                assert apart or a["top"] >= b["bottom"] - 3 or b["top"] >= a["bottom"] - 3  # a line has air above it
        assert len(labels) >= 6
        mark = page.locator(f"svg.{picture} .point[data-key$='wemoe.default']")
        mark.focus()
        mean = row["means"]["clean"]["held-in"]
        said = f"WEMoE\nMixtures, on the Pareto front\nmean {100 * mean['score']:.1f} ("
        tip = page.locator(".lb-tip")
        assert tip.text_content().startswith(said) and tip.text_content().endswith("cost 1.90")
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        mark.hover()
        assert tip.is_visible()
        page.keyboard.press("Enter")
        wait_for(page, "?suite=minilm-8&show=cost&row=wemoe.default")
        recipe = page.locator(".lb-recipe")
        place = recipe.bounding_box()
        assert place["x"] + place["width"] <= width and place["y"] < 900
        assert "method: wemoe" in recipe.text_content() and row["machine"] in recipe.text_content()
        page.get_by_role("button", name="Copy the command").click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == row["command"]
        link = page.locator("[data-key='row wemoe.default']")
        assert link.get_attribute("aria-expanded") == "true"
        link.click()
        page.wait_for_function("!document.querySelector('.lb-recipe')")

    query = {"suite": STRANGE, "find": HOSTILE, "row": f"first {HOSTILE}.default", "sort": HOSTILE}
    page = visit(f"{url}?{urlencode(query)}")
    assert page.locator("h2").text_content() == STRANGE and HOSTILE in page.locator(".lb-recipe").text_content()
    assert page.get_by_label("Method").input_value() == HOSTILE
    page.get_by_role("link", name="Reset").click()
    wait_for(page, "?" + urlencode({"suite": STRANGE}))
    for show, title in (("cost", STRANGE), ("corruptions", STRANGE), ("unseen", "Unseen tasks were not measured")):
        page.locator(f"[data-key='show {show}']").click()
        wait_for(page, "?" + urlencode({"suite": STRANGE, "show": show}))
        assert page.locator(".lb-board h2").text_content() == title and page.locator(".lb-board img").count() == 0


# ---------------------------------------------------------------- where results come from


@pytest.mark.slow
def test_results_come_from_a_file_or_a_data_set_or_it_is_said_why_not(alone, summary, tmp_path):
    good, broken = tmp_path / "good.json", tmp_path / "broken.json"
    good.write_text(json.dumps(summary))
    broken.write_text('{"suites": [{"name": 3}]}')
    code = f"""
import app
print(app.show(''))
app.RESULTS_DATASET = 'nobody/nothing'
print(app.show(''))
app.RESULTS_FILE = {str(broken)!r}
print(app.show(''))
app.RESULTS_FILE = {str(good)!r}
print(app.show('?show=unseen&row=wemoe.default'))
"""
    html = alone("leaderboard", code)
    assert "No results yet" in html and "hf-fusion bench run" in html
    assert "leaderboard.json of nobody/nothing could not be fetched" in html
    assert "suites[0].name is 3, not a string" in html and html.count("The results cannot be read") == 2
    assert "near: unseen" in html and "method: wemoe" in html
