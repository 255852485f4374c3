"""PHATGOOSE's card: routing, measurements, bases, and escaping of text from the Hub."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from models.test_phatgoose_bases import clip, clip_vision
from rendered import AUTO_CLASSES, NASTY, Tags, html_of
from tiny import adapter, bert, image_processor, make_tokenizer, t5, vit

from hf_fusion import Expert, ExpertInfo, Gates, PhatgooseRouter
from hf_fusion.cards.card import render_card
from hf_fusion.cards.facts import facts_from_json, read_facts
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.fusion import save_fused
from hf_fusion.recipe import Recipe, RecipeExpert

FACTS = facts_from_json(Path(__file__).parents[2] / "model_cards" / "phatgoose.json")


def with_options(**options):
    return render_card(replace(FACTS, options={**FACTS.options, **options}))


def test_card_shows_measurements_with_intervals():
    card = render_card(FACTS)
    router = FACTS.measured["PHATGOOSE"]
    mean = router.means["held-in"]
    low, high = (100 * end for end in mean.ci95)
    assert f"| **PHATGOOSE**: this model | {100 * mean.score:.1f}\u00a0({low:.1f}–\u2060{high:.1f}) |" in card
    assert "| task | n | this model | its own expert | best single expert | base |" in card
    assert {entry.dataset_name for entry in ModelCard(card).data.eval_results} == set(router.scores)
    assert pinned_revision(card) == FACTS.revision
    assert f"`{FACTS.results['command']}` on {FACTS.results['machine']}".replace("+", "+") in card


def test_held_out_tasks_have_a_separate_table():
    results = json.loads(json.dumps(FACTS.results))
    task = results["tasks"][0]
    task["owner"], task["metric"] = None, "tokens"
    for system in results.get("systems") or results["predictors"]:
        system["means"]["held-out"] = {"score": 0.123, "ci95": [0.1, 0.15]}
    card = render_card(replace(FACTS, results=results))
    assert (
        f"| model | mean of 4 tasks of the experts, n\u00a0=\u00a0160 | {task['name']}, n\u00a0=\u00a0{task['n']} |"
        in card
    )
    assert "| 12.3\u00a0(10.0–\u206015.0) |" in next(line for line in card.splitlines() if "**PHATGOOSE**" in line)
    assert f"| {task['name']} | {task['n']} | tokens |" in card
    names = {entry.dataset_name: entry.metric_type for entry in ModelCard(card).data.eval_results}
    assert names[task["name"]] == "token_accuracy"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routing": "arrow"}, "the absolute value of the dot product"),
        ({"routing": "uniform"}, "its scores are drawn at random"),
        ({"router_temperature": 0.5}, "softmax of these scores at temperature 0.5."),
        ({"num_experts_per_tok": 1}, "every token is sent to the one that suits it best"),
        ({"base_by_reference": False}, "of them in experts and gates (14.0 MB of weights)."),
    ],
)
def test_says_how_it_works(options, said):
    assert said in with_options(**options)
    assert said not in render_card(FACTS)


def test_card_shows_gate_kinds_and_labels():
    kinds = ("arrow", "average", "trained", "gaussian")
    experts = tuple(
        replace(expert, gates=kind, labels=("no", "yes")) for expert, kind in zip(FACTS.experts, kinds, strict=False)
    )
    card = render_card(replace(FACTS, experts=experts))
    for said in ("Arrow gates are", "Average gates are", "Trained gates were", "Gaussian gates are"):
        assert said in card
    assert "| no, yes | 8 | arrow |" in card
    assert "| labels |" not in render_card(FACTS)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_usage_is_python(auto_class):
    code = usage_code(render_card(replace(FACTS, auto_class=auto_class)))
    compile(code, "usage", "exec")
    assert f'"{FACTS.repo_id}", "{FACTS.revision}"' in code


def test_text_from_strangers_stays_text():
    clean = Tags(html_of(render_card(FACTS)))
    results = json.loads(json.dumps(FACTS.results))
    for system in results.get("systems") or results["predictors"]:
        system["name"] = "oracle" if system["name"] == "oracle" else NASTY
    routing = {**FACTS.routing, "example": NASTY, "tasks": [NASTY for _ in FACTS.routing["tasks"]]}
    routing["experts"] = [NASTY for _ in routing["experts"]]
    experts = tuple(replace(expert, task=NASTY, license=NASTY, gates=NASTY, rank=NASTY) for expert in FACTS.experts)
    changed = {"results": {**results, "command": NASTY, "machine": NASTY}, "routing": routing, "experts": experts}
    card = render_card(replace(FACTS, **changed, license=NASTY))
    found = Tags(html_of(card))
    assert set(found.names) <= set(clean.names)
    assert found.names.count("td") == clean.names.count("td")
    assert found.links == clean.links
    compile(usage_code(card), "usage", "exec")


def test_hand_written_text_survives():
    card = render_card(FACTS, "---\nlanguage: de\n---\nAll by hand.")
    assert card.rstrip().endswith("All by hand.")
    assert ModelCard(card).data.to_dict()["language"] == "de"
    assert render_card(FACTS, card) == card


def routed(base, processor, classes=None, targets=("q_proj", "v_proj", "query", "value", ".q", ".v")):
    """A router of two random adapters of a base."""
    experts = []
    for seed, name in enumerate(["me/one", "me/two"]):
        lora = adapter(base, 4, classes, seed, targets)
        modules = dict(base.named_modules())
        paths = [*lora.lora, *(["classifier"] if classes else [])]
        gates = Gates({path: torch.randn(modules[path].in_features) for path in paths})
        labels = [f"label {i}" for i in range(classes or 0)]
        experts.append(Expert(name, base, lora, processor, labels, gates=gates))
    return PhatgooseRouter.from_experts(experts)


@pytest.mark.parametrize(
    ("build", "auto", "printed"),
    [
        (lambda: routed(t5(), make_tokenizer()), "AutoModelForSeq2SeqLM", ""),
        (
            lambda: routed(bert(["x", "y"]), make_tokenizer(), 3),
            "AutoModelForSequenceClassification",
            r"\['label \d'\]",
        ),
        (lambda: routed(vit(["x", "y"]), image_processor(16)), "AutoModelForImageClassification", r"\['[xy]'\]"),
        (lambda: routed(clip_vision(), image_processor(16)), "AutoModel", r"torch.Size\(\[1, 5, 32\]\)"),
        (lambda: routed(clip(), make_tokenizer()), "AutoModel", r"torch.Size\(\[1, 16\]\)"),
    ],
    ids=["t5", "bert", "vit", "clip's eye", "clip"],
)
def test_the_usage_of_every_kind_of_model_runs(build, auto, printed, tmp_path, capsys):
    """As it stands, but for the place the model is loaded from."""
    model = build()
    recipe = Recipe("phatgoose", tuple(RecipeExpert(f"{name}@{'1' * 40}") for name in model.experts))
    folder = save_fused(model, tmp_path / "fused", recipe)
    infos = [ExpertInfo(name, "1" * 40, license="mit") for name in model.experts]
    facts = read_facts(folder, "me/fused", infos, "mit")
    assert (facts.auto_class, facts.options["relative_cost"]) == (auto, model.summary()["relative_cost"])
    code = usage_code(render_card(facts))
    exec(compile(code.replace('"me/fused"', repr(str(folder))), "usage", "exec"), {})  # noqa: S102
    *_, answer, usage = capsys.readouterr().out.splitlines()
    assert re.search(printed, answer)
    assert sum(ast.literal_eval(usage).values()) == pytest.approx(1)
