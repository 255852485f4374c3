"""The figures of README, docs and cards are those of the JSON files that they come from, and no figure has none."""

from __future__ import annotations

import copy
import re
import shlex

import pytest
from benchmarks.number_sources import ROOT, SOURCES
from benchmarks.write_numbers import LIST, NUMBER, documents, find, put_phrase, put_source, rendered, section_of
from demo_runs import departures

from hf_fusion.evaluation.results import Results

README = "README.md"
PAGES = [path for path in documents() if not path.startswith("docs/reference/") and path != "docs/security.md"]
# What looks like a measured figure and is none: of papers, versions and settings.
SETTINGS = (
    r"(arXiv |\[)\d{4}\.\d{4,5}",
    r"(PEFT|fusion_bench) \d[\d.]+",
    r"Python 3\.\d+",
    r"mergekit \d+\.\d+\.\d+",
    r"0\.5B parameters",
    r"95 % interval",
    r"pieces of 512 KB",
    r"1 CPU thread\b",
    r"Apache-2\.0",
)
MEASURED = re.compile(r"\d[\d,]*\.\d+|\d[\d.,]* ?(?:%|points|MB|GB|s\b|CPU|seconds|minutes)")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every document with figures, written again from the JSON files."""
    return rendered()


def test_documents_equal_the_rendered_measurements(texts):
    assert {README, LIST, "model_cards/foe.md", "model_cards/phatgoose.md", "model_cards/wemoe.md"} <= texts.keys()
    for name, text in texts.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} is not what make numbers-render writes"


def test_a_figure_edited_by_hand_is_overwritten(texts):
    source, page = SOURCES["demo-phatgoose"], texts["docs/benchmark/quality.md"]
    for phrase in source.phrases(source.read()):
        edited = put_phrase(NUMBER.sub("1.5", phrase), page)
        assert edited != page
        assert put_phrase(phrase, edited) == page


def test_a_phrase_is_found_once_or_not_at_all():
    phrase = "With three seeds it has 1.5 %"
    assert find(phrase, "With three\nseeds it has 98 % here").group(1) == "98"
    assert find(phrase, "With two seeds\nit has 1.7 %") is None
    with pytest.raises(ValueError, match="2 times instead of once.*three seeds"):
        find(phrase, 2 * "With three seeds it has 1.7 % ")


def test_a_table_or_phrase_that_no_document_has_is_named(texts):
    with pytest.raises(ValueError, match="no document has what demo-phatgoose measured: 'on each of five tasks"):
        put_source("demo-phatgoose", SOURCES["demo-phatgoose"], {"docs/index.md": texts["docs/index.md"]})


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_figure_has_a_source(page, texts):
    text = texts[page]
    for name, source in SOURCES.items():
        for phrase in source.phrases(source.read()) if source.phrases else ():
            if match := find(phrase, text):
                text = text[: match.start()] + re.sub(r"\S", " ", match[0]) + text[match.end() :]
        if source.block:
            section = section_of(name, source)
            text = re.sub(rf"<!-- {section}:begin -->.*?<!-- {section}:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\bhttps?://\S+", "", text)
    text = re.sub("|".join(SETTINGS), "", " ".join(text.split()))
    found = [text[max(0, m.start() - 40) : m.end() + 20] for m in MEASURED.finditer(text)]
    assert not found, "figures that no source of tests/benchmarks/number_sources.py gives"


@pytest.mark.parametrize("name", SOURCES)
def test_source_names_its_files_and_commands(name):
    source = SOURCES[name]
    assert all((ROOT / file).exists() for file in source.files)
    for command in source.commands:
        words = shlex.split(command.format(python="python", data="DIR"))
        assert words[0] == "make" or (words[0] == "python" and (ROOT / words[1]).is_file()), command
    if not source.commands:
        assert re.search(rf"`{name}`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")), (
            "says how it is measured"
        )


def test_the_demos_table_and_card_are_of_one_run():
    shown, card, _ = SOURCES["demo-foe"].read()
    assert Results.from_dict(shown) == Results.from_dict(card["results"])


@pytest.mark.parametrize(("name", "fused"), [("foe", "FoE"), ("phatgoose", "PHATGOOSE"), ("wemoe", "WEMoE")])
def test_a_card_is_of_the_first_seed_and_its_interval_holds_the_others(name, fused):
    card, seeds = SOURCES[f"demo-{name}"].read()[-2:]
    results = Results.from_dict(card["results"])
    stated = {p.name: p.only_score if results.pooled else p.means["held-in"] for p in results.predictors}
    scores = [
        {one: found["accuracy"] if isinstance(found, dict) else found for one, found in own.items()}
        for own in seeds["scores"].values()
    ]
    assert scores[0] == {one: score.score for one, score in stated.items()}
    low, high = stated[fused].ci95
    assert len(scores) == 3
    assert all(low <= run[fused] <= high for run in scores), [run[fused] for run in scores]


def test_a_run_that_leaves_the_cards_intervals_is_named():
    card = SOURCES["demo-phatgoose"].read()[0]["results"]
    assert departures(card, card) == []
    run = copy.deepcopy(card)
    own = next(predictor for predictor in run["predictors"] if predictor["name"] == "PHATGOOSE")
    own["scores"]["number-range"]["score"] = 0.35
    own["means"]["held-in"]["score"] = 0.575
    run["predictors"].remove(run["predictors"][0])
    told = departures(run, card)
    assert [line.partition(": ")[0] for line in told if "stated" in line] == [
        "PHATGOOSE number-range",
        "PHATGOOSE held-in",
    ]
    assert any(line.startswith("base ") and line.endswith("not measured") for line in told)
