"""Shards divided over processes: the same bytes, and a failure of one stops all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from on_disk import merge_here, models, recipe_of, started_quickly, weights_of
from safetensors.torch import load_file, save_file
from tiny import llama

import hf_fusion
from hf_fusion.merging.engine.checkpoint import SINGLE
from hf_fusion.merging.engine.output import staging_path
from hf_fusion.merging.merge import merge

OPTIONS = {"shard_bytes": 20_000, "threads": 1}  # a shard for each tensor
SHAPES = {f"layers.{i}.weight": (64, 64) for i in range(7)}
RUN = """
import sys
sys.path[:0] = sys.argv[3:]
from on_disk import merge_here
merge_here(sys.argv[1], sys.argv[2], {"shard_bytes": 20_000, "threads": 1})
"""
# one expert from a folder, one from memory
FUSE = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import hf_fusion
place = Path(sys.argv[1])
two = AutoModelForCausalLM.from_pretrained(place / "two")
try:
    hf_fusion.fuse("dare_linear", [place / "one", place / "nowhere"], place / "base")
except hf_fusion.FusionError as error:
    (place / f"error-{os.environ['RANK']}").write_text(str(error))
model = hf_fusion.fuse("dare_linear", [place / "one", two], place / "base", seed=5)
assert model.fusion_recipe.experts[1].model == "two", model.fusion_recipe
save_file(model.state_dict(), place / f"rank-{os.environ['RANK']}.safetensors")
hf_fusion.save_fused(model, place / "saved")
"""


@pytest.fixture
def folders(tmp_path):
    return models(tmp_path / "inputs", shapes=SHAPES)


def together(recipes, out):
    """Runs as many processes as there are recipes, with torchrun's words: what each has to tell, or None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(len(recipes)), "LOCAL_WORLD_SIZE": str(len(recipes)), "MASTER_ADDR": "127.0.0.1"}
    started = []
    for number, recipe in enumerate(recipes):
        ours, theirs = multiprocessing.Pipe()
        rank = {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": str(port)}
        args = (str(recipe), str(out), OPTIONS, None, theirs, {**shared, **rank})
        process = started_quickly().Process(target=merge_here, args=args)
        process.start()
        started.append((process, ours))
    return started


def told(started):
    for process, _ in started:
        process.join(60)
        assert process.exitcode == 0
    ends = [pipe.recv() for _, pipe in started]
    return [end and end[0] for end in ends]


@pytest.mark.process
@pytest.mark.parametrize("count", [2, 3])
def test_the_bytes_of_one_process(count, folders, tmp_path):
    recipe_of(folders, "dare_ties", seed=5).save(tmp_path / "recipe.yaml")
    assert told(together([tmp_path / "recipe.yaml"] * count, tmp_path / "many")) == [None] * count
    merge(recipe_of(folders, "dare_ties", seed=5), tmp_path / "one", **OPTIONS)
    assert weights_of(tmp_path / "many") == weights_of(tmp_path / "one")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.process
@pytest.mark.parametrize("failing", [0, 1])
def test_failure_of_one_process_stops_all(failing, folders, tmp_path):
    """NaN in a tensor of a shard that one process writes; the other hears of it, and nothing is left."""
    file = folders[1] / SINGLE
    tensors = load_file(file)
    tensors[f"layers.{4 + failing}.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    recipe_of(folders).save(tmp_path / "recipe.yaml")
    errors = told(together([tmp_path / "recipe.yaml"] * 2, tmp_path / "out"))
    assert errors[failing] == f"layers.{4 + failing}.weight of expert 1 has NaN or Inf"
    assert errors[1 - failing] == f"process {failing} of 2 failed: {errors[failing]}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "recipe.yaml"]


@pytest.mark.process
def test_input_missing_on_one_machine(folders, tmp_path):
    recipe_of(folders).save(tmp_path / "recipe.yaml")
    recipe_of([*folders, tmp_path / "nowhere"]).save(tmp_path / "other.yaml")
    errors = told(together([tmp_path / "recipe.yaml", tmp_path / "other.yaml"], tmp_path / "out"))
    assert "nowhere" in errors[1] and errors[0] == f"process 1 of 2 failed: {errors[1]}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "other.yaml", "recipe.yaml"]


@pytest.mark.process
def test_output_error_of_the_main_process_reaches_all(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work.py").write_text("mine")
    recipe_of(folders).save(tmp_path / "recipe.yaml")
    errors = told(together([tmp_path / "recipe.yaml"] * 2, tmp_path / "out"))
    assert "holds work.py" in errors[0] and errors[1] == f"process 0 of 2 failed: {errors[0]}"


@pytest.mark.process
def test_killed_process_is_not_waited_for(tmp_path):
    folders = models(tmp_path / "inputs", shapes={f"layers.{i}.weight": (256, 256) for i in range(40)})
    recipe_of(folders, "dare_ties").save(tmp_path / "recipe.yaml")
    started = together([tmp_path / "recipe.yaml"] * 2, tmp_path / "out")
    began = time.monotonic()
    while not list(staging_path(tmp_path / "out").glob("*.safetensors")):
        assert time.monotonic() - began < 30
    os.kill(started[1][0].pid, signal.SIGKILL)
    [error] = told(started[:1])
    assert "one of 2 processes has ended" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "recipe.yaml"]


def launched(script, *arguments, **env):
    """Runs a script in two processes; `--multi_gpu` without a GPU is torchrun on gloo."""
    launch = "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --multi_gpu"
    launch += " --num_processes 2 --main_process_port 0"
    command = [sys.executable, *launch.split(), script, *arguments]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_accelerate_launch(folders, tmp_path):
    recipe_of(folders, "dare_ties", seed=5).save(tmp_path / "recipe.yaml")
    (tmp_path / "run.py").write_text(RUN)
    launched(tmp_path / "run.py", tmp_path / "recipe.yaml", tmp_path / "many", *filter(None, sys.path))
    merge(recipe_of(folders, "dare_ties", seed=5), tmp_path / "one", **OPTIONS)
    assert weights_of(tmp_path / "many") == weights_of(tmp_path / "one")


@pytest.mark.slow
def test_the_verb_in_python_shares_a_merge_and_returns_it_everywhere(tmp_path):
    for seed, name in enumerate(("base", "one", "two")):
        llama(seed).save_pretrained(tmp_path / name)
    (tmp_path / "run.py").write_text(FUSE)
    (tmp_path / "held").mkdir()
    launched(tmp_path / "run.py", tmp_path, TMPDIR=str(tmp_path / "held"))
    model = hf_fusion.fuse("dare_linear", [tmp_path / "one", tmp_path / "two"], tmp_path / "base", seed=5)
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == model.state_dict().keys()
        assert all(tensor.equal(found[name]) for name, tensor in model.state_dict().items())
        assert "nowhere" in (tmp_path / f"error-{rank}").read_text()
    assert hf_fusion.load_fused(tmp_path / "saved")[1] == hf_fusion.load_recipe(tmp_path / "saved")
    assert not list((tmp_path / "held").glob("hf-fusion-*"))  # nothing left behind
