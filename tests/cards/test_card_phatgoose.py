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
from hf_fusion.cards.card import facts_from_json, read_facts, render_card
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.fusion import save_fused
from hf_fusion.recipe import Recipe, RecipeExpert

FACTS = facts_from_json(Path(__file__).parents[2] / "model_cards" / "phatgoose.json")


def with_options(**options):
    return render_card(replace(FACTS, options={**FACTS.options, **options}))


def test_card_shows_measurements_with_intervals():
    card = render_card(FACTS)
    router = next(system for system in FACTS.results["systems"] if system["kind"] == "router")
    mean = router["means"]["held-in"]
    low, high = (round(100 * end) for end in mean["ci95"])
    assert f"| **PHATGOOSE** | {100 * mean['score']:.1f} % ({low}–{high}) |" in card
    assert "| task | n | metric | base | PHATGOOSE | merged | its own expert |" in card
    assert {entry.dataset_name for entry in ModelCard(card).data.eval_results} == set(router["scores"])
    assert pinned_revision(card) == FACTS.revision
    assert f"`{FACTS.results['command']}` on {FACTS.results['machine']}".replace("+", "+") in card
    assert "Not measured." in render_card(replace(FACTS, results=None))


def test_held_out_tasks_have_a_separate_table():
    results = json.loads(json.dumps(FACTS.results))
    task = results["tasks"][0]
    task["owner"], task["metric"] = None, "tokens"
    for system in results["systems"]:
        system["means"]["held-out"] = {"score": 0.123, "ci95": [0.1, 0.15]}
    card = render_card(replace(FACTS, results=results))
    assert f"Mean over 1 held-out tasks ({task['n']} examples), which no expert was trained on:" in card
    assert "| **PHATGOOSE** | 12.3 % (10–15) |" in card
    assert f"| {task['name']} | {task['n']} | tokens |" in card
    names = {entry.dataset_name: entry.metric_type for entry in ModelCard(card).data.eval_results}
    assert names[task["name"]] == "token_accuracy"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routing": "arrow"}, "absolute values of the input's dot products"),
        ({"routing": "uniform"}, "drawn at random"),
        ({"router_temperature": 0.5}, "softmax of these scores at temperature 0.5;"),
        ({"num_experts_per_tok": 1}, "every token is routed to the 1 of them"),
        ({"base_by_reference": False}, "of them in experts and gates. At the linears"),
    ],
)
def test_says_how_it_works(options, said):
    assert said in with_options(**options)
    assert said not in render_card(FACTS)


def test_card_shows_gate_kinds_and_labels():
    kinds = ("arrow", "average", "trained")
    experts = tuple(
        replace(expert, gates=kind, labels=("no", "yes")) for expert, kind in zip(FACTS.experts, kinds, strict=False)
    )
    card = render_card(replace(FACTS, experts=experts))
    for said in ("Arrow gates are", "Average gates are", "Trained gates were"):
        assert said in card
    assert "| no, yes | arrow |" in card
    assert "| labels |" not in render_card(FACTS)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_usage_is_python(auto_class):
    code = usage_code(render_card(replace(FACTS, auto_class=auto_class)))
    compile(code, "usage", "exec")
    assert f'"{FACTS.repo_id}", "{FACTS.revision}"' in code


def test_text_from_strangers_stays_text():
    clean = Tags(html_of(render_card(FACTS)))
    results = json.loads(json.dumps(FACTS.results))
    for system in results["systems"]:
        system["name"] = NASTY
    routing = {**FACTS.routing, "example": NASTY, "tasks": [NASTY for _ in FACTS.routing["tasks"]]}
    routing["experts"] = [NASTY for _ in routing["experts"]]
    experts = tuple(replace(expert, task=NASTY, license=NASTY, gates=NASTY) for expert in FACTS.experts)
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
