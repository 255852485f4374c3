"""A search on real tiny models: the best recipe merges to what was measured, and held-out rows are not searched on."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from tiny import TEXTS, gpt2, make_tokenizer
from tiny_fused import fine_tuned, save_fine_tunes
from transformers import AutoModelForSequenceClassification

from hf_fusion import FusionError, Recipe, load_recipe, merge, search_recipe
from hf_fusion.cli.app import main
from hf_fusion.search.objective import RowsObjective, divide_rows, mean_score
from hf_fusion.search.report import SearchReport

RECIPE = """\
method: ties
base: base
experts: [foxes, dogs]
parameters:
  density: {search: [0.1, 1.0]}
  scaling: [{filter: layer.0, value: {search: [0.1, 2.0]}}, {value: {search: [0.1, 2.0]}}]
"""


def labels_of(folder: Path, rows: list[str]) -> list[int]:
    """What a model predicts: rows with these labels are found best by recipes that come close to it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = make_tokenizer()(rows, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tunes, a recipe with ranges, and rows of two tasks that an expert and a merge label."""
    folder = tmp_path_factory.mktemp("models")
    save_fine_tunes(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    texts = [f"{text} {word} {number}" for number in range(20) for text in TEXTS for word in ("fox", "dog")]
    named = Recipe.from_dict(
        {"method": "task_arithmetic", "base": "b", "experts": ["x", "y"], "parameters": {"scaling": 0.7}}
    )
    names = {"b": folder / "base", "x": folder / "foxes", "y": folder / "dogs"}
    merge(named.renamed(lambda name: str(names[name])), folder / "target")
    columns: dict[str, list] = {"text": texts * 2, "task": ["foxes"] * 160 + ["both"] * 160}
    columns["label"] = labels_of(folder / "foxes", texts) + labels_of(folder / "target", texts)
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """A folder with links to the models, so that each test has its own output."""
    for entry in models.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def suite(folder: Path) -> dict[str, datasets.Dataset]:
    rows = datasets.load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train")
    return {task: rows.filter(lambda row, task=task: row["task"] == task) for task in ("foxes", "both")}


def right(folder: Path, rows: datasets.Dataset) -> float:
    predicted = labels_of(folder, list(rows["text"]))
    return sum(a == b for a, b in zip(predicted, rows["label"], strict=True)) / len(rows)


def test_rows_are_divided_once_and_equal_rows_are_not_separated(models):
    found = divide_rows(suite(models), 0.3, seed=4)
    for task in ("foxes", "both"):
        search, rest = ({*part[task]["text"]} for part in (found.search, found.held_out))
        assert not search & rest and len(search | rest) == 160
    everything = [{*part[task]["text"]} for part in (found.search, found.held_out) for task in part]
    assert everything[0] == everything[1] and everything[2] == everything[3]  # both tasks have the same texts
    assert len(found.held_out["foxes"]) == 48
    again, other = divide_rows(suite(models), 0.3, seed=4), divide_rows(suite(models), 0.3, seed=5)
    assert again.search["foxes"]["text"] == found.search["foxes"]["text"] != other.search["foxes"]["text"]
    same = datasets.Dataset.from_dict({"text": ["a", "a", "a"], "label": [0, 1, 0]})
    with pytest.raises(FusionError, match="3 rows of same cannot be divided"):
        divide_rows({"same": same}, 0.3, seed=0)


def test_scores_of_parts_are_those_of_all(models):
    model = AutoModelForSequenceClassification.from_pretrained(models / "foxes").eval()
    model.processor = make_tokenizer()
    division = divide_rows(suite(models), 0.3, seed=0)
    objective = RowsObjective(model, division)
    assert (objective.searched, objective.held_out) == (224, 96)
    parts = [objective.scores(first, last) for first, last in [(0, 56), (56, 100), (100, 224)]]
    wanted = {task: right(models / "foxes", rows) for task, rows in division.search.items()}
    assert mean_score(parts) == pytest.approx(sum(wanted.values()) / 2)
    assert mean_score([objective.scores(0, 224)]) == mean_score(parts)
    assert [len(part["both"]) for part in parts] == [28, 22, 62]


def test_the_best_recipe_is_what_was_measured(here):
    report = search_recipe("recipe.yaml", suite(here), "found", budget=14, seed=1)
    assert isinstance(report, SearchReport) and len(report.trials) == 14
    assert report.trials[0].parameters == {
        "parameters.density": 0.2, "parameters.scaling[0].value": 1.0, "parameters.scaling[1].value": 1.0,
    }  # fmt: skip
    assert report.best.scores[-1] == max(trial.scores[-1] for trial in report.trials if trial.complete)
    assert report.best.scores[-1] > report.trials[0].scores[-1]
    assert load_recipe("found/best.yaml") == report.recipe
    merge(report.recipe, here / "merged")
    division = divide_rows(suite(here), 0.3, seed=1)
    both = ("foxes", "both")
    searched = [right(here / "merged", division.search[task]) for task in both]
    assert report.best.scores[-1] == pytest.approx(sum(searched) / 2)
    held_out = [right(here / "merged", division.held_out[task]) for task in both]
    assert [gain.best.score for gain in report.gains] == pytest.approx([*held_out, sum(held_out) / 2])
    first = Recipe(report.recipe.method, report.recipe.experts, report.recipe.base, {"density": 0.2})
    merge(first, here / "start")
    started = [right(here / "start", division.held_out[task]) for task in both]
    assert [gain.start.score for gain in report.gains] == pytest.approx([*started, sum(started) / 2])
    assert report.gain.score == pytest.approx((sum(held_out) - sum(started)) / 2)
    assert report.gain.ci95[0] <= report.gain.score <= report.gain.ci95[1]
    content = json.loads((here / "found/search.json").read_text())
    assert content["searched_rows"] == 224 and content["held_out_rows"] == 96 and content["trials"] == 14
    assert (here / "found/trials.png").stat().st_size > 10_000
    assert "n" in report.table()[0] and "<table" in report._repr_html_()


def test_the_command_searches_continues_and_says_how_many_rows(here, capsys):
    words = ["search", "recipe.yaml", "--data", "rows.parquet", "--budget"]
    assert main([*words, "4"]) == 0
    told = capsys.readouterr().out
    assert "on 96 held-out rows, after a search on 224 others" in " ".join(told.split())
    lines = (here / "recipe-search/trials.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[1])["number"] == 0
    assert main([*words, "6", "--format", "json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["trials"] == 6 and [gain["task"] for gain in done["held_out"]] == ["foxes", "both", "mean"]
    assert (here / "recipe-search/trials.jsonl").read_text().splitlines()[:5] == lines
    assert main([*words, "4", "--seed", "1"]) == 1
    assert "trials of another search" in capsys.readouterr().err
    assert main([*words, "4", "--seed", "1", "--overwrite"]) == 0
    rows = datasets.load_dataset("parquet", data_files="rows.parquet", split="train").to_list()
    known = sorted({row["label"] for row in rows})
    changed = [row | {"label": known[known.index(row["label"]) - 1]} for row in rows]
    datasets.Dataset.from_list(changed).to_parquet("changed.parquet")
    assert main([*words[:3], "changed.parquet", "--budget", "4", "--seed", "1"]) == 1
    assert "trials of another search" in capsys.readouterr().err
    assert main(["fuse", "recipe-search/best.yaml", "--output", "merged"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["recipe.yaml", "--data", "rows.parquet", "--split", "test"], 2, "test rows are not searched on"),
        (["recipe.yaml", "--data", "rows.parquet", "--budget", "1"], 2, "at least two trials"),
        (["recipe.yaml", "--data", "rows.parquet", "--task-column", "tsk"], 1, "but no tsk"),
        (["plain.yaml", "--data", "rows.parquet"], 1, "has no range to search"),
        (["recipe.yaml", "--data", "nothing.parquet"], 1, "nothing.parquet does not exist"),
        (["away.yaml", "--data", "rows.parquet"], 1, "there is no folder ./nobody"),
    ],
)
def test_errors_come_before_the_libraries(here, capsys, words, code, message):
    (here / "plain.yaml").write_text("method: linear\nexperts: [foxes, dogs]\n")
    (here / "away.yaml").write_text(RECIPE.replace("foxes", "./nobody"))
    assert main(["search", *words]) == code
    assert message in capsys.readouterr().err
    assert not (here / "recipe-search").exists()


def test_rows_that_cannot_be_measured_are_named_at_once(here, capsys):
    unlabelled = datasets.load_dataset("parquet", data_files="rows.parquet", split="train").remove_columns("label")
    unlabelled.add_column("expert", ["me/foxes"] * len(unlabelled)).to_parquet("unlabelled.parquet")
    words = ["search", "recipe.yaml", "--budget", "4", "--data"]
    assert main([*words, "unlabelled.parquet"]) == 1
    told = capsys.readouterr().err
    assert "but no label" in told and "start" not in told and "held out" not in told
    assert main([*words, "rows.parquet"]) == 0, "no trial was lost, so no --overwrite is needed"


def test_language_models_are_searched_by_their_answers(here):
    base = gpt2()
    for name, model in {"lm": base, "lm-a": fine_tuned(base, 0), "lm-b": fine_tuned(base, 1)}.items():
        model.save_pretrained(here / name)
        make_tokenizer().save_pretrained(here / name)
    (here / "lm.yaml").write_text(
        "method: linear\nexperts: [{model: lm-a, weight: {search: [0, 1]}}, {model: lm-b, weight: 1}]"
    )
    rows = datasets.Dataset.from_dict({"prompt": [f"the fox {i}" for i in range(20)], "target": [" dog"] * 20})
    report = search_recipe("lm.yaml", {"all": rows}, "found", budget=3, metrics={"all": "tokens"})
    assert report.gains[0].metric == "tokens" and (report.searched, report.held_out) == (14, 6)
    assert [expert.weight for expert in report.recipe.experts] == [report.best.parameters["experts[0].weight"], 1]
