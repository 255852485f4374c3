"""Discovery on the embedded Hub, through the unmodified client."""

import json
import re

import pytest
from tiny_experts import LABELS, save_adapter, save_bert
from transformers import AutoModel

from hf_fusion.errors import FusionError
from hf_fusion.hub.compat import check_compatibility
from hf_fusion.hub.discover import discover, info_row

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


def test_a_folder_of_the_same_name_is_not_meant(owner, shelf, tmp_path, monkeypatch):
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


def test_a_sha_stays_the_one_discovered(owner, shelf):
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


def test_reads_no_weights(hub, owner, shelf):
    hub.requests.clear()
    discover(author=owner.name, base_model=f"{owner.name}/base", api=owner.api)
    asked = [path for _, path, *_ in hub.requests]
    assert any("adapter_config.json" in path for path in asked)
    assert not [path for path in asked if re.search(r"\.safetensors|\.bin", path)]


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
    with pytest.raises(FusionError, match="Nothing narrows the search"):
        discover(tags=None, api=owner.api)
    with pytest.raises(FusionError, match="nobody/nothing was not found"):
        discover(ids=["nobody/nothing"], api=owner.api)
    with pytest.raises(FusionError, match="Collection nobody/none-0123456789abcdef01234567 was"):
        discover(collection="nobody/none-0123456789abcdef01234567", api=owner.api)
