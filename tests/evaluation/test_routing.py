"""PHATGOOSE and its baselines on a suite: scores equal those of the plain models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq

from hf_fusion import Expert, FusionError, PhatgooseRouter, evaluate, train_gates
from hf_fusion.evaluation.intervals import Score, mean_of, wilson
from hf_fusion.evaluation.results import Results
from hf_fusion.evaluation.retrieval import Retrieval, TextEmbedder
from hf_fusion.evaluation.routing import same_start, unchanged_blocks
from hf_fusion.evaluation.scoring import lead_of
from hf_fusion.evaluation.task_metrics import score_of
from hf_fusion.hub.lora import read_adapter
from hf_fusion.training.gates import average_activation
from hf_fusion.training.prompts import encode_prompts, target_scores
from hf_fusion.types import Gates

TOKENIZER = tiny.make_tokenizer()
WORDS = ["fox", "dog", "gate", "router", "model", "expert", "stitch", "time"]
# Two tasks on the same words: what to do stands before them.
TASKS = {"the": ("name the {}", "the {}"), "nine": ("count the {}", "nine {}s")}


def rows_of(task: str, words: list[str]) -> Dataset:
    prompt, target = TASKS[task]
    return Dataset.from_dict(
        {"prompt": [prompt.format(w) + ":" for w in words], "target": [" " + target.format(w) for w in words]}
    )


def letters(texts: list[str]) -> torch.Tensor:
    """Embeds texts by their pairs of letters."""
    vectors = torch.zeros(len(texts), 2000)
    for row, text in enumerate(texts):
        for a, b in zip(text, text[1:]):
            vectors[row, (ord(a) * 31 + ord(b)) % 2000] += 1
    return vectors


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny.llama()


@pytest.fixture(scope="module")
def experts(base, tmp_path_factory) -> list[Expert]:
    """Two really trained experts with trained gates."""
    experts = []
    for seed, task in enumerate(TASKS):
        folder = tmp_path_factory.mktemp(task)
        torch.manual_seed(seed)
        # the upper block alone: the lower one runs once for all systems
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, layers_to_transform=[1])
        model = get_peft_model(tiny.llama(), config)
        batch = DataCollatorForSeq2Seq(TOKENIZER)(
            [dict(row) for row in encode_prompts(rows_of(task, WORDS), TOKENIZER)]
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(120):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
        expert = Expert(task, base, read_adapter(folder, task), TOKENIZER)
        gates = train_gates(expert, rows_of(task, WORDS), batch_size=8, use_cpu=True)
        experts.append(replace(expert, gates=gates))
    return experts


SUITE = {task: rows_of(task, WORDS) for task in TASKS} | {
    "both": Dataset.from_dict({"prompt": ["name the fox:", "count the dog:"], "target": [" the fox", " nine dogs"]})
}
TRAIN = {task: rows_of(task, WORDS) for task in TASKS}
OWNERS = {task: task for task in TASKS}


@pytest.fixture(scope="module")
def results(experts) -> Results:
    return evaluate(
        experts,
        SUITE,
        train_rows=TRAIN,
        owners=OWNERS,
        metrics={"both": "tokens"},
        embedder=letters,
        batch_size=3,
        command="make it so",
    )


def test_every_predictor_is_measured_on_every_task(results):
    names = {"base", "PHATGOOSE", "retrieval", "average activation", "Arrow", "merged", "uniform"}
    assert {predictor.name for predictor in results.predictors} == names | {
        "the",
        "nine",
        "oracle",
        "best in hindsight",
    }
    assert [(task.name, task.metric, task.n, task.owner) for task in results.tasks] == [
        ("the", "exact", 8, "the"),
        ("nine", "exact", 8, "nine"),
        ("both", "tokens", 2, None),
    ]
    for predictor in results.predictors:
        assert set(predictor.scores) == set(OWNERS if predictor.name == "oracle" else SUITE)


def test_no_single_expert_serves_both_tasks(results):
    held_in = {predictor.name: predictor.means["held-in"].score for predictor in results.predictors}
    assert held_in["oracle"] >= 0.9
    assert held_in["base"] == 0
    assert max(held_in["the"], held_in["nine"]) <= 0.6


def test_routers_are_measured_as_they_answer(results, experts):
    average = [
        replace(expert, gates=average_activation(expert, TRAIN[expert.name].shuffle(seed=0))) for expert in experts
    ]
    routers = {
        "PHATGOOSE": PhatgooseRouter.from_experts(experts),
        "Arrow": PhatgooseRouter.from_experts(experts, routing="arrow"),
        "average activation": PhatgooseRouter.from_experts(average),
    }
    seen = set()
    for name, router in routers.items():
        _, share = target_scores(router, encode_prompts(SUITE["both"], TOKENIZER), TOKENIZER)
        assert results[name].scores["both"].score == pytest.approx(float(share.mean()))
        seen.add(tuple(router(**TOKENIZER("name the fox: the", return_tensors="pt")).logits[0, -1].tolist()))
    assert len(seen) == len(routers)


@pytest.mark.parametrize("task", TASKS)
def test_single_experts_and_oracle_equal_the_plain_adapters(results, experts, task):
    for expert in experts:
        alone = tiny.llama()
        for path, (a, b) in expert.adapter.lora.items():
            alone.get_submodule(path).weight.data += b @ a
        exact, _ = target_scores(alone, encode_prompts(SUITE[task], TOKENIZER), TOKENIZER)
        assert results[expert.name].scores[task].score == pytest.approx(float(exact.float().mean()))
    assert results["oracle"].scores[task] == results[task].scores[task]


def test_the_best_in_hindsight_is_the_best_expert_of_each_task(results):
    for task in SUITE:
        assert results["best in hindsight"].scores[task].score == max(
            results[expert].scores[task].score for expert in TASKS
        )


def test_choices_are_ranked_by_every_predictor(experts):
    suite = {
        task: Dataset.from_dict(
            {
                **rows_of(task, WORDS).to_dict(),
                "choices": [[" " + one.format(word) for _, one in TASKS.values()] for word in WORDS],
                "right": [[index]] * len(WORDS),
            }
        )
        for index, task in enumerate(TASKS)
    }
    ranked = evaluate(
        experts, suite, train_rows=TRAIN, owners=OWNERS, metrics=dict.fromkeys(TASKS, "ranked"), embedder=letters,
        batch_size=3,
    )  # fmt: skip
    scores = {predictor.name: predictor.scores for predictor in ranked.predictors}
    assert all(scores["oracle"][task].score == 1 for task in TASKS)
    for name in TASKS:  # an expert prefers the form that it was trained on
        assert [scores[name][task].score for task in TASKS] == [float(task == name) for task in TASKS]
    assert [(task.metric, task.n) for task in ranked.tasks] == [("ranked", 8)] * 2
    # each choice is retrieved for by its prompt, which is another for the two tasks
    assert all(scores["retrieval"][task].score == 1 for task in TASKS)


def test_retrieval_finds_the_expert_of_examples_like_the_input(results):
    retrieval = Retrieval(TRAIN, letters)
    assert retrieval.choose(rows_of("the", WORDS)).tolist() == [0] * 8
    assert retrieval.choose(rows_of("nine", WORDS)).tolist() == [1] * 8
    assert retrieval.choose(SUITE["both"]).tolist() == [0, 1]
    for task in TASKS:  # so its answers are the right expert's
        assert results["retrieval"].scores[task] == results["oracle"].scores[task]


def test_merged_is_the_exported_adapter_in_peft(experts, tmp_path):
    router = PhatgooseRouter.from_experts(experts)
    router.to_adapter(tmp_path / "merged")
    inputs = TOKENIZER(SUITE["the"]["prompt"][:3], padding=True, return_tensors="pt")
    with torch.no_grad(), router.using([0.5, 0.5]):
        got = router(**inputs).logits
        want = PeftModel.from_pretrained(tiny.llama(), tmp_path / "merged")(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, tiny.llama()(**inputs).logits, rtol=1e-2)


def test_the_same_call_gives_the_same_numbers(results, experts):
    again = evaluate(
        experts,
        SUITE,
        train_rows=TRAIN,
        owners=OWNERS,
        metrics={"both": "tokens"},
        predictors=["uniform", "PHATGOOSE", "oracle"],
        batch_size=3,
    )
    assert [predictor.name for predictor in again.predictors] == ["PHATGOOSE", "uniform", "oracle"]
    for predictor in again.predictors:
        assert predictor.scores == results[predictor.name].scores


def test_results_round_trip_through_json_and_print_all_tasks(results, tmp_path):
    results.save(tmp_path / "suite.json")
    assert Results.load(tmp_path / "suite.json") == results
    assert results.settings["top_k"] == 2 and results.settings["gates"] == ["gaussian"]
    table = results.table()
    assert [row["task"] for row in table] == ["the", "nine", "mean, held-in", "both", "mean, held-out"]
    low, high = wilson(results["oracle"].scores["the"].score, 8)
    assert table[0]["oracle"].endswith(f" ({100 * low:.0f} to {100 * high:.0f})")
    assert table[3]["oracle"] == "–"
    assert list(results.table(experts=True)[0]) == ["task", "n", "the", "nine"]
    best = max(TASKS, key=lambda expert: results[expert].means["held-in"].score)
    assert table[2][f"best single: {best}"] == str(results[best].means["held-in"])
    text = results.text()
    assert all(predictor.name in text for predictor in results.predictors)
    lead = results["merged"].lead["held-in"]
    assert lead.score == pytest.approx(
        results["PHATGOOSE"].means["held-in"].score - results["merged"].means["held-in"].score
    )
    assert str(lead) in text


def test_intervals():
    rows = torch.tensor([1.0, 1, 0, 1])
    assert score_of(rows, "exact").ci95 == wilson(0.75, 4)
    shares = torch.tensor([0.2, 0.4, 0.9])
    score = score_of(shares, "tokens")
    half = 1.96 * float(shares.std(correction=0)) / math.sqrt(3)
    assert score.ci95 == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    alone = mean_of([score])
    assert (alone.score, *alone.ci95) == pytest.approx((score.score, *score.ci95))
    two = mean_of([Score(0.5, (0.4, 0.7)), Score(0.7, (0.4, 0.8))])
    assert (two.score, *two.ci95) == pytest.approx(
        (0.6, 0.6 - math.hypot(0.1, 0.3) / 2, 0.6 + math.hypot(0.2, 0.1) / 2)
    )


def test_intervals_of_means_have_their_coverage():
    """Drawn again and again, 95 % of the intervals hold the truth: of a mean over tasks and of a paired difference."""
    generator = torch.Generator().manual_seed(0)
    rates, others, n = torch.tensor([0.95, 0.5, 0.2]), torch.tensor([0.9, 0.4, 0.3]), 100
    covered = leads = 0
    for _ in range(400):
        drawn = torch.rand(3, n, generator=generator)
        own, other = (
            [(drawn[t] < rates[t]).float() for t in range(3)],
            [(drawn[t] < others[t]).float() for t in range(3)],
        )
        low, high = mean_of([score_of(values, "exact") for values in own]).ci95
        covered += low <= float(rates.mean()) <= high
        low, high = lead_of(own, other).ci95
        leads += low <= float((rates - others).mean()) <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert 0.92 <= leads / 400 <= 0.98


def test_only_blocks_below_all_adapters_run_once(experts):
    assert len(unchanged_blocks(PhatgooseRouter.from_experts(experts))) == 1
    router = PhatgooseRouter.from_experts(experts)
    inputs = TOKENIZER("name the fox", return_tensors="pt")
    with torch.no_grad():
        want = router(**inputs).logits
        with same_start([router]) as remembered:
            assert torch.equal(router(**inputs).logits, want)
            assert list(remembered) == [0, router]
            remembered[0] = remembered[0] + 1
            assert not torch.allclose(router(**inputs).logits, want)
        assert torch.equal(router(**inputs).logits, want)
    lower = tiny.adapter(tiny.llama(), 4, None, 0, ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"])
    whole = Expert("whole", experts[0].model, lower, TOKENIZER, gates=experts[0].gates)
    assert unchanged_blocks(PhatgooseRouter.from_experts([*experts, whole])) == []


def test_every_router_keeps_its_decisions_in_blocks_that_run_once(experts):
    """Gaussian gates decide within them; what is remembered may be of another router, and of an earlier batch."""
    swapped = [replace(one, gates=other.gates) for one, other in zip(experts, reversed(experts), strict=True)]
    routers = [PhatgooseRouter.from_experts(each) for each in (experts, swapped)]
    assert routers[0].config.gate_points
    average = [replace(e, gates=average_activation(e, TRAIN[e.name])) for e in experts]
    routers.append(PhatgooseRouter.from_experts(average))
    inputs = TOKENIZER("name the fox", return_tensors="pt")
    with torch.no_grad():
        want = [router(**inputs).logits for router in routers]
        assert not torch.allclose(want[0], want[1])
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
            with same_start(routers) as remembered:
                for index in order:
                    assert torch.equal(routers[index](**inputs).logits, want[index])
                kept = dict(remembered)
            for index in order:  # each in a context that knows what all gave
                with same_start([routers[index]]) as remembered:
                    remembered.update(kept)
                    assert torch.equal(routers[index](**inputs).logits, want[index])


def test_the_embedder_ignores_padding(tmp_path):
    tiny.bert(["a"]).bert.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    embed = TextEmbedder(tmp_path, batch_size=2)
    texts = ["the fox", "experts are fused into one model", "a dog"]
    together, alone = embed(texts), torch.cat([embed([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_encoder_decoder_is_evaluated_by_generation():
    base = tiny.t5()
    experts = []
    for seed in range(2):
        lora = tiny.adapter(base, 4, None, seed, [".q", ".v", ".wo"])
        generator = torch.Generator().manual_seed(seed)
        gates = Gates({path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in lora.lora.items()})
        experts.append(Expert(f"expert-{seed}", base, lora, TOKENIZER, gates=gates))
    rows = SUITE["the"]
    router = PhatgooseRouter.from_experts(experts)
    with torch.no_grad():  # its own first tokens are the targets, so that some answers are right
        inputs = TOKENIZER(list(rows["prompt"]), padding=True, return_tensors="pt")
        said = TOKENIZER.batch_decode(router.generate(**inputs, max_new_tokens=3)[:, 1:])
    suite = {"t": rows.remove_columns("target").add_column("target", said)}
    results = evaluate(
        experts, suite, train_rows={}, owners={}, predictors=["base", "PHATGOOSE", "merged"], metrics={"t": "tokens"}
    )
    _, share = target_scores(router, encode_prompts(suite["t"], TOKENIZER, is_encoder_decoder=True), TOKENIZER)
    assert float(share.mean()) > 0
    assert results["PHATGOOSE"].scores["t"].score == pytest.approx(float(share.mean()))
    assert set(results["merged"].means) == {"held-out"}


# ---------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def classifiers() -> tuple[list[Expert], dict[str, Dataset]]:
    """Random adapters with heads of their own; each task's labels are what its expert says."""
    base = tiny.bert(["x", "y"])
    experts, suite = [], {}
    for seed, labels in enumerate((["no", "yes"], ["dog", "fox", "hen"])):
        lora = tiny.adapter(base, 4, len(labels), seed, ["query", "value"])
        vectors = {path: torch.randn(32, generator=torch.Generator().manual_seed(seed)) for path in lora.lora}
        vectors["classifier"] = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        expert = Expert(f"expert-{seed}", base, lora, TOKENIZER, labels, gates=Gates(vectors))
        experts.append(expert)
        said = []
        for text in tiny.TEXTS:
            logits = tiny.merged(base, lora, labels)(**TOKENIZER(text, return_tensors="pt")).logits
            said.append(int(logits.argmax()))
        suite[f"task-{seed}"] = Dataset.from_dict(
            {"text": tiny.TEXTS, "label": said},
            features=Features({"text": Value("string"), "label": ClassLabel(names=labels)}),
        )
    return experts, suite


def test_classifiers_answer_among_the_labels_of_all(classifiers):
    experts, suite = classifiers
    train = {expert.name: rows for expert, rows in zip(experts, suite.values(), strict=True)}
    owners = dict(zip(suite, train, strict=True))
    results = evaluate(experts, suite, train_rows=train, owners=owners, embedder=letters, batch_size=3)
    assert {task.metric for task in results.tasks} == {"accuracy"}
    assert "base" not in {predictor.name for predictor in results.predictors}
    assert results["oracle"].means["held-in"].score == 1
    assert results["expert-0"].scores["task-1"].score == 0  # it does not know these labels
    assert results["expert-0"].scores["task-0"].score == 1
    with pytest.raises(FusionError, match="each expert brings its own"):
        evaluate(experts, suite, train_rows=train, owners=owners, predictors=["base"])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"owners": {"the": "nobody"}}, "'nobody', the owner of the, is not an expert"),
        ({"owners": {"singing": "the"}}, "the task 'singing' of the is not in the suite"),
        ({"suite": {}}, "no tasks"),
        ({"suite": {"the": SUITE["the"].select([])}}, "the task the has no rows"),
        ({"predictors": ["magic"]}, "no predictor 'magic'"),
        ({"train_rows": {"the": TRAIN["the"]}}, "retrieval needs rows that nine was trained on"),
        ({"top_k": 3}, "only 2 experts"),
    ],
)
def test_inconsistent_arguments_are_refused(experts, change, said):
    given = {"suite": SUITE, "train_rows": TRAIN, "owners": OWNERS, **change}
    with pytest.raises(FusionError, match=said):
        evaluate(experts, given.pop("suite"), embedder=letters, **given)


def test_missing_gates_are_refused_or_replaced_by_prototypes(experts):
    bare = [experts[0], replace(experts[1], gates=None)]
    given = {"train_rows": TRAIN, "owners": OWNERS, "predictors": ["PHATGOOSE"]}
    with pytest.raises(FusionError, match="nine has no gates"):
        evaluate(bare, SUITE, **given)
    results = evaluate(bare, SUITE, missing_gates="arrow", **given)
    assert results.settings["gates"] == ["gaussian", "none"]
    assert [predictor.name for predictor in results.predictors] == ["PHATGOOSE"]


def test_rows_without_text_cannot_be_retrieved():
    with pytest.raises(FusionError, match="reads columns prompt or text"):
        Retrieval({"a": Dataset.from_dict({"image": [1]})}, letters)
