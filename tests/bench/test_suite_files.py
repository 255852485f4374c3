"""Suite files: what is read from them, and one-sentence errors about invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import HEADS, KINDS, METRICS, load_suite, suite_names
from hf_fusion.errors import FusionError
from hf_fusion.io.cache import cache_folder

WHOLE = """\
title: two
kind: merging
head: sequence-classification
base: me/base@0123456789012345678901234567890123456789
experts: me/{task}
tasks:
  one: {data: me/one, columns: {text: sentence}}
  two: {data: "data:{task}", metric: f1, expert: null}
  three: {data: me/three, config: "{task}", expert: cache:mine/three, fitting: {split: validation, share: 0.5}}
unseen:
  last: {fuse: [one], test: [three]}
"""


@pytest.fixture
def written(tmp_path):
    """Writes a suite's file."""

    def write(text: str, name: str = "mine.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_suite_file_with_all_keys(written):
    suite = load_suite(written(WHOLE))
    assert (suite.name, suite.title, suite.kind, suite.build) == ("mine", "two", "merging", None)
    assert list(suite.tasks) == ["one", "two", "three"]
    one, two, three = suite.tasks.values()
    assert (one.expert, one.columns, one.metric) == ("me/one", {"text": "sentence"}, "accuracy")
    assert (two.expert, two.data, two.metric) == (None, "data:two", "f1")
    assert (three.expert, three.config) == ("cache:mine/three", "three")
    assert (three.fitting.split, three.fitting.share) == ("validation", 0.5)
    assert suite.experts == {"one": "me/one", "three": "cache:mine/three"}
    [split] = suite.unseen
    assert (split.name, split.fuse, split.test) == ("last", ("one",), ("three",))


FAULTS = {
    "an unknown key": (("title:", "titel:"), "mine.yaml: titel is not a supported key\n.*did you mean title"),
    "a missing key": (("title: two\n", ""), "mine.yaml: title is missing\n.*title: a string"),
    "an unknown kind": (("merging", "melting"), "kind is 'melting', expected one of merging, routing, fusion"),
    "an unknown head": (("sequence-", "word-"), "head is 'word-classification', expected one of sequence"),
    "an unknown metric": (("f1", "f0"), "tasks.two.metric is 'f0', expected one of accuracy, f1"),
    "a task's unknown key": (("expert: null", "exprt: null"), "tasks.two.exprt is not a .*did you mean expert"),
    "a task without data": (("data: me/one, ", ""), "tasks.one.data is missing\n.*data: a string"),
    "a column that is not ours": (("text: sentence", "txt: sentence"), "key of tasks.one.columns is 'txt'.*mean text"),
    "a share above one": (("share: 0.5", "share: 1.5"), "tasks.three.fitting.share is 1.5, expected a number above 0"),
    "a name in braces": (("me/{task}", "me/{name}"), "tasks.one.expert is 'me/{name}': its only placeholder"),
    "no expert": (("experts: me/{task}", "experts: {}"), "names no expert"),
    "a split's unknown task": (("test: [three]", "test: [four]"), "there is no task 'four'\n.*of one, two, three"),
    "a split that overlaps": (("test: [three]", "test: [one]"), "unseen.last: one is both fused and tested"),
    "a split without an expert": (("fuse: [one]", "fuse: [two]"), "unseen.last: two has no expert to fuse"),
    "words without a prompt": (("columns: {text: sentence}", "words: [a]"), "one: a prompt needs either words or"),
    "nothing to rank": (("metric: f1", "metric: ranked"), "tasks.two: there are no choices to rank\n.*choices: "),
    "nothing to fit on": (("metric: f1", "train: null"), "tasks.two: there is no train split .*fitting: {split: test}"),
    "no mapping": ((WHOLE, "- a"), "mine.yaml holds \\['a'\\], expected {title: …, kind: …"),
    "a missing parent": (("title: two", "extends: other"), "extends 'other', which was not found"),
    "a missing file of classes": (("columns: {text: sentence}", "classes: a.txt"), "one.classes: .*a.txt is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_single_fault_gives_a_single_error(fault, written):
    (old, new), said = FAULTS[fault]
    assert old in WHOLE
    text = WHOLE.replace(old, new)
    if fault == "no expert":
        text = text.replace("expert: cache:mine/three", "expert: null").split("unseen")[0]
    with pytest.raises(FusionError, match=f"(?s){said}"):
        load_suite(written(text))


def test_a_suite_extends_another(written):
    written(WHOLE, "other.yaml")
    suite = load_suite(written("extends: other\nexperts: you/{task}\n"))
    assert suite.title == "two"
    assert suite.tasks["one"].expert == "you/one"
    with pytest.raises(FusionError, match="(?s)extends mine, which itself extends another suite.*extends: other"):
        load_suite(written("extends: mine\n", "third.yaml"))


def test_unknown_suite_is_refused():
    with pytest.raises(FusionError, match="(?s)no suite 'minilm-9'.*minilm-8"):
        load_suite("minilm-9")


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_of_the_package_is_whole(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.kind in KINDS
    assert suite.head in HEADS
    assert all(task.metric in METRICS for task in suite.tasks.values())
    assert suite.build or not any(source.startswith("cache:") for source in suite.experts.values())


def test_every_metric_can_be_scored():
    from hf_fusion.evaluation.task_metrics import METRICS as SCORED

    suites = map(load_suite, suite_names())
    assert (
        {task.metric for suite in suites for task in suite.tasks.values()} <= METRICS.keys() == SCORED.keys() - {"mse"}
    )


def test_a_file_elsewhere_extends_a_suite_of_the_package(written):
    suite = load_suite(written("extends: clip-vit-base-patch32\ntitle: mine\n"))
    assert suite.title == "mine"
    assert len(suite.tasks["dtd"].classes) == 47


def test_fusionbench_has_26_tasks_and_74_models():
    clip = [f"clip-vit-{size}" for size in ("base-patch32", "base-patch16", "large-patch14")]
    clip += ["clip-vit-base-patch16-lora", "clip-vit-base-patch16-l-lora"]
    flan = ["flan-t5-base-glue", "flan-t5-base-glue-lora", "flan-t5-large-glue-lora"]
    families = {"CLIP": clip, "ResNet": ["resnet50-nyuv2"], "GPT-2": ["gpt2-glue"], "Flan-T5": flan}
    suites = {family: [load_suite(name) for name in names] for family, names in families.items()}
    tasks = {(family, task) for family, own in suites.items() for suite in own for task in suite.tasks}
    models = {source for own in suites.values() for suite in own for source in suite.experts.values()}
    assert len(tasks) == 26
    assert len(models) == 74


def test_experts_of_one_checkpoint_are_written_as_a_range():
    suite = load_suite("phatgoose-t0")
    assert len(suite.experts) == 36
    assert suite.experts["p3-18"] == "r-three/P3_Phatgoose#18" == suite.tasks["rotten_tomatoes"].expert
    assert suite.owner("ag_news") == "p3-0"
    assert len(load_suite("phatgoose-bbh").experts) == 166


def test_zero_shot_heads_have_the_classes_of_their_data_sets():
    tasks = load_suite("clip-vit-large-patch14").tasks
    assert {name: len(task.classes) for name, task in tasks.items()} == {
        **{"sun397": 397, "stanford-cars": 196, "resisc45": 45, "eurosat": 10},
        **{"svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47},
    }
    assert all("{}" in template for task in tasks.values() for template in task.templates)
    assert (tasks["svhn"].config, tasks["mnist"].config) == ("cropped_digits", None)


def test_sources_resolve_to_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path))
    assert expert_path("me/model@abc") == "me/model@abc"
    with pytest.raises(FusionError, match="(?s)a/b has not been built yet.*make them"):
        expert_path("cache:a/b", "make them")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert expert_path("cache:a/b") == tmp_path / "a" / "b"
    assert (Path(expert_path("package:demo/smollm2_experts/chain-sum")) / "adapter_config.json").is_file()
    with pytest.raises(FusionError, match="(?s)package:nothing is not a source of models.*minilm, smollm2"):
        expert_path("package:nothing")
    monkeypatch.delenv("HF_FUSION_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hf_fusion"
    monkeypatch.delenv("HF_HOME")
    assert cache_folder() == Path("~/.cache/hf_fusion").expanduser()
