"""The mutations that the fuzz tests use change what their names say."""

from __future__ import annotations

import json

import pytest
import torch
from mutations import mutated, mutations, sample
from safetensors.torch import load_file, save_file

CONFIG = {"a": 1, "rows": [{"name": "x"}, {"name": "y"}]}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x": torch.ones(4, 2), "y": torch.ones(3)}, path / "model.safetensors")
    return path


def done(folder, name):
    [found] = [mutation for mutation in mutations(folder) if mutation.name == name]
    return mutated(folder, found, folder.parent / "copy")


def test_mutations_are_distinct_and_keep_the_original(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = mutations(folder)
    assert len({mutation.name for mutation in found}) == len(found) > 300
    for mutation in found:
        mutated(folder, mutation, folder.parent / "copy")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [m.name for m in sample(found, 50)] == [m.name for m in sample(mutations(folder), 50)]
    drawn = sample(found, 50)
    assert sum(m.name.startswith("config.json") for m in drawn) == 25


def test_values_bytes_and_tensors_are_changed(folder):
    copy = done(folder, "config.json['rows'][1]['name']: deleted")
    assert json.loads((copy / "config.json").read_text()) == {"a": 1, "rows": [{"name": "x"}, {}]}
    copy = done(folder, "config.json['rows']: reversed")
    assert json.loads((copy / "config.json").read_text())["rows"] == CONFIG["rows"][::-1]
    assert not (done(folder, "config.json: removed") / "config.json").exists()
    tensors = load_file(done(folder, "model.safetensors: x holds nan") / "model.safetensors")
    assert tensors["x"].isnan().sum() == 1
    assert torch.equal(tensors["y"], torch.ones(3))
    tensors = load_file(done(folder, "model.safetensors: valid, x has one row less") / "model.safetensors")
    assert tensors["x"].shape == (3, 2)
    assert list(load_file(done(folder, "model.safetensors: valid, x is missing") / "model.safetensors")) == ["y"]
