"""Pushing and reading back through the unmodified client."""

from __future__ import annotations

import os

from huggingface_hub import CommitOperationAdd

CARD = b"---\nlicense: mit\ntags: [irony]\nbase_model: base/one\n---\n# Irony\n"


def test_push_and_read_back(alice, anyone, tmp_path):
    name, api = alice
    repo = f"{name}/irony"
    api.create_repo(repo)
    weights = os.urandom(3_000_000)
    files = {"README.md": CARD, "model.safetensors": weights, "sub/dir/notes.txt": "grüße".encode()}
    pushed = api.create_commit(repo, [CommitOperationAdd(p, data) for p, data in files.items()], commit_message="all")

    folder = tmp_path / "snapshot"
    anyone.snapshot_download(repo, local_dir=folder)
    assert {p: (folder / p).read_bytes() for p in files} == files
    info = anyone.model_info(repo, files_metadata=True)
    assert info.sha == pushed.oid
    assert {"irony", "license:mit", "base_model:base/one", "base_model:finetune:base/one"} <= set(info.tags)
    large = next(s for s in info.siblings if s.rfilename == "model.safetensors")
    assert large.lfs and large.size == len(weights)
    assert [m.id for m in anyone.list_models(filter="irony", author=name)] == [repo]
