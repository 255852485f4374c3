"""A search on tasks of lm-evaluation-harness: scores are the harness's own, and test splits are not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from harness_world import save_models, save_tasks

from hf_fusion import FusionError, evaluate, search_recipe
from hf_fusion.cli.app import main
from hf_fusion.hub.load import load_experts
from hf_fusion.search.harness import HarnessObjective
from hf_fusion.search.objective import mean_score

RECIPE = "method: task_arithmetic\nbase: base\nexperts: [foxes, dogs]\nparameters: {scaling: {search: [0.1, 0.9]}}\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and tasks with a validation split whose rows differ from those of the test split."""
    folder = save_models(tmp_path_factory.mktemp("harness"))
    save_tasks(folder / "tasks", documents=40)
    rows = (folder / "tasks/rows.jsonl").read_text().splitlines()
    (folder / "tasks/rows.jsonl").write_text("\n".join(rows))
    (folder / "tasks/test.jsonl").write_text("not JSON: whoever reads it fails")
    for name in ("which", "says", "text"):
        file = folder / "tasks" / f"{name}.yaml"
        task = yaml.safe_load(file.read_text())
        task["dataset_kwargs"]["data_files"]["validation"] = task["dataset_kwargs"]["data_files"]["train"]
        task["validation_split"] = "validation"
        file.write_text(yaml.safe_dump(task, sort_keys=False))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch) -> Path:
    for entry in world.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_scores_are_the_harnesss_own(here):
    [expert] = load_experts(["foxes"])
    expert.model.processor = expert.processor
    objective = HarnessObjective(expert.model, ["tasks/which.yaml", "tasks/says.yaml"], held_out=0.25)
    assert (objective.searched, objective.held_out) == (60, 20)
    parts = [objective.scores(0, 16), objective.scores(16, 60)]
    rest = objective.held_out_scores()
    assert [len(part["which"]) for part in (*parts, rest)] == [8, 22, 10]
    results = evaluate("foxes", harness=["tasks/which.yaml", "tasks/says.yaml"])  # the test split has the same rows
    wanted = {row.task: row.score for row in results.harness[0].scores if row.metric in ("acc", "exact_match")}
    for task in ("which", "says"):
        found = sum(float(part[task].sum()) for part in (*parts, rest)) / 40
        assert found == pytest.approx(wanted[task])
    assert mean_score(parts, {"which": 1.0, "says": 0.0}) == pytest.approx(
        sum(float(part["which"].sum()) for part in parts) / 30
    )


def test_equal_documents_are_not_separated(here):
    [expert] = load_experts(["foxes"])
    expert.model.processor = expert.processor
    objective = HarnessObjective(expert.model, ["tasks/which.yaml"], held_out=0.25, limit=20)
    search, rest = ({*rows["which"]} for rows in (objective._search, objective._rest))
    assert len(search) + len(rest) == 20 and not search & rest


def test_metrics_that_are_not_means_and_test_splits_alone_are_refused(here):
    [expert] = load_experts(["foxes"])
    expert.model.processor = expert.processor
    with pytest.raises(FusionError, match="bits_per_byte of the task text is not a mean over its documents"):
        HarnessObjective(expert.model, ["tasks/text.yaml"], held_out=0.25).held_out_scores()
    task = yaml.safe_load((here / "tasks/which.yaml").read_text())
    del task["validation_split"], task["fewshot_split"]
    (here / "alone.yaml").write_text(yaml.safe_dump(task | {"task": "alone"}, sort_keys=False))
    with pytest.raises(FusionError, match="the task alone has a test split alone"):
        HarnessObjective(expert.model, ["alone.yaml"], held_out=0.25)
    task |= {"task": "alone", "training_split": "train"}
    (here / "alone.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    assert HarnessObjective(expert.model, ["alone.yaml"], held_out=0.25).held_out == 10


def test_a_genome_runs_on_its_tasks(here, capsys):
    genome = {"models": ["foxes", "dogs"], "merge_method": "task_arithmetic", "base_model": "base"}
    tasks = [{"name": "tasks/which.yaml", "weight": 2.0}]
    (here / "genome.yaml").write_text(yaml.safe_dump({"genome": genome, "tasks": tasks, "limit": 24}))
    assert main(["search", "genome.yaml", "--budget", "3", "--held-out", "0.25", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["searched_rows"], found["held_out_rows"]) == (18, 6)
    assert list(found["best"]["parameters"]) == [f"models[{m}].parameters.weight" for m in (0, 1)]
    assert main(["fuse", "genome-search/best.yaml", "--output", "merged"]) == 0


def test_the_command_runs_tasks(here, capsys):
    words = ["search", "recipe.yaml", "--harness", "tasks/which.yaml"]
    assert main([*words, "--budget", "3", "--fewshot", "1"]) == 0
    assert "after a search on 28 others" in " ".join(capsys.readouterr().out.split())
    for wrong, message in (
        (["--data", "rows.parquet"], "labelled rows or on tasks of the harness"),
        (["--split", "train"], "--split goes with --data"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["search", "recipe.yaml"]) == 2
    assert "a search needs labelled rows or tasks" in capsys.readouterr().err
    with pytest.raises(FusionError, match="one of the two"):
        search_recipe("recipe.yaml", None, "found")
