"""Model cards: their content, preserved hand-written text, and escaping of text from the Hub."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from rendered import AUTO_CLASSES, NASTY, Tags, html_of

from hf_fusion.cards.card import BEGIN, END, render_card
from hf_fusion.cards.facts import CardExpert, CardFacts, facts_from_json
from hf_fusion.cards.static_merge import MERGE
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.errors import FusionError
from hf_fusion.families import FAMILIES

CARDS = Path(__file__).parents[2] / "model_cards"
FACTS = CardFacts(
    repo_id="me/fused",
    family="foe",
    auto_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    license="apache-2.0",
    experts=(
        CardExpert("a/one", "1" * 40, "text-classification", "mit", ("no", "yes"), 0.25),
        CardExpert("a/two", "2" * 40, None, None, (), 0.75),
    ),
    recipe="method: foe\n",
    base=f"a/base@{'b' * 40}",
    revision="c" * 40,
    results={
        "dataset": {"name": "Moods", "type": "me/moods", "split": "test"},
        "n": 1234,
        "metric": "accuracy",
        "systems": [
            {"name": "FoE", "kind": "foe", "score": 0.971, "ci95": [0.961, 0.981], "cost": 1.0},
            {"name": "a/one", "kind": "expert", "score": 0.5, "ci95": [0.47, 0.53], "cost": 0.25},
        ],
        "command": "hf-fusion eval fused --data moods.parquet",
        "machine": "2 cores",
    },
    parameters=22_700_000,
    options={"mode": "output", "features_from": None, "frugal": None},
)


def test_metadata_is_valid_for_the_hub():
    data = ModelCard(render_card(FACTS)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-classification")
    assert data.tags == ["hf-fusion", "merge", "foe"]
    assert data.base_model == ["a/one", "a/two", "a/base"]
    assert data.to_dict()["base_model_relation"] == "merge"
    (result,) = data.eval_results  # only what this model itself scored
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.971, "test")
    assert result.dataset_args == {"n": 1234}
    assert "model-index" not in ModelCard(render_card(replace(FACTS, results=None))).data.to_dict()


def test_card_shows_measurements_and_experts():
    card = render_card(FACTS)
    assert "| **FoE**: this model | 97.1\u00a0(96.1–\u206098.1) | 100\u00a0% |" in card
    assert "| a/one: the best single expert | 50.0\u00a0(47.0–\u206053.0) | 25\u00a0% |" in card
    assert "Measured on 1,234 rows of Moods (test). Scores are accuracy (the share of right classes), in %" in card
    assert (
        f"| [a/one](/a/one) | [1111111](/a/one/tree/{'1' * 40}) | text-classification | mit | no, yes | 25\u00a0% |"
        in card
    )
    assert pinned_revision(card) == "c" * 40
    assert pinned_revision(render_card(replace(FACTS, revision=None))) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"mode": "output", "features_from": None, "frugal": {"neighbors": 10}},
            "looks up the 10 validation examples with the most similar answers",
        ),
        ({"mode": "selection", "features_from": None, "frugal": None}, "Each expert turns the input into an embedding"),
        (
            {"mode": "selection", "features_from": 1, "frugal": None},
            r"One expert \(a/two\) turns the input into an embedding",
        ),
    ],
)
def test_says_how_it_works(options, said):
    assert re.search(said, render_card(replace(FACTS, options=options)))


@pytest.mark.parametrize("auto_class", AUTO_CLASSES[:4])
def test_usage_is_python(auto_class):
    code = usage_code(render_card(replace(FACTS, auto_class=auto_class)))
    compile(code, "usage", "exec")
    assert f'revision = "me/fused", "{"c" * 40}"' in code


def test_text_from_strangers_stays_text():
    clean = Tags(html_of(render_card(FACTS)))
    results = {
        **FACTS.results,
        "dataset": {"name": NASTY, "type": NASTY, "split": NASTY},
        "command": NASTY,
        "machine": NASTY,
        "systems": [{**system, "name": NASTY} for system in FACTS.results["systems"]],
    }
    experts = tuple(replace(expert, task=NASTY, license=NASTY, labels=(NASTY, "yes")) for expert in FACTS.experts)
    versions = {"hf_fusion": NASTY, "transformers": NASTY}
    changed = {"results": results, "license": NASTY, "recipe": f"x: '```'\n# {NASTY}\n", "versions": versions}
    card = render_card(replace(FACTS, experts=experts, code=("modeling_foe.py", NASTY), **changed))
    found = Tags(html_of(card))
    assert set(found.names) <= set(clean.names)
    assert found.names.count("td") == clean.names.count("td")
    assert found.names.count("h1") == 1
    assert found.links == clean.links
    assert ModelCard(card).data.license == NASTY  # YAML holds it as a string, and nothing more
    assert ModelCard(card).data.tags == ["hf-fusion", "merge", "foe"]


def test_hand_written_text_and_metadata_survive():
    written = f"""---
language: de
license: mit
tags: [mine, merge]
widget:
- text: "a: b"
---
# My model

Before.

{BEGIN}
old text of ours
{END}

After, with {BEGIN} in a sentence.
"""
    card = render_card(FACTS, written)
    data = ModelCard(card).data.to_dict()
    assert (data["language"], data["widget"], data["license"]) == ("de", [{"text": "a: b"}], "apache-2.0")
    assert data["tags"] == ["hf-fusion", "merge", "foe", "mine"]
    body = ModelCard(card).text
    assert body.startswith("# My model\n\nBefore.\n\n" + BEGIN)
    assert body.rstrip().endswith(f"{END}\n\nAfter, with {BEGIN} in a sentence.")
    assert "old text of ours" not in card
    assert render_card(FACTS, card) == card


def test_a_card_without_markers_keeps_its_text():
    card = render_card(FACTS, "All by hand.")
    assert card.rstrip().endswith(f"{END}\n\nAll by hand.")
    assert render_card(FACTS, card) == card


def test_results_of_an_earlier_card_are_removed():
    card = render_card(FACTS)
    assert "model-index" not in ModelCard(render_card(replace(FACTS, results=None), card)).data.to_dict()
    by_hand = "---\nmodel-index: [{name: x, results: []}]\n---\nhand"
    assert yaml.safe_load(render_card(replace(FACTS, results=None), by_hand).split("---")[1])["model-index"]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (f"{BEGIN}\nno end", "1 begin and 0 end markers"),
        (f"{END}\n{BEGIN}", "1 begin and 1 end markers"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}", "2 begin and 2 end markers"),
        ("---\ntags: [\n---\ntext", "not valid YAML"),
        ("---\n- a\n---\ntext", "not a mapping"),
    ],
)
def test_broken_cards_are_not_guessed_at(written, reason):
    with pytest.raises(FusionError, match=reason):
        render_card(FACTS, written)


def test_unknown_families_are_named():
    with pytest.raises(FusionError, match="no card template for the model_type 'bert'"):
        render_card(replace(FACTS, family="bert"))


@pytest.mark.parametrize("golden", sorted(CARDS.glob("*.json")), ids=lambda path: path.stem)
def test_golden_cards(golden):
    """Rendered by ``python model_cards/render.py``."""
    assert render_card(facts_from_json(golden)) == golden.with_suffix(".md").read_text(encoding="utf-8")


def test_there_is_a_golden_card_per_family():
    own = {path.stem for path in CARDS.glob("*.json")}
    assert own | {"wemoe"} == {*FAMILIES, MERGE}  # WEMoE's is what its demo publishes
