"""The Hub suites from end to end, through the command line and the Hub's client, with stand-ins under the real ids."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from quick_python import run_python
from safetensors.torch import load_file
from standin_data import DATA, ROWS
from standins import fill, make_here, push, resnet_encoder

from hf_fusion.bench.cells import read_cells
from hf_fusion.bench.sources import is_hub_id
from hf_fusion.bench.suite import load_suite, suite_names
from hf_fusion.hub.load import load_experts
from hf_fusion.server import HubServer

HUB_SUITES = [name for name in suite_names() if not load_suite(name).is_local]
EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = {  # kind -> something that is fused, beside what each kind has
    "merging": ["pretrained", "average", "task_arithmetic", "individual"],
    "routing": ["pretrained", "uniform", "experts"],
    "fusion": ["foe_selection", "individual"],
    "regression": ["experts", "simple_ensemble", "weighted_ensemble", "foe"],
}
OTHERS = {"phatgoose": ["pretrained", "phatgoose"]}  # beginning of a suite's name -> what is fused there
TWO = """\
extends: gpt2-glue
title: two of seven
tasks:
  cola: {columns: {text: sentence}}
  rte: {columns: {text: sentence1, text_pair: sentence2}}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub of its own: the ids are the real ones."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def python(hub, tmp_path):
    """Runs Python in a process that knows this Hub alone and has an empty cache; its stdout."""

    def run(*words: str) -> str:
        given = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        given["HF_FUSION_CACHE"] = str(tmp_path / "cache")
        done = run_python(*words, env={**os.environ, **given}, cwd=tmp_path, timeout=500)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def run_suite(python, suite: str | Path, methods: list[str], output: Path):
    """The cells of a run with few rows."""
    words = ["bench", "run", "--suite", str(suite), "--methods", *methods, "--limit", "6", "--tuned-on", "3"]
    python("-m", "hf_fusion.cli", *words, "--output", str(output))
    return read_cells(output)


@pytest.mark.slow
def test_two_tasks_from_end_to_end(hub, python, tmp_path):
    fill(hub, "gpt2-glue", ("cola", "rte"))
    (tmp_path / "two.yaml").write_text(TWO)
    cells = run_suite(python, tmp_path / "two.yaml", METHODS["merging"], tmp_path / "out")
    assert {cell.status for cell in cells} == {"measured"}, [cell.reason for cell in cells]
    assert {(cell.method, cell.task) for cell in cells} == {
        (method, task) for method in METHODS["merging"] for task in ("cola", "rte")
    }
    assert {cell.n for cell in cells} == {6}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB_SUITES)
def test_every_suite_of_the_hub_from_end_to_end(name, hub, python, tmp_path):
    suite = load_suite(name)
    methods = OTHERS.get(name.partition("-")[0], METHODS[suite.kind])
    fill(hub, suite)
    make_here(suite, tmp_path / "cache")
    checked = json.loads(python("-m", "hf_fusion.cli", "bench", "check", name, "--format", "json"))
    assert {row["status"] for row in checked} == {"there"}
    cells = run_suite(python, name, methods, tmp_path / "out")
    assert {cell.task for cell in cells} == set(suite.tasks)
    assert not [f"{cell.method} {cell.task}: {cell.reason}" for cell in cells if cell.status == "failed"]
    measured = {cell.method for cell in cells if cell.status == "measured"}
    assert {"experts" if name.startswith("expert:") else name for name in measured} >= {*methods} - {"individual"}


@pytest.mark.slow
def test_experts_of_superclasses_are_trained_by_their_command(hub, python, tmp_path):
    fill(hub, "foe-cifar100")
    make_here(load_suite("foe-cifar100"), tmp_path / "cache")
    made = tmp_path / "cache" / "foe-cifar100" / "domain-3"
    shutil.rmtree(made)
    said = python(str(EXAMPLES / "train_superclass_experts.py"), "--epochs", "1")
    assert said.count("test rows") == said.count("domain-3: ") == 1  # the others are there already
    [expert] = load_experts([made])
    assert expert.labels == [f"class {number}" for number in range(20)]
    assert "trained from random weights on" in (made / "README.md").read_text()
    cells = run_suite(python, "foe-cifar100", ["foe", "simple_ensemble"], tmp_path / "out")
    assert {cell.status for cell in cells} == {"measured"}, [cell.reason for cell in cells]


ROWS_OF = """
import json, sys
from datasets import disable_progress_bars
from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.suite import load_suite
disable_progress_bars()
found = {}
for name, tasks in json.loads(sys.argv[1]).items():
    for task in tasks:
        rows = task_rows(load_suite(name), task)
        parts = [None if part is None else len(part) for part in (rows.train, rows.fit, rows.test)]
        label = rows.test.features.get("label")
        columns = {key: str(value) for key, value in rows.test[0].items()}
        found[f"{name} {task}"] = [parts, columns, getattr(label, "names", None)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_rows_of_all_suites_come_with_our_columns(hub, python):
    wanted = {name: list(load_suite(name).tasks)[:8] for name in HUB_SUITES}
    for name, tasks in wanted.items():
        fill(hub, name, tuple(tasks))
    found = json.loads(python("-c", ROWS_OF, json.dumps(wanted)))
    assert len(found) == sum(map(len, wanted.values()))
    for key, (parts, columns, classes) in found.items():
        name, task = key.split()
        own = load_suite(name).tasks[task]
        written = {"prompt", "target", *(["choices", "right"] if own.metric == "ranked" else [])}
        want = written if own.prompt else set(columns) & {"text", "text_pair", "image", "label"}
        assert set(columns) == want
        assert own.prompt or "label" in columns
        if own.classes:
            assert classes == list(own.classes)
        split_off = parts[1] + parts[2] if own.fitting.split == "test" else (parts[0] or 0) + parts[1]
        assert split_off == ROWS * (4 if load_suite(name).ask else 1) or own.fitting.split == "validation"
    columns = found["flan-t5-base-glue qnli"][1]
    assert columns["prompt"].startswith("Given the context: '")
    assert columns["target"] in ("yes", "no")
    assert found["gpt2-glue qnli"][2] == ["entailment", "not_entailment"]


def test_stand_ins_cover_every_hub_suite():
    named = {task.data for name in HUB_SUITES for task in load_suite(name).tasks.values()}
    assert named == set(DATA)
    assert all(map(is_hub_id, named))
    assert len(HUB_SUITES) == 19


@pytest.mark.slow
def test_dense_experts_are_trained_by_the_build_command_and_measured(hub, python, tmp_path):
    """A tiny ResNet under the base's id; its experts learn something from a few rows."""
    suite = load_suite("resnet50-nyuv2")
    fill(hub, suite)
    push(hub, "microsoft/resnet-50")
    _, script, *options = (suite.build or "").split()
    command = [str(Path(__file__).parents[2] / script), *options]  # the process runs in another folder
    cache = tmp_path / "cache" / "nyuv2"
    python(*command, "--expert", "depth", "--epochs", "1", "--rows", "16")
    assert {path.name for path in cache.iterdir()} == {"base", "depth"}
    weights = (cache / "depth" / "model.safetensors").read_bytes()
    python(*command, "--epochs", "10")
    assert (cache / "depth" / "model.safetensors").read_bytes() == weights  # what is there is left alone
    assert "base_model: microsoft/resnet-50" in (cache / "normal" / "README.md").read_text()
    encoder = load_file(cache / "base" / "model.safetensors")
    for name, tensor in resnet_encoder().resnet.state_dict().items():
        assert torch.equal(encoder[f"backbone.{name}"], tensor)
    cells = run_suite(python, suite.name, ["pretrained", "average", "individual"], tmp_path / "out")
    scores = {(cell.method, cell.task): cell.score for cell in cells}
    assert scores["individual", "segmentation"] > 0.5  # one answer everywhere: 0.25
    assert scores["individual", "normal"] < 30  # normals of chance: 90
    assert len(scores) == 9 and all(map(math.isfinite, scores.values()))
