"""The splits of a task's rows, and errors about its data."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset
from huggingface_hub import HfApi

from hf_fusion.assets.language_tasks import rows
from hf_fusion.assets.rxnfp import FAMILIES, MODELS, rxnfp_folder
from hf_fusion.bench.rows import divide, ours, task_rows
from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import Task, load_suite
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.choices import likeliest, spread
from hf_fusion.evaluation.predictions import Predictions


def texts(numbers) -> Dataset:
    return Dataset.from_dict({"text": [str(number) for number in numbers]})


def numbers(rows: Dataset | None) -> set[int]:
    return set() if rows is None else {int(text) for text in rows["text"]}


@pytest.mark.parametrize(
    ("split", "share", "train", "fit", "test"),
    [("train", 0.25, 30, 10, 20), ("test", 0.25, 40, 5, 15), ("spare", 1, 40, 8, 20), ("spare", 0.5, 40, 4, 20)],
)
def test_no_row_is_in_two_parts(split, share, train, fit, test):
    parts = {"train": texts(range(45)), "test": texts(range(40, 60)), "spare": texts(range(52, 68))}
    found = [numbers(own) for own in divide(parts, split, share)]
    assert [len(own) for own in found] == [train, fit, test]
    assert not found[0] & found[2]
    assert not found[1] & found[2]
    assert not found[0] & found[1]


def test_without_train_rows():
    train, fit, test = divide({"test": texts(range(10))}, "test", 0.5)
    assert train is None
    assert numbers(fit) | numbers(test) == set(range(10))


def test_duplicated_test_rows_are_not_trained_on():
    _, fit, test = divide({"test": texts([*range(20), *range(20)])}, "test", 0.5)
    assert fit and not numbers(fit) & numbers(test)


def test_the_language_suite_has_the_rows_of_its_experts():
    suite = load_suite("smollm-lora")
    held_in, held_out = (task_rows(suite, task) for task in ("number-range", "three-term-sum"))
    assert held_in.train is not None
    assert held_in.train["prompt"][:300] == rows("number-range", "train", 300)["prompt"][:]
    assert held_in.test["prompt"][:] == rows("number-range", "test", 400)["prompt"][:]
    assert len(held_in.fit) == len(held_out.fit) == 1000
    assert held_out.train is None
    with pytest.raises(FusionError, match="(?s)'bbh/snarks' was not found in any folder.*--data DIR"):
        task_rows(suite, "snarks")


def test_reaction_rows_and_unknown_models():
    suite = load_suite("rxnfp-2")
    own = task_rows(suite, "classes")
    assert (len(own.fit), len(own.test)) == (864, 864)
    assert own.test.features["label"].names == list(FAMILIES)
    assert "CO.O=C(O)c1ccccc1>>COC(=O)c1ccccc1" in own.fit["text"][:] + own.test["text"][:]
    with pytest.raises(FusionError, match="(?s)rxnfp has no model 'bert'.*bert_pretrained"):
        rxnfp_folder("bert")


def test_the_wheels_pickles_become_plain_folders(monkeypatch, tmp_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path))
    folders = [expert_path(f"package:rxnfp/{name}") for name in MODELS]
    assert all(folder == tmp_path / "models" / "rxnfp" / name for folder, name in zip(folders, MODELS, strict=True))
    texts = task_rows(load_suite("rxnfp-2"), "classes").test["text"][:8]
    embeddings = []
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        assert tokenizer.unk_token_id not in inputs["input_ids"]
        with torch.no_grad():
            embeddings.append(AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[:, 0])
    near = [torch.nn.functional.cosine_similarity(embeddings[0], own).mean() for own in embeddings[1:]]
    assert all(0 < value < 0.6 for value in near)  # fine-tuning moved them far


def test_unknown_source_of_rows_is_refused():
    suite = load_suite("rxnfp-2")
    task = replace(suite.tasks["classes"], data="package:nothing")
    with pytest.raises(FusionError, match="(?s)package:nothing is not a source of rows.*digits, general, language"):
        task_rows(replace(suite, tasks={"classes": task}), "classes")
    with pytest.raises(FusionError, match="rxnfp-2 has no task 'chess'"):
        task_rows(suite, "chess")


LABELS = ClassLabel(names=["bad", "good"])


def declared(**given) -> Task:
    return Task("mine", "me/mine", **given)


def table(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def test_columns_get_our_names_and_others_go():
    rows = table(idx=[1, 2], a=["x", "y"], b=["u", "v"], target=[0, 1]).cast_column("target", LABELS)
    found = ours(rows, declared(columns={"text": "a", "text_pair": "b", "label": "target"}))
    assert found.column_names == ["text", "text_pair", "label"]
    assert found[1] == {"text": "y", "text_pair": "v", "label": 1}
    assert found.features["label"].names == ["bad", "good"]


@pytest.mark.parametrize("labels", [["no", "yes"], [0, 1]])
def test_labels_become_the_classes_of_the_task(labels):
    found = ours(table(text=["a", "b"], label=labels), declared(classes=("no", "yes")))
    assert found["label"][:] == [0, 1]
    assert found.features["label"].names == ["no", "yes"]


def test_numbers_of_a_regression_stay_numbers():
    found = ours(table(text=["a"], score=[0.5]), declared(columns={"label": "score"}))
    assert found[0] == {"text": "a", "label": 0.5}


def test_prompts_take_turns_and_words_are_answers():
    rows = table(s=["x", "y", "z"], label=[1, 0, 1])
    found = ours(rows, declared(prompt=("Is {s} good?", "{s}: good?"), words=("no", "yes, {s}")))
    assert found["prompt"][:] == ["Is x good?", "y: good?", "Is z good?"]
    assert found["target"][:] == ["yes, x", "no", "yes, z"]
    assert found.column_names == ["prompt", "target"]


def test_targets_are_written_from_columns():
    rows = table(text=["q"], ends=[["u", "v"]], right=[2], score=[3.456])
    assert ours(rows, declared(prompt=("{text} {ends[1]}",), target="{score:.1f}"))[0] == {
        "prompt": "q v",
        "target": "3.5",
    }
    from_one = declared(prompt=("{text}",), words=("{ends[0]}", "{ends[1]}"), classes=("1", "2"))
    assert ours(rows, replace(from_one, columns={"label": "right"}))["target"][:] == ["v"]


def test_choices_are_the_words_or_a_column_and_several_may_be_right():
    choices, worth = [["no", "yes", "Yes"], ["no", "none"]], [[0, 1, 1], [0, 0]]
    rows = table(text=["q", "r"], label=[1, 0], said=["Yes. Because.", "no"], all=choices, worth=worth)
    by_words = ours(rows, declared(prompt=("{text}",), words=("{text}!", "b"), metric="ranked"))
    assert by_words[0] == {"prompt": "q", "target": "b", "choices": ["q!", "b"], "right": [1]}
    listed = declared(prompt=("{text}",), target="{said}", choices="all", metric="ranked")
    assert [row["right"] for row in ours(rows, listed)] == [[2], [0]]  # what the target begins with
    worth = ours(rows, replace(listed, worth="worth"))
    assert [row["right"] for row in worth] == [[1, 2], [0]]
    assert len(spread(worth)) == 5
    assert likeliest(worth, Predictions([0.3, 0.2, 0.1, 0.5, 0.4], [])) == Predictions([2, 1], [2, 0])


FAULTS = {
    "has no column 'sentence'; it has text, label": {"columns": {"text": "sentence"}},
    "has no column 'q'": {"prompt": ("{q[0]}",), "target": "{text}"},
    "has no column 'all'": {"prompt": ("{text}",), "target": "{text}", "choices": "all", "metric": "ranked"},
    "has no column 'gold'": {"prompt": ("{text}",), "words": ("a",), "columns": {"label": "gold"}},
    "has the label -1, which is not one of its 2 classes": {"classes": ("a", "b")},
    "has the label -1, which is not one of its 1 classes": {"prompt": ("{text}",), "words": ("a",)},
}


@pytest.mark.parametrize("said", FAULTS)
def test_mismatched_rows_are_reported(said):
    with pytest.raises(FusionError, match=f"(?s)me/mine {said}.*the task mine in suite.yaml"):
        ours(table(text=["a"], label=[-1]), declared(**FAULTS[said]), "suite.yaml")


@pytest.mark.slow  # datasets looks at several addresses, each several times
def test_a_loading_script_without_parquet_is_refused(hub, fresh_python):
    api = HfApi(endpoint=hub.endpoint, token=hub.token("scripted"))
    repo = api.create_repo("scripted/rows", repo_type="dataset").repo_id
    api.upload_file(path_or_fileobj=b"import datasets", path_in_repo="rows.py", repo_id=repo, repo_type="dataset")
    code = (
        "from hf_fusion.bench.rows import _hub_split\n"
        "from hf_fusion.bench.suite import Task\n"
        f"_hub_split(Task('t', {repo!r}), 'test')"
    )
    done = fresh_python(code, hub, check=False)
    assert f"FusionError: {repo} has a loading script, which is not run, and no Parquet files" in done.stderr
