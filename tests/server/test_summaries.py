"""Summaries for lists are stored on disk: read at a restart, updated by commits, rebuilt if damaged."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import HfApi

from hf_fusion.server import HubServer
from hf_fusion.server import info as derivation
from hf_fusion.server.summaries import FILE, FORMAT


def card(tag):
    return f"---\ntags: [{tag}]\nlicense: mit\n---\n# Card\n".encode()


def listed(endpoint):
    """Every property of the one repo, as a list shows it."""
    expand = ["sha", "tags", "cardData", "siblings", "pipeline_tag", "downloads", "lastModified", "safetensors"]
    (found,) = HfApi(endpoint=endpoint, token=False).list_models(expand=expand)
    return {name: value for name, value in vars(found).items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    """A Hub folder with one repo that has been listed."""
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("me"))
        api.create_repo("me/one")
        api.upload_file(repo_id="me/one", path_in_repo="README.md", path_or_fileobj=card("first"))
        assert "first" in listed(hub.endpoint)["tags"]
    return tmp_path / "hub"


def kept(folder):
    return folder / "repos" / "models" / "me" / "one.git" / FILE


def test_restart_rebuilds_no_summaries(folder):
    with HubServer(folder) as hub:
        before = derivation.facts.cache_info().misses
        assert "first" in listed(hub.endpoint)["tags"]
        assert derivation.facts.cache_info().misses == before


def test_summary_equals_the_repo(folder):
    with HubServer(folder) as hub:
        row = listed(hub.endpoint)
        alone = HfApi(endpoint=hub.endpoint, token=False).model_info("me/one")
        assert (row["sha"], row["tags"]) == (alone.sha, alone.tags)
        assert [file.rfilename for file in row["siblings"]] == [file.rfilename for file in alone.siblings]
        assert row["card_data"].to_dict() == alone.card_data.to_dict()


def test_a_commit_and_a_download_show_at_once(folder, tmp_path):
    with HubServer(folder) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("me"))
        listed(hub.endpoint)
        sha = api.upload_file(repo_id="me/one", path_in_repo="README.md", path_or_fileobj=card("second")).oid
        assert listed(hub.endpoint)["sha"] == sha and "second" in listed(hub.endpoint)["tags"]
        api.upload_file(repo_id="me/one", path_in_repo="config.json", path_or_fileobj=b"{}")
        for count in (1, 2):
            api.hf_hub_download("me/one", "config.json", cache_dir=tmp_path / str(count))
            assert listed(hub.endpoint)["downloads"] == count
        api.move_repo("me/one", "me/other")
        assert [model.id for model in api.list_models()] == ["me/other"]
        api.update_repo_settings("me/other", private=True)
        assert list(HfApi(endpoint=hub.endpoint, token=False).list_models()) == []
    with HubServer(folder) as hub:  # and are there after a restart
        (row,) = HfApi(endpoint=hub.endpoint, token=hub.token("me")).list_models(expand=["downloads", "tags"])
        assert (row.id, row.downloads) == ("me/other", 2) and "second" in row.tags


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\0", b"[1]", b"{}", b"[" * 100_000, b'{"format": 1, "sha": "x", "properties": {}}'],
)
def test_damaged_summary_is_rebuilt(folder, content):
    good = kept(folder).read_bytes()
    kept(folder).write_bytes(content)
    with HubServer(folder) as hub:
        assert "first" in listed(hub.endpoint)["tags"]
    assert kept(folder).read_bytes() == good


def test_summary_of_another_version_is_rebuilt(folder):
    old = json.loads(kept(folder).read_bytes())
    kept(folder).write_text(json.dumps({**old, "format": FORMAT - 1, "properties": {**old["properties"], "tags": []}}))
    with HubServer(folder) as hub:
        assert "first" in listed(hub.endpoint)["tags"]


def test_unwritable_folder_is_listed(folder):
    kept(folder).unlink()
    kept(folder).mkdir()  # nothing can be renamed onto a folder
    with HubServer(folder) as hub:
        assert "first" in listed(hub.endpoint)["tags"]
