"""What every card has, of every family and of static merges: its sections, what it pins, and nothing that is not so."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from rendered import NASTY, Tags, html_of

from hf_fusion.cards.card import render_card
from hf_fusion.cards.citations import PAPERS, bibtex, software
from hf_fusion.cards.commands import TRANSFORMERS, Commands, measured_columns
from hf_fusion.cards.facts import CardFacts, card_contents, facts_from_json
from hf_fusion.cards.plain_methods import PLAIN
from hf_fusion.cards.result_tables import EXPLAINED, result_tables
from hf_fusion.cards.static_merge import MERGE
from hf_fusion.cards.usage import pinned_revision, usage_block, usage_code
from hf_fusion.cli.app import build_parser
from hf_fusion.evaluation.harness_results import HarnessRun, HarnessScore
from hf_fusion.evaluation.results import Results
from hf_fusion.evaluation.routing import HINDSIGHT, ORACLE, STRATEGIES
from hf_fusion.families import FAMILIES
from hf_fusion.merging.methods import MERGE_METHODS

ROOT = Path(__file__).parents[2]
SECTIONS = ["Usage", "Experts", "Results", "Limits and bias", "How it was made", "Citation"]
GOLDEN = {path.stem: facts_from_json(path) for path in sorted((ROOT / "model_cards").glob("*.json"))}
UNMEASURED = {"results": None, "routing": None}


def states() -> dict[str, CardFacts]:
    """Each golden card as it is, before it was measured, and before it was pushed or named on a Hub."""
    found = {}
    for name, facts in GOLDEN.items():
        found[name] = facts
        found[f"{name}-unmeasured"] = replace(facts, **UNMEASURED)
        found[f"{name}-local"] = replace(facts, **UNMEASURED, revision=None, repo_id="fused", license="")
    return found


STATES = states()


def section(card: str, name: str) -> str:
    """The text of one section."""
    return re.split(rf"^## {name}\n", card, flags=re.MULTILINE)[1].partition("\n## ")[0]


def commands_of(card: str) -> list[str]:
    """The lines of all blocks of commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("state", STATES)
def test_sections_come_in_order(state):
    facts = STATES[state]
    card = render_card(facts)
    headings = re.findall(
        r"^(#+) (.+)$", re.sub(r"^```.*?^```", "", card, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    assert headings == [("#", facts.name), *(("##", name) for name in SECTIONS)]
    about = card.partition(f"# {facts.name}\n\n")[2].partition("\n\n## Usage")[0]
    assert about.startswith("This is one ") and "\n" not in about
    assert len(re.findall(r"\.(?: |$)", about)) == 2  # what it is, and for whom
    assert "*experts*" in about
    assert all(section(card, name).strip() for name in SECTIONS)
    assert "\n\n\n" not in card and "None" not in card


@pytest.mark.parametrize("state", STATES)
def test_a_card_pins_what_it_can(state):
    facts = STATES[state]
    card = render_card(facts)
    usage = section(card, "Usage")
    assert pinned_revision(card) == facts.revision
    assert ("`revision` names the commit that holds these weights" in usage) == bool(facts.revision)
    assert ("`main` is the newest version" in usage) == (facts.revision is None)
    if facts.family == MERGE:
        assert "**No code of this repo runs.** transformers has all that this model needs" in usage
        assert "trust_remote_code" not in usage_code(card)
    else:
        assert "**What `trust_remote_code=True` does.**" in usage and "`code_revision=" in usage
        where = f"(/{facts.repo_id}/tree/{facts.revision})"
        assert (where in usage) == bool(facts.revision)
    for expert in facts.experts:
        row = next(line for line in section(card, "Experts").splitlines() if f"[{expert.id}]" in line)
        assert f"(/{expert.id}/tree/{expert.sha})" in row
        assert f"| {expert.task} | {expert.license} |" in row


@pytest.mark.parametrize("name", GOLDEN)
def test_results_show_the_base_and_the_best_expert_beside_the_model(name):
    facts = GOLDEN[name]
    rows = result_tables(facts).rows
    results = facts.measured
    assert rows[0].is_model and rows[0].about == "this model"
    best = next(row for row in rows if "best single expert" in (row.name, row.about.removeprefix("the ")))
    experts = {p.name for p in results.predictors if p.kind == "expert"}
    assert (best.name in experts) if experts else best.cells == ("not measured",)
    assert any(row.name == "base" for row in rows) == bool(facts.base)
    text = section(render_card(facts), "Results")
    assert f"Measured on {sum(task.n for task in results.tasks):,} " in text and "95 % interval" in text
    assert f"Measured by `{results.command}`" in text
    assert "Not measured" not in text and "has not been tested" not in render_card(facts)


@pytest.mark.parametrize("name", GOLDEN)
def test_an_unmeasured_card_claims_nothing(name):
    facts = replace(GOLDEN[name], **UNMEASURED)
    card = render_card(facts)
    assert section(card, "Results").strip().startswith("Not measured: neither this model nor its experts")
    assert "It has not been tested at all: not for quality, bias or safety." in section(card, "Limits and bias")
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert "this model |" not in card and "95 %" not in card and "![" not in card
    assert f"hf-fusion eval {facts.name} --data ROWS.parquet" in commands_of(card)
    assert all(f"`{column}`" in section(card, "Results") for column in measured_columns(facts))


def test_a_base_that_was_not_measured_is_said_so():
    facts = GOLDEN["phatgoose"]
    results = facts.measured
    some = replace(results, predictors=[p for p in results.predictors if p.kind == "fused"])
    card = render_card(replace(facts, results=json.loads(json.dumps(some, default=vars))))
    text = section(card, "Results")
    assert "| best single expert: one expert for all tasks | not measured |" in text
    assert "| base: the model that the experts were trained from | not measured |" in text
    assert "| task | n | this model |" in text


def test_an_unfitted_model_says_so():
    foe, wemoe = GOLDEN["foe"], GOLDEN["wemoe"]
    card = render_card(replace(foe, options={**foe.options, "fitted": False, "frugal": None}, **UNMEASURED))
    assert "**Its fuser has not been trained yet**" in card and "fit fuser foe" not in card
    card = render_card(replace(wemoe, options={**wemoe.options, "fitted": False, "adaptation": None}, **UNMEASURED))
    assert "**Its routers have not been trained yet**" in card and "fit routers wemoe" not in card


@pytest.mark.parametrize("state", STATES)
def test_every_command_parses(state):
    facts = STATES[state]
    lines = commands_of(render_card(facts))
    assert [line.split()[0] for line in lines if line.startswith("pip")] == ["pip"]
    for words in map(shlex.split, lines):
        if words[0] == "hf-fusion":
            assert build_parser(words[1]).parse_args(words[1:]).command == words[1]
        elif words[0] == "hf":
            assert words[1:3] == ["download", facts.repo_id]
            assert ("--revision" in words) == bool(facts.revision)
    assert any(words.startswith("hf download") for words in lines) == ("/" in facts.repo_id)


@pytest.mark.parametrize("name", GOLDEN)
def test_nothing_hostile_in_an_expert_breaks_a_card(name):
    facts = GOLDEN[name]
    clean = Tags(html_of(render_card(facts)))
    nasty = f'{NASTY}")) $(rm) ](x) \u202e'
    first = replace(facts.experts[0], id=nasty, sha=nasty, license=nasty, labels=(nasty,) * 9, task=nasty, rank=nasty)
    changed = replace(facts, experts=(first, *facts.experts[1:]), base=facts.base and nasty, pipeline_tag=nasty)
    card = render_card(changed)
    found = Tags(html_of(card))
    assert set(found.names) <= set(clean.names)
    assert found.names.count("table") == clean.names.count("table")
    assert found.names.count("h1") == 1 and found.names.count("h2") == len(SECTIONS)
    assert not [link for link in found.links if not re.fullmatch(r"(/|https://)[\w./%:~-]*|\w+\.png", link)]
    compile(usage_code(card), "usage", "exec")
    assert ModelCard(card).data.tags == ModelCard(render_card(facts)).data.tags
    assert commands_of(card) == commands_of(render_card(facts))


@pytest.mark.parametrize("name", GOLDEN)
def test_metadata_is_what_discovery_reads(name):
    facts = GOLDEN[name]
    card = ModelCard(render_card(facts))
    card.data.to_dict()
    method = yaml.safe_load(facts.recipe)["method"]
    assert card.data.tags == ["hf-fusion", "merge", method]
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.pipeline_tag == facts.pipeline_tag
    named = [expert.id for expert in facts.experts] + ([facts.base.partition("@")[0]] if facts.base else [])
    assert card.data.base_model == named
    assert card.data.to_dict()["base_model_relation"] == "merge"
    fused = [p for p in facts.measured.predictors if p.kind in ("fused", "frugal")]
    assert len(card.data.eval_results) == sum(len(p.scores) for p in fused)


def test_each_method_is_described_and_cited():
    assert set(PLAIN) == set(MERGE_METHODS)
    for name, method in MERGE_METHODS.items():
        assert PLAIN[name].endswith(".") and "θ" not in PLAIN[name]
        entry = bibtex(method.url or "", method.title)
        assert bool(entry) == bool(method.url)
        assert (method.url or "") in entry
    options = {"rule": None, "routing": "phatgoose"}
    assert {card_contents(name).paper(options)[0] for name in FAMILIES} <= set(PAPERS)
    for url in [*PAPERS, "https://example.org/a-page"]:
        entry = bibtex(url, "A Page")
        assert entry.startswith("@") and entry.count("{") == entry.count("}")
    assert "version" in software("1.0") and "version" not in software()
    keys = [paper.key for paper in PAPERS.values()]
    assert len(set(keys)) == len(keys)


def test_papers_are_cited_as_the_documentation_does():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    for address in ("2310.01542", "2402.05859", "2402.00433", "2406.03280"):
        paper = PAPERS[f"https://arxiv.org/abs/{address}"]
        assert f"{{{paper.key}," in page
        assert paper.title.replace("{", "").replace("}", "") in page


def test_predictors_are_explained():
    assert {*STRATEGIES, ORACLE, HINDSIGHT} - {"PHATGOOSE"} <= set(EXPLAINED)
    for facts in GOLDEN.values():
        told = [p.name for p in facts.measured.predictors if p.kind not in ("fused", "frugal", "expert")]
        assert set(told) <= set(EXPLAINED)


def test_what_to_install_is_what_is_imported():
    assert Commands(GOLDEN["foe"]).install == f"pip install torch '{TRANSFORMERS}' pillow"
    assert Commands(GOLDEN["merge"]).install == "pip install torch transformers"
    assert f'"{TRANSFORMERS}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    adapter = replace(GOLDEN["merge"], options={**GOLDEN["merge"].options, "adapter": True})
    assert "from peft import" in usage_block(adapter) and Commands(adapter).install.endswith(" transformers peft")


@pytest.mark.parametrize("name", GOLDEN)
def test_scores_of_the_harness_are_on_every_card(name):
    scores = [
        HarnessScore(predictor, kind, "arc_easy", "acc", 0.5, 0.05, 100, shots=2, dataset="allenai/ai2_arc")
        for predictor, kind in (("merged", "fused"), (NASTY, "expert"))
    ]
    part = replace(scores[0], task="a part", part_of="arc_easy")
    run = HarnessRun([*scores, part], {"lm_eval": "0.4.13"}, f"hf-fusion eval {NASTY}", NASTY)
    alone = replace(GOLDEN[name], results=asdict(Results([], [], harness=[run])), routing=None)
    assert CardFacts.from_dict(json.loads(json.dumps(asdict(alone)))).measured == alone.measured
    card = render_card(alone)
    assert "| arc_easy | acc | 2 | 100 | 0.5000 ± 0.0500 | 0.5000 ± 0.0500 |" in card
    assert "a part" not in card and "Not measured" not in card and "It was tested on the rows above" in card
    assert "script" not in Tags(html_of(card)).names
    [row] = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert (row["dataset"]["type"], row["metrics"][0]["args"]) == ("allenai/ai2_arc", {"stderr": 0.05})
    both = render_card(replace(alone, results=asdict(replace(GOLDEN[name].measured, harness=[run]))))
    assert "| arc_easy | acc |" in both and result_tables(GOLDEN[name]).rows[0].cells[0] in both
