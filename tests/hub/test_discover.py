"""Discovery on the embedded Hub, through the unmodified client."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import LABELS, save_adapter, save_bert
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_fusion.errors import FusionError
from hf_fusion.hub.compat import check_compatibility
from hf_fusion.hub.discover import discover, info_row
from hf_fusion.hub.remote_files import read_header, read_range

CARD = "license: MIT\ntags: [hf-fusion-expert, mood]\npipeline_tag: text-classification\nbase_model: some/base"


@pytest.fixture
def shelf(owner, tmp_path):
    """A full expert with a card, an untagged adapter as PEFT pushes it, its base, and something else."""
    base = save_bert(tmp_path / "base", auto=AutoModel)
    full = save_bert(tmp_path / "full", card=CARD)
    shas = {"base": owner.push("base", base), "full": owner.push("full", full)}
    save_adapter(tmp_path / "irony", base, base_name=f"{owner.name}/base", revision=shas["base"])
    shas["irony"] = owner.push("irony", tmp_path / "irony")
    return shas


def test_by_tag_pins_and_reads(owner, shelf, tmp_path):
    found = discover(author=owner.name, api=owner.api)
    assert [info.id for info in found] == [f"{owner.name}/full"]
    (info,) = found
    assert info.pinned == f"{owner.name}/full@{shelf['full']}"
    assert (info.task, info.license, info.base_model) == ("text-classification", "mit", "some/base")
    assert (info.architecture, info.labels, info.is_adapter) == ("BertForSequenceClassification", LABELS, False)
    assert info.size == (tmp_path / "full" / "model.safetensors").stat().st_size
    assert {"hf-fusion-expert", "mood"} <= set(info.tags)
    assert found.table()[0]["labels"] == "no, yes, maybe"
    assert discover(tags=["hf-fusion-expert", "other"], author=owner.name, api=owner.api).table() == []


def test_folder_named_like_a_repo_is_not_used(owner, shelf, tmp_path, monkeypatch):
    (tmp_path / "here" / owner.name / "full").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (info,) = discover(author=owner.name, api=owner.api)
    assert info.sha == shelf["full"]
    assert check_compatibility([info], api=owner.api).accepted == [info]


def test_untagged_adapters_of_a_base(owner, shelf):
    (info,) = discover(base_model=f"{owner.name}/base", author=owner.name, api=owner.api)
    assert (info.id, info.is_adapter, info.architecture) == (f"{owner.name}/irony", True, None)
    assert (info.base_model, info.base_revision) == (f"{owner.name}/base", shelf["base"])
    assert (info.task, info.labels, info.has_gates) == ("text-classification", ("no", "yes"), False)


def test_discovered_sha_is_kept(owner, shelf):
    (before,) = discover(author=owner.name, api=owner.api)
    owner.api.upload_file(repo_id=before.id, path_in_repo="note.txt", path_or_fileobj=b"new")
    (after,) = discover(author=owner.name, api=owner.api)
    assert after.sha != before.sha
    (pinned,) = discover(ids=[before.pinned], api=owner.api)
    assert pinned.sha == before.sha


def test_by_ids_collection_task_and_limit(owner, shelf):
    ids = [f"{owner.name}/full", f"{owner.name}/irony"]
    assert [info.id for info in discover(ids=ids, api=owner.api)] == ids
    assert len(discover(ids=ids, limit=1, api=owner.api)) == 1
    assert discover(ids=ids, task="text-generation", api=owner.api).table() == []
    collection = owner.api.create_collection("Moods", namespace=owner.name)
    for name in ids:
        owner.api.add_collection_item(collection.slug, name, "model")
    found = discover(collection=collection.slug, base_model="some/base", api=owner.api)
    assert [info.id for info in found] == ids[:1]


def asked_for(hub, owner):
    """The requests that each repo of an owner met, as "METHOD file"."""
    found = {}
    for method, path, _ in hub.requests:
        if match := re.search(rf"/{owner.name}/([\w-]+)/(?:resolve|revision)/[0-9a-f]+/?(.*)", path):
            found.setdefault(match[1], []).append(f"{method} {match[2]}")
    return found


def test_discovery_and_check_take_three_requests_per_expert(hub, owner, shelf):
    hub.requests.clear()
    found = discover(author=owner.name, base_model=f"{owner.name}/base", api=owner.api)
    adapter = ["GET adapter_config.json", "GET adapter_model.safetensors", "GET config.json"]
    assert sorted(asked_for(hub, owner)["irony"]) == adapter
    assert check_compatibility(found, api=owner.api).accepted == list(found)
    assert sorted(asked_for(hub, owner)["irony"]) == adapter  # the check asked for nothing that was known
    hub.requests.clear()
    full = discover(author=owner.name, api=owner.api)
    assert check_compatibility(full, api=owner.api).accepted == list(full)
    assert sorted(asked_for(hub, owner)["full"]) == [
        *("GET config.json", "GET model.safetensors", "GET tokenizer_config.json")
    ]


def test_only_headers_of_weights_are_read(owner, tmp_path):
    path = tmp_path / "large.safetensors"
    save_file(
        {f"layer.{i}.weight": torch.zeros(2, 700) for i in range(1500)}, path
    )  # a header of 0.1 MB, 8.4 MB in all
    owner.api.create_repo(f"{owner.name}/large")
    sha = owner.api.upload_file(repo_id=f"{owner.name}/large", path_in_repo="w.safetensors", path_or_fileobj=path).oid
    part = read_range(owner.api, f"{owner.name}/large", "w.safetensors", sha, 10, 110)
    assert (part.data, part.size) == (path.read_bytes()[10:110], path.stat().st_size)
    header = read_header(owner.api, f"{owner.name}/large", "w.safetensors", sha)
    assert header.size == path.stat().st_size and len(header.shapes) == 1500
    assert set(header.shapes.values()) == {(2, 700)}


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, (90).to_bytes(8, "little") + b"{" * 90])
def test_invalid_safetensors_file_is_reported(owner, content):
    owner.api.create_repo(f"{owner.name}/odd")
    where = {"repo_id": f"{owner.name}/odd", "path_in_repo": "w.safetensors"}
    sha = owner.api.upload_file(path_or_fileobj=content, **where).oid
    with pytest.raises(FusionError, match=r"odd: w.safetensors is not a safetensors file"):
        read_header(owner.api, f"{owner.name}/odd", "w.safetensors", sha)


@pytest.mark.parametrize("shards", [False, True])
def test_sizes_equal_those_of_the_files(owner, tmp_path, shards):
    folder = save_bert(tmp_path / "full", card=CARD)
    if shards:
        AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
        (folder / "model.safetensors").unlink()
    owner.push("sized", folder)
    (listed,) = discover(author=owner.name, api=owner.api)
    (named,) = discover(ids=[f"{owner.name}/sized"], api=owner.api)
    files = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    assert named.size == files + sum(path.stat().st_size for path in folder.glob("*.index.json"))
    tensors = sum(tensor.nbytes for path in folder.glob("model*.safetensors") for tensor in load_file(path).values())
    assert listed.size == (tensors if shards else files)  # an index tells the bytes of the tensors


def test_gates_private_and_gated(owner, anyone, tmp_path):
    folder = save_bert(tmp_path / "full", card=CARD)
    (folder / "phatgoose_gates.safetensors").write_bytes(b"")
    owner.push("secret", folder, private=True)
    owner.push("terms", folder)
    owner.api.update_repo_settings(f"{owner.name}/terms", gated="manual")
    (seen,) = discover(author=owner.name, api=anyone)
    assert (seen.id, seen.gated, seen.license, seen.labels) == (f"{owner.name}/terms", True, "mit", ())
    terms, secret = sorted(discover(author=owner.name, api=owner.api), key=lambda info: info.private)
    assert (secret.private, secret.gated, secret.has_gates) == (True, False, True)
    assert info_row(secret)["gates"] == "yes"
    assert (terms.private, terms.gated) == (False, True)


def test_broken_files_do_not_stop_it(owner, tmp_path):
    folder = save_bert(tmp_path / "full", card=CARD)
    (folder / "config.json").write_text("{")
    owner.push("broken", folder)
    (folder / "config.json").write_text(json.dumps({"id2label": {"x": 1}, "architectures": None}))
    owner.push("odd", folder)
    assert {(info.labels, info.architecture) for info in discover(author=owner.name, api=owner.api)} == {((), None)}


def test_errors_name_the_next_step(owner):
    with pytest.raises(FusionError, match="nothing narrows the search"):
        discover(tags=None, api=owner.api)
    with pytest.raises(FusionError, match="nobody/nothing was not found"):
        discover(ids=["nobody/nothing"], api=owner.api)
    with pytest.raises(FusionError, match="collection nobody/none-0123456789abcdef01234567 was"):
        discover(collection="nobody/none-0123456789abcdef01234567", api=owner.api)
