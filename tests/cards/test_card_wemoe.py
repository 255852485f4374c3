"""WEMoE's card: experts, storage, routers, measurements, and a usage block that runs."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from models.test_wemoe_experts import different_labels
from rendered import AUTO_CLASSES, NASTY, Tags, html_of
from tiny import bert, gpt2, image_processor, make_tokenizer, t5, vit
from tiny_fused import base_expert, clip, clip_vision, experts_of

from hf_fusion import ExpertInfo, WEMoEModel
from hf_fusion.cards.card import render_card
from hf_fusion.cards.contents import STORAGE
from hf_fusion.cards.facts import CardExpert, CardFacts, read_facts
from hf_fusion.cards.usage import usage_code
from hf_fusion.evaluation.coefficient_map import COEFFICIENT_FILE, CoefficientMap
from hf_fusion.fusion import save_fused
from hf_fusion.models.configuration_wemoe import TASK_VECTORS
from hf_fusion.recipe import Recipe, RecipeExpert

TASKS = ("moods", "topics")


def score(value):
    return {"score": value, "ci95": [value - 0.1, value + 0.1]}


def system(name, kind, *scores):
    return {
        "name": name,
        "kind": kind,
        "scores": {task: score(value) for task, value in zip(TASKS, scores, strict=True)},
        "means": {"held-in": score(sum(scores) / 2)},
        "lead": {},
    }


ADAPTATION = {
    "loss": "entropy",
    "diversity": 1.0,
    "steps": 1000,
    "rows": {"me/moods": 700, "me/topics": 800},
    "stopped": None,
    "learning_rate": 0.001,
    "batch_size": 16,
}
FACTS = CardFacts(
    repo_id="me/fused",
    family="wemoe",
    auto_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    license="apache-2.0",
    experts=(
        CardExpert("me/moods", "1" * 40, "text-classification", "mit", ("bad", "good")),
        CardExpert("me/topics", "2" * 40, "text-classification", "apache-2.0", ("art", "law", "sport")),
    ),
    recipe="method: wemoe\n",
    base=f"me/base@{'b' * 40}",
    revision="c" * 40,
    results={
        "tasks": [{"name": task, "metric": "accuracy", "n": 90, "owner": f"me/{task}"} for task in TASKS],
        "systems": [
            system("base", "base", 0.2, 0.3),
            system("WEMoE", "router", 0.8, 0.7),
            system("task arithmetic", "baseline", 0.6, 0.5),
            system("me/moods", "expert", 0.85, 0.3),
            system("me/topics", "expert", 0.3, 0.75),
            system("oracle", "oracle", 0.85, 0.75),
        ],
        "command": "hf-fusion eval fused --data rows.parquet",
        "machine": "2 cores",
    },
    parameters=1_234_567,
    options={
        "head": "sequence-classification",
        "routing": "wemoe",
        "router_layers": 2,
        "shared_router": False,
        "batch_reduce": False,
        "scaling": 0.3,
        "merge": "task_arithmetic",
        "adaptation": ADAPTATION,
        "parameters": 1_234_567,
        "upscaled_linears": 12,
        "upscaled_parameters": 300_000,
        "merged_parameters": 200_000,
        "head_parameters": 34_000,
        "router_parameters": 567,
        "units": 6,
        "stored_bytes": 4_200_000,
        "merges": True,
        "storage": STORAGE["exact"],
        "top_k": 1,
        "default_task": "me/moods",
        "task_heads": True,
        "adapters": 0,
        "reads": "texts",
    },
    routing={
        "experts": ["me/moods", "me/topics"],
        "layers": ["l.0", "l.1"],
        "tasks": list(TASKS),
        "coefficients": [[[0.5, 0.1], [0.7, 0.1]], [[0.25, 0.4], [0.25, 0.5]]],
        "n": [40, 50],
        "owners": {"moods": "me/moods", "topics": "me/topics"},
        "scaling": 0.3,
        "example": "what a day",
    },
)


def with_options(**options):
    return render_card(replace(FACTS, options={**FACTS.options, **options}))


def test_card_shows_experts_and_measurements():
    card = render_card(FACTS)
    assert "| [me/topics](/me/topics) | [2222222](/me/topics/tree/" in card
    assert "| text-classification | apache-2.0 | art, law, sport |" in card
    assert "All of them were trained from [me/base](/me/base) ([bbbbbbb](/me/base/tree/" in card
    assert (
        "| 12 linear layers in 6 blocks | 300,000 | the base's weights; merged with the task vectors per input |"
        in card
    )
    assert "| their task vectors | 700,000 | stored in the model's own precision |" in card
    assert (
        "| everything else | 200,000 | merged once, by task arithmetic: the base plus 0.3 times each task vector |"
        in card
    )
    assert (
        "| heads | 34,000 | one for each expert, unchanged |\n| routers | 567 | two linear layers in each block |"
        in card
    )
    assert "| **WEMoE**: this model | 75.0\u00a0(65.0–\u206085.0) |" in card
    assert "| task | n | this model | its own expert | best single expert | base |" in card
    assert (
        "![Coefficients by layer, one panel per task. The expert with the largest mean on "
        "moods: moods 0.60; topics: topics 0.45](coefficients.png)" in card
    )
    assert "layer by layer, on 90 rows; they are not told the task, and dashed is the 0.3 that merging once" in card
    data = ModelCard(card).data
    assert data.base_model == ["me/moods", "me/topics", "me/base"]
    assert {entry.dataset_name: entry.metric_value for entry in data.eval_results} == {"moods": 0.8, "topics": 0.7}


def test_card_without_measurements_has_no_plot():
    card = render_card(replace(FACTS, results=None, routing=None))
    assert "Not measured: neither" in card
    assert "coefficients.png" not in card
    assert 'example = "An example sentence."' in card


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"adaptation": None},
            "as if merged once by task arithmetic, where every expert counts 0.3 for any input, until `hf-fusion fit",
        ),
        ({"adaptation": {**ADAPTATION, "loss": "labels"}}, "routers were trained on the labels of 1,500 rows"),
        ({"adaptation": {**ADAPTATION, "stopped": "moods narrowed"}}, "Training was stopped early: moods narrowed."),
        (
            {"adaptation": {**ADAPTATION, "diversity": 0}},
            "so that predictions become certain (by their mean entropy), on 1,500 rows",
        ),
        (
            {"adaptation": {**ADAPTATION, "loss": "expert"}},
            "(by the mean Kullback-Leibler divergence from its predictions), on 1,500 rows",
        ),
        (
            {"router_layers": 0},
            "Each block has one number for each expert, its *coefficient*, the same for every input.",
        ),
        ({"shared_router": True}, "two linear layers, one router shared by all blocks |"),
        ({"batch_reduce": True}, "depends on the rest of the batch"),
        ({"task_heads": False}, "the model is not told which task a row belongs to"),
        ({"merge": "iso_c", "scaling": 1.0}, "merged once, by iso c |"),
        ({"merge": "ties", "scaling": 0.5}, "merged once, by ties with λ = 0.5 |"),
        ({"adapters": 2}, "), 2 as LoRA adapters."),
        ({"routing": "smile", "top_k": 2}, "A token is sent to the 2 experts whose leading directions"),
        ({"merges": False}, "in these layers a token costs the low-rank products in addition"),
        ({"head": "causal-lm"}, "the weights merged for a prompt are kept for its continuation"),
    ],
)
def test_says_how_it_works(options, said):
    assert said in with_options(**options)
    assert said not in render_card(FACTS)


def test_says_how_routers_were_adapted():
    assert (
        "while classes stay varied (minus 1 times the entropy of the mean prediction), on 1,500 rows of 2 tasks: "
        "1,000 steps of Adam at learning rate 0.001, with 16 rows of each task per step." in render_card(FACTS)
    )


def test_every_task_vector_storage_is_described():
    assert set(TASK_VECTORS) <= set(STORAGE)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_usage_is_python(auto_class):
    code = usage_code(render_card(replace(FACTS, auto_class=auto_class)))
    compile(code, "usage", "exec")
    assert f'"{FACTS.repo_id}", "{FACTS.revision}"' in code
    assert ('task = "me/moods"' in code) == ("Classification" in auto_class)


def test_text_from_strangers_stays_text():
    clean = Tags(html_of(render_card(FACTS)))
    results = {**FACTS.results, "command": NASTY, "machine": NASTY}
    results["systems"] = [row if row["name"] == "oracle" else {**row, "name": NASTY} for row in results["systems"]]
    routing = {
        **FACTS.routing,
        "example": NASTY,
        "tasks": [NASTY] * 2,
        "experts": [NASTY] * 2,
        "owners": {NASTY: NASTY},
    }
    experts = tuple(replace(e, task=NASTY, license=NASTY, labels=(NASTY, NASTY)) for e in FACTS.experts)
    options = {**FACTS.options, "default_task": NASTY, "merge": NASTY, "adaptation": {**ADAPTATION, "stopped": NASTY}}
    changed = {"results": results, "routing": routing, "experts": experts, "options": options, "license": NASTY}
    card = render_card(replace(FACTS, **changed))
    found = Tags(html_of(card))
    assert set(found.names) <= set(clean.names)
    assert found.names.count("td") == clean.names.count("td")
    assert found.links == clean.links
    compile(usage_code(card), "usage", "exec")


def merged(base, processor, labels=(), **options):
    """Three random fine-tunes of a base."""
    given = base_expert(base)
    given.processor = processor
    return WEMoEModel.from_experts(experts_of(base, labels=labels), given, **options)


def heads():
    """Three tasks of one base, each with its own classes."""
    base, experts = different_labels()
    return WEMoEModel.from_experts([replace(e, processor=make_tokenizer()) for e in experts], base)


KINDS = {
    "heads": (heads, "AutoModelForSequenceClassification", r"^\w"),
    "shared head": (
        lambda: merged(bert(["x", "y"]), make_tokenizer(), ["x", "y"], heads="shared"),
        "AutoModelForSequenceClassification",
        r"\['[xy]'\]",
    ),
    "vit": (
        lambda: merged(vit(["x", "y"]), image_processor(16), ["x", "y"], task_vectors="low-rank", rank=4),
        "AutoModelForImageClassification",
        "^[xy]$",
    ),
    "smile": (
        lambda: merged(gpt2(), make_tokenizer(), task_vectors="low-rank", energy=0.5, routing="smile"),
        "AutoModelForCausalLM",
        "An example sentence.",
    ),
    "t5": (lambda: merged(t5(), make_tokenizer(), task_vectors="sparse"), "AutoModelForSeq2SeqLM", ""),
    "clip's eye": (lambda: merged(clip_vision(), image_processor(16)), "AutoModel", r"torch.Size\(\[1, 5, 32\]\)"),
    "clip": (lambda: merged(clip(), image_processor(16)), "AutoModel", r"torch.Size\(\[1, 16\]\)"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_usage_of_every_kind_of_model_runs(kind, tmp_path, capsys):
    """As it stands, but for the place the model is loaded from; and the parts' parameters add up to all."""
    build, auto, printed = KINDS[kind]
    model = build()
    recipe = Recipe("wemoe", tuple(RecipeExpert(f"{name}@{'1' * 40}") for name in model.experts))
    folder = save_fused(model, tmp_path / "fused", recipe)
    facts = read_facts(folder, "me/fused", [ExpertInfo(name, "1" * 40, license="mit") for name in model.experts], "mit")
    assert facts.auto_class == auto
    parts = ("upscaled_parameters", "merged_parameters", "head_parameters", "router_parameters")
    vectors = facts.options["parameters"] - sum(facts.options[part] for part in parts)
    linears = [linear for unit in model.units for linear in unit.linears]
    stored = sum(p.numel() for linear in linears for n, p in linear.named_parameters() if "router" not in n)
    dense = sum(linear.base.numel() + linear.out_features * (linear.biases is not None) for linear in linears)
    assert (facts.options["upscaled_parameters"], vectors) == (dense, stored - dense)
    code = usage_code(render_card(facts))
    exec(compile(code.replace('"me/fused"', repr(str(folder))), "usage", "exec"), {})  # noqa: S102
    said = capsys.readouterr().out.splitlines()
    if kind == "clip":  # a tower alone keeps no coefficients
        assert re.search(printed, said[-1])
    else:
        assert re.search(printed, said[-2])
        assert list(ast.literal_eval(said[-1])) == model.experts


def test_card_reports_energy_and_ranks(tmp_path):
    model = merged(bert(["x", "y"]), make_tokenizer(), ["x", "y"], task_vectors="low-rank", rank=4)
    recipe = Recipe("wemoe", tuple(RecipeExpert(f"{name}@{'1' * 40}") for name in model.experts))
    folder = save_fused(model, tmp_path / "fused", recipe)
    kept = list(model.summary()["energy"].values())
    facts = read_facts(folder, "me/fused", [ExpertInfo(name, "1" * 40) for name in model.experts], "mit")
    mean, least = (f"{share:.1%}".replace("%", " %") for share in (sum(kept) / len(kept), min(kept)))
    assert facts.options["storage"] == (
        f"as products of rank 4, which keep {mean} of their squared norm ({least} at least)"
    )


def test_the_map_beside_a_model_is_read(tmp_path):
    model = heads()
    recipe = Recipe("wemoe", tuple(RecipeExpert(f"{name}@{'1' * 40}") for name in model.experts))
    folder = save_fused(model, tmp_path / "fused", recipe)
    table = [[[0.1, 0.2, 0.7]] * len(model.units)]
    last = model.experts[-1]
    CoefficientMap(model.experts, ["l"], ["t"], table, [9], {"t": last}, 0.3, "a `fox`").save(folder / COEFFICIENT_FILE)
    facts = read_facts(folder, "me/fused", [ExpertInfo(name, "1" * 40) for name in model.experts], "mit")
    code = usage_code(render_card(facts))
    assert 'example = "a `fox`"' in code and f'task = "{last}"' in code
