"""Files that are written before their shapes are known: safetensors reads them as any other."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_fusion.merging.engine.checkpoint import OpenFiles, read_header
from hf_fusion.merging.engine.growing_file import GrowingFile
from hf_fusion.merging.engine.tensors import CHUNK


def test_tensors_are_read_as_they_were_added(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        'ä "quoted" 名': torch.randn(7).bfloat16(),
        "transposed": torch.randn(4, 6).T,
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    copied = {"copied": torch.randn(CHUNK + 11).half(), "flags": torch.tensor([True, False])}
    save_file(copied, tmp_path / "other.safetensors")
    names, opened = [*tensors, *copied, "never added"], OpenFiles()
    with GrowingFile(tmp_path / "grown.safetensors", names) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        for name, entry in read_header(tmp_path / "other.safetensors").items():
            file.copy(name, entry, opened)
        assert sorted(file.names) == sorted({**tensors, **copied})
        assert file.nbytes == sum(tensor.nbytes for tensor in (*tensors.values(), *copied.values()))
    opened.close()
    loaded = load_file(tmp_path / "grown.safetensors")
    assert loaded.keys() == {*tensors, *copied}
    for name, tensor in {**tensors, **copied}.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert read_header(tmp_path / "grown.safetensors").keys() == loaded.keys()
    with safe_open(tmp_path / "grown.safetensors", "pt") as read:
        assert read.metadata() == {"format": "pt"}


def test_an_aborted_file_is_not_valid(tmp_path):
    with pytest.raises(KeyboardInterrupt), GrowingFile(tmp_path / "grown.safetensors", ["a"]) as file:
        file.add("a", torch.zeros(2))
        raise KeyboardInterrupt
    with pytest.raises(Exception, match="not a valid|does not fit|too small|begins|end"):
        read_header(tmp_path / "grown.safetensors")
