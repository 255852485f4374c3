"""The card of static merges: methods, parameters, results, and escaping of untrusted text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rendered import NASTY, Tags, html_of

from hf_fusion.cards.card import render_card
from hf_fusion.cards.facts import facts_from_json, read_facts
from hf_fusion.cards.static_merge import merge_options, pipeline_tag
from hf_fusion.cards.usage import usage_code
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.types import ExpertInfo

FACTS = facts_from_json(Path(__file__).parents[2] / "model_cards" / "merge.json")
SHA = "a" * 40


def saved(folder: Path, recipe: Recipe, config: dict | None = None) -> Path:
    """A merge's folder as far as cards read it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["BertModel"], "model_type": "bert"}))
    recipe.save(folder / "fusion.yaml")
    return folder


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_card_names_each_method_with_its_parameters(method, tmp_path):
    row = MERGE_METHODS[method]
    recipe = Recipe(method, (RecipeExpert(f"a/one@{SHA}"), RecipeExpert(f"a/two@{SHA}")))
    infos = [ExpertInfo(f"a/{name}", SHA, license="mit") for name in ("one", "two")]
    card = render_card(read_facts(saved(tmp_path, recipe), "me/merged", infos, "mit"))
    assert f"({row.title}). It is for anyone who wants" in card
    assert not row.url or f"The method is called [{row.title}]({row.url}); as a formula: " in card
    for name, parameter in row.parameters.items():
        value = parameter.default if isinstance(parameter.default, str) else json.dumps(parameter.default)
        assert f"| {name} | {value} | default |" in card
    compile(usage_code(card), "usage", "exec")


def test_per_expert_parameters_are_listed_beside_the_expert(tmp_path):
    experts = (
        RecipeExpert(f"a/one@{SHA}", 1.0, {"density": [0.2, 0.4]}),
        RecipeExpert(f"a/two@{SHA}", 1.0, {"density": [{"filter": "mlp", "value": 0.9}, {"value": 0.1}]}),
    )
    recipe = Recipe("ties", experts, f"a/base@{SHA}", {"scaling": 0.5, "mismatch": "base"})
    options = merge_options({}, saved(tmp_path, recipe))
    given = {row["name"]: row["value"] for row in options["parameters"] if row["given"]}
    assert given == {"weight": "1.0", "scaling": "0.5", "mismatch": "base"}  # the weight is one for all
    assert "density" not in {row["name"] for row in options["parameters"]}
    assert [own["density"] for own in options["settings"]] == [
        "[0.2, 0.4]",
        '[{"filter": "mlp", "value": 0.9}, {"value": 0.1}]',
    ]


def test_card_loads_sentence_transformers_by_their_library(tmp_path):
    recipe = Recipe("linear", (RecipeExpert(f"a/one@{SHA}"), RecipeExpert(f"a/two@{SHA}")))
    folder = saved(tmp_path, recipe)
    (folder / "modules.json").write_text("[]")
    infos = [ExpertInfo(f"a/{name}", SHA, license="mit") for name in ("one", "two")]
    card = render_card(read_facts(folder, "me/merged", infos, "mit"))
    assert "library_name: sentence-transformers" in card
    compile(usage_code(card), "usage", "exec")
    assert "SentenceTransformer(repo, revision=revision)" in usage_code(card)


def test_the_task_is_that_of_the_experts_where_the_head_has_it():
    def info(task):
        return ExpertInfo("a/b", SHA, task=task)

    for architecture, tasks, wanted in [
        ("BartForConditionalGeneration", ["summarization"] * 2, "summarization"),
        ("BartForConditionalGeneration", ["summarization", "translation"], "text2text-generation"),
        ("BertForSequenceClassification", ["fill-mask"], "text-classification"),
        ("CLIPModel", ["zero-shot-image-classification"], "zero-shot-image-classification"),
        ("BertForMaskedLM", ["fill-mask"], "fill-mask"),
        ("BertForMaskedLM", [None], "feature-extraction"),
    ]:
        assert pipeline_tag({"architectures": [architecture]}, list(map(info, tasks))) == wanted


def test_text_from_strangers_stays_text():
    clean = Tags(html_of(render_card(FACTS)))
    assert {"table", "td", "a", "code"} <= set(clean.names)
    nasty = [{**row, "name": NASTY, "value": NASTY} for row in FACTS.options["parameters"]]
    results = {**FACTS.results, "command": NASTY, "machine": NASTY}
    results["tasks"] = [{**task, "name": f"{NASTY}{i}", "owner": NASTY} for i, task in enumerate(results["tasks"])]
    key = "systems" if "systems" in results else "predictors"
    results[key] = [
        {**system, "name": NASTY, "scores": {f"{NASTY}{i}": s for i, s in enumerate(system["scores"].values())}}
        for system in results[key]
    ]
    options = {**FACTS.options, "parameters": nasty, "class": NASTY, "dtype": NASTY}
    experts = tuple(replace(expert, task=NASTY, license=NASTY) for expert in FACTS.experts)
    card = render_card(replace(FACTS, experts=experts, results=results, options=options, license=NASTY, recipe=NASTY))
    found = Tags(html_of(card))
    assert set(found.names) <= set(clean.names)
    assert found.names.count("td") == clean.names.count("td")
    assert found.names.count("h1") == 1
    assert found.links == clean.links
