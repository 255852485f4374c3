"""lm-evaluation-harness on fused models: a dense merge scores what the harness gives; routed ones by their prompts."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from harness_world import TASKS, save_models, save_tasks
from tiny import SUMS, bert, gpt2, llama, make_tokenizer, t5
from tiny_fused import base_expert, experts_of, fine_tuned

import hf_fusion
from hf_fusion import Expert, FoEModel, FusionError, Recipe, RecipeExpert, WEMoEModel, evaluate, fuse, merge
from hf_fusion.evaluation.harness_results import HarnessRun, HarnessScore
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results
from hf_fusion.fusion import save_fused

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.long

CLOSE = 100 * SUMS  # of sums over up to ten tokens of logits of size 10, in another order


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return save_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    pair = (RecipeExpert(str(folder / "foxes")), RecipeExpert(str(folder / "dogs")))
    merge(Recipe("task_arithmetic", pair, str(folder / "base"), {"scaling": 0.5}), folder / "merged")
    return folder


def own_scores(model: Path, tasks: Path, names: list[str], **options) -> dict[str, dict]:
    """What the harness itself gives for a folder."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model)},
        tasks=names,
        task_manager=manager,
        device="cpu",
        log_samples=False,
        **options,
    )


def of(run: HarnessRun, predictor: str) -> dict[str, dict[str, float | str]]:
    """A model's scores in the harness's form."""
    found: dict[str, dict[str, float | str]] = {}
    for score in run.scores:
        if score.predictor == predictor:
            found.setdefault(score.task, {})[f"{score.metric},none"] = score.score
            found[score.task][f"{score.metric}_stderr,none"] = "N/A" if score.stderr is None else score.stderr
    return found


def without_names(scores: dict[str, dict]) -> dict[str, dict]:
    return {task: {key: value for key, value in row.items() if "," in key} for task, row in scores.items()}


@pytest.mark.parametrize("options", [{}, {"fewshot": 2, "limit": 7, "batch_size": 3}], ids=["defaults", "few-shot"])
def test_dense_merge_scores_what_the_harness_gives_to_the_last_digit(folders, tasks, options):
    names = list(TASKS) if not options else ["which", "says"]
    results = evaluate(folders / "merged", harness=[str(tasks / f"{name}.yaml") for name in names], **options)
    theirs = {"num_fewshot" if key == "fewshot" else key: value for key, value in options.items()}
    wanted = own_scores(folders / "merged", tasks, names, **theirs)
    [run] = results.harness
    assert of(run, "merged") == without_names(wanted["results"])
    assert {score.task for score in run.scores} == {*names}
    assert {score.n for score in run.scores} == {options.get("limit", 10)}
    assert {score.shots for score in run.scores} == {options.get("fewshot", 0)}
    assert {score.metric: score.higher_is_better for score in run.scores}.get("bits_per_byte") in (False, None)
    assert next(score for score in run.scores if score.metric == "acc").higher_is_better is True
    assert run.scores[0].version == "2.0"
    assert (run.settings["limit"], run.settings["lm_eval"]) == (options.get("limit"), lm_eval.__version__)


def test_experts_and_base_are_run_beside_it(folders, tasks, tmp_path):
    few = {"harness": [str(tasks / "which.yaml")], "fewshot": 2}  # drawn for each document, the same for every model
    results = evaluate(folders / "merged", **few, compare=True)
    [run] = results.harness
    kinds = {score.predictor: score.kind for score in run.scores}
    assert kinds == {"merged": "fused", "foxes": "expert", "dogs": "expert", "base": "base"}
    [alone] = evaluate(folders / "foxes", **few).harness
    assert of(run, "foxes") == of(alone, "merged")
    assert len({str(of(run, name)) for name in kinds}) > 1
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert "which" in results.text() and "±" in results.text() and "<td" in results._repr_html_()


def test_adapters_are_run_in_their_base(folders, tasks, tmp_path):
    from peft import PeftModel

    save_fused(fuse("phatgoose", [str(folders / "cats"), str(folders / "hens")]), tmp_path / "routed")
    [run] = evaluate(tmp_path / "routed", harness=[str(tasks / "which.yaml")], compare=True).harness
    assert {score.predictor: score.kind for score in run.scores} == {
        "PHATGOOSE": "fused", "cats": "expert", "hens": "expert", "base": "base",
    }  # fmt: skip
    dense = PeftModel.from_pretrained(llama_of(folders / "base"), folders / "cats").merge_and_unload()
    dense.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    [alone] = evaluate(tmp_path / "dense", harness=[str(tasks / "which.yaml")]).harness
    assert of(run, "cats") == of(alone, "merged")


def llama_of(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


# ---------------------------------------------------------------- requests

PAIRS = [
    ("the quick brown", " fox"),
    ("the quick brown", " dog"),
    ("the quick brown", " fox jumps over"),
    ("the quick", " brown fox"),  # the same tokens as the first, but another prompt
    ("a dog", " x"),
    ("", "experts are fused"),
    ("experts are fused into one model that is better than any of them " * 3, " said the router"),  # cut on the left
]


def requests(kind: str, pairs=PAIRS):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]


def written(lm, contexts=("the quick brown", "a dog", "experts are fused into")) -> list[str]:
    options = {"until": ["."], "max_gen_toks": 6}
    return lm.generate_until(requests("generate_until", [(context, options) for context in contexts]))


def assert_alike(found, wanted):
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("size", [1, 4])
def test_wemoe_scores_a_continuation_with_the_weights_of_its_prompt(size):
    from hf_fusion.evaluation.harness_models import FusionLM, harness_model

    base, tokenizer = llama(), make_tokenizer()
    base.config.max_position_embeddings = 64
    model = WEMoEModel.from_experts(experts_of(base, scale=0.9), base_expert(base), router_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                torch.nn.init.normal_(parameter, std=0.5)
    lm = harness_model(model, tokenizer, "WEMoE", size)
    found = lm.loglikelihood(requests("loglikelihood"))
    for (context, continuation), answer in zip(PAIRS, found, strict=True):
        ids = tokenizer(context or "<s>", add_special_tokens=False, return_tensors="pt").input_ids
        read = tokenizer(continuation, add_special_tokens=False).input_ids
        dense = model.merge_for({"input_ids": ids[:, -(64 + 1 - len(read)) :]})
        plain = FusionLM(dense, tokenizer, "dense", 1)
        assert_alike([answer], plain.loglikelihood(requests("loglikelihood", [(context, continuation)])))
    for context, text in zip(("the quick brown", "a dog"), written(lm, ("the quick brown", "a dog")), strict=True):
        dense = model.merge_for({"input_ids": tokenizer(context, return_tensors="pt").input_ids})
        assert written(FusionLM(dense, tokenizer, "dense", 1), (context,)) == [text]
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("experts are fused",)])) == pytest.approx(
        [found[5][0]], abs=CLOSE
    )


def test_wemoe_of_sequence_to_sequence_models(tmp_path):
    from hf_fusion.evaluation.harness_models import FusionLM, harness_model

    base, tokenizer = t5(), make_tokenizer()
    model = WEMoEModel.from_experts(experts_of(base, scale=0.9), base_expert(base))
    pairs = PAIRS[:5]
    found = harness_model(model, tokenizer, "WEMoE", 4).loglikelihood(requests("loglikelihood", pairs))
    for pair, answer in zip(pairs, found, strict=True):
        start = torch.zeros(1, 1, dtype=torch.long)
        ids = tokenizer(pair[0], return_tensors="pt").input_ids
        dense = model.merge_for({"input_ids": ids, "decoder_input_ids": start})
        assert_alike([answer], FusionLM(dense, tokenizer, "dense", 1).loglikelihood(requests("loglikelihood", [pair])))


@pytest.mark.parametrize("size", [1, 4])
def test_phatgoose_scores_what_the_harness_gives_without_padding(folders, size):
    from hf_fusion.evaluation.harness_models import FusionLM, harness_model

    router = fuse("phatgoose", [str(folders / "cats"), str(folders / "hens")])
    lm = harness_model(router, router.processor, "PHATGOOSE", size)
    plain = FusionLM(router, router.processor, "plain", 1)
    plain.logits_cache = False  # it mistakes a prompt and its continuation for another pair of the same tokens
    assert_alike(lm.loglikelihood(requests("loglikelihood")), plain.loglikelihood(requests("loglikelihood")))
    assert written(lm) == written(plain)


def selection(kind: str) -> tuple[list[Expert], FoEModel]:
    """Experts with different tokenizers, of one base, or with an encoder, and a fuser that selects more than one."""
    tokenizer, other = make_tokenizer(), make_tokenizer(290)
    if kind == "tokenizers":
        experts = [Expert("me/a", llama(), processor=tokenizer), Expert("me/b", gpt2(), processor=other)]
    else:
        base = {"decoder": llama, "encoder": t5}[kind]()
        experts = [Expert(f"me/{k}", fine_tuned(base, k, 2.0), processor=tokenizer) for k in range(2)]
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = model.processor(text=sorted({context for context, _ in PAIRS if context}))
    with torch.no_grad():
        scores = model.fuser(model.prompt_embeddings(inputs))
        lead = (scores[:, 0] - scores[:, 1]).sort().values
        widest = int(lead.diff().argmax())
        final = [module for module in model.fuser.modules() if isinstance(module, torch.nn.Linear)][-1]
        final.bias[0] -= (lead[widest] + lead[widest + 1]) / 2
    return experts, model


@pytest.mark.parametrize("kind", ["tokenizers", "decoder", "encoder"])
def test_foe_gives_each_request_to_the_expert_selected_by_its_prompt(kind):
    from hf_fusion.evaluation.harness_models import FusionLM, harness_model

    experts, model = selection(kind)
    size = 1 if kind == "encoder" else 4  # with an encoder the harness lets answers be as long as a batch is wide
    lm = harness_model(model, model.processor, "FoE", size)
    pairs = [pair for pair in PAIRS if (pair[0] or kind != "encoder") and pair[0] != "the quick"]
    found, chosen = lm.loglikelihood(requests("loglikelihood", pairs)), lm.select([context for context, _ in pairs])
    for (context, _), expert in zip(pairs, chosen, strict=True):
        assert not context or int(model.select(model.processor(text=[context]))) == expert
    assert {*chosen} == {0, 1}
    plain = [FusionLM(expert.model, expert.processor, expert.name, 1) for expert in experts]
    for pair, answer, expert in zip(pairs, found, chosen, strict=True):
        assert_alike([answer], plain[expert].loglikelihood(requests("loglikelihood", [pair])))
    contexts = ("the quick brown", "a dog", "experts are fused into")
    texts = [written(plain[expert], (text,))[0] for text, expert in zip(contexts, lm.select(contexts), strict=True)]
    assert written(lm, contexts) == texts
    if kind != "encoder":
        rolled = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("experts are fused",)]))
        assert rolled == pytest.approx([found[4][0]], abs=CLOSE)


# ---------------------------------------------------------------- saved models, results


def test_every_kind_of_saved_model_runs_with_the_tokens_of_its_tokenizer(folders, tasks, tmp_path):
    from transformers import AutoTokenizer

    pair = [str(folders / "foxes"), str(folders / "dogs")]
    made = {
        "wemoe": fuse("wemoe", pair, str(folders / "base")),
        "phatgoose": fuse("phatgoose", [str(folders / "cats"), str(folders / "hens")]),
        "foe": fuse("foe", pair, mode="selection"),
        "linear": fuse("linear", pair),
    }
    for name, model in made.items():
        save_fused(model, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>"), name
        words = [str(tasks / "which.yaml"), str(tasks / "says.yaml")]
        [run] = evaluate(tmp_path / name, harness=words, limit=3, batch_size=2).harness
        assert {score.task for score in run.scores} == {"which", "says"}
        assert {score.kind for score in run.scores} == {"fused"}
        if name == "foe":  # also in memory, as it was fused
            assert evaluate(model, harness=words, limit=3, batch_size=2).harness[0].scores == run.scores


def test_saved_fusion_of_experts_with_different_tokenizers_has_the_tokens_of_each(tasks, tmp_path):
    _, model = selection("tokenizers")
    model.save_pretrained(tmp_path / "foe")
    words = [str(tasks / "which.yaml"), str(tasks / "says.yaml")]
    [loaded], [made] = (evaluate(given, harness=words, limit=4).harness for given in (tmp_path / "foe", model))
    assert loaded.scores == made.scores
    assert {score.predictor for score in loaded.scores} == {"FoE"}


def score(task: str, value: float, predictor: str = "merged") -> HarnessScore:
    return HarnessScore(predictor, "fused", task, "acc", value, 0.1, 10)


def test_results_keep_what_was_not_measured_again():
    scored = PredictorScores("merged", "fused", {"mood": Score(0.5, (0.4, 0.6))})
    rows = Results([MeasuredTask("mood", "accuracy", 90)], [scored], command="rows")
    first = Results([], [], harness=[HarnessRun([score("a", 0.1), score("b", 0.2)], command="one")])
    second = Results([], [], harness=[HarnessRun([score("b", 0.3)], command="two")])
    both = second.with_earlier(first.with_earlier(rows))
    assert (both.tasks, both.predictors, both.command) == (rows.tasks, rows.predictors, rows.command)
    assert [(run.command, [(s.task, s.score) for s in run.scores]) for run in both.harness] == [
        ("one", [("a", 0.1)]), ("two", [("b", 0.3)]),
    ]  # fmt: skip
    again = rows.with_earlier(both)
    assert again == both


# ---------------------------------------------------------------- tasks


def test_groups_and_tasks_of_a_folder(folders, tmp_path):
    tasks = save_tasks(tmp_path / "tasks", 4)
    (tasks / "text.yaml").unlink()
    mean = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (tasks / "both.yaml").write_text(json.dumps({"group": "both", "task": ["which"], "aggregate_metric_list": mean}))
    [run] = evaluate(folders / "merged", harness=str(tasks)).harness
    assert {(score.task, score.part_of) for score in run.scores} == {
        ("both", None), ("which", "both"), ("says", None),
    }  # fmt: skip
    assert {row["task"] for row in run.table()} == {"both", "says"}


def test_wrong_tasks_are_named_with_the_next_command(folders, tasks, tmp_path):
    merged = folders / "merged"

    def refused(words, match: str, model=merged, **options) -> str:
        with pytest.raises(FusionError, match=match) as caught:
            evaluate(model, harness=words, **options)
        assert caught.value.hint
        return caught.value.hint

    assert "which.yaml" in refused([str(tasks / "wich.yaml")], "does not exist")
    assert "TASK.yaml" in refused([str(tasks / "rows.jsonl")], "is neither a task's YAML file")
    refused([], "no task was named")
    gone = (tasks / "which.yaml").read_text().replace("rows.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(gone)
    assert "HF_ENDPOINT" in refused([str(tmp_path / "gone.yaml")], "data of the task .*gone.yaml cannot be reached")
    (tmp_path / "wrong.yaml").write_text("task: [")
    refused([str(tmp_path / "wrong.yaml")], "wrong.yaml cannot be loaded")
    (tmp_path / "unsafe.yaml").write_text((tasks / "says.yaml").read_text() + "unsafe_code: true\n")
    assert "sandbox" in refused([str(tmp_path / "unsafe.yaml")], "runs code that the model writes")
    assert "limit" in refused([str(tasks)], "no option 'limmit'", limmit=3)
    bert(["x", "y"]).save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    assert "--data" in refused(
        [str(tasks)], "BertForSequenceClassification, but .* runs language models", tmp_path / "classifier"
    )
    assert "--compare" in refused([str(tasks)], "no recipe", folders / "base", compare=True)
    (tmp_path / "long.yaml").write_text(
        (tasks / "says.yaml").read_text().replace("max_gen_toks: 5", "max_gen_toks: 500")
    )
    refused([str(tmp_path / "long.yaml")], "cannot run merged: Invalid configuration: requested max tokens")
    assert "save_pretrained" in refused([str(tasks)], "merged has no tokenizer", llama())
    endless = make_tokenizer()
    endless.eos_token = None
    assert "eos_token" in refused([str(tasks)], "no end-of-sequence token", Expert("me/a", llama(), processor=endless))
    assert "omit --compare" in refused([str(tasks)], "has no recipe", Expert("me/a", llama()), compare=True)
    assert "fuse" in refused([str(tasks)], "the harness runs one model", [str(merged)])


def test_the_harness_is_imported_where_tasks_are_run_alone():
    importers = {
        file.name
        for file in Path(hf_fusion.__file__).parent.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body  # what happens on import
        for name in ast.walk(node)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        if isinstance(name, (ast.Import, ast.ImportFrom))
        and any(part.startswith(("lm_eval", "hf_fusion.evaluation.harness_models")) for part in _names(name))
    }
    assert importers == {"harness_models.py"}


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


@pytest.mark.slow  # the harness reads the 14,000 files of its tasks
def test_unknown_name_is_looked_up_among_all_tasks(folders):
    with pytest.raises(FusionError, match="has no task 'arc_eazy'") as caught:
        evaluate(folders / "merged", harness=["arc_eazy"])
    assert "arc_easy" in str(caught.value.hint)
