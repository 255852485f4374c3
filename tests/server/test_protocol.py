"""The protocol apart from pushes and lists: accounts, repos, trees, references, downloads, collections."""

from __future__ import annotations

import hashlib
import os
from datetime import datetime, timezone
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, RepoFolder, get_session, hf_hub_url
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = os.urandom(150_000)


@pytest.fixture
def repo(alice) -> str:
    """A repo with small and large files in folders."""
    name, api = alice
    files = {"a.txt": b"alpha", "dir/b.txt": b"beta", "dir/deep/c.bin": LARGE, "with space/ü.txt": b"gamma"}
    api.create_repo(f"{name}/repo")
    adds = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.create_commit(f"{name}/repo", adds, commit_message="files")
    return f"{name}/repo"


# --- accounts and repos ------------------------------------------------------------------------------------------


def test_whoami(hub, alice):
    name, api = alice
    hub.org(f"{name}-org", [name])
    me = api.whoami()
    assert (me["type"], me["name"], me["auth"]["type"]) == ("user", name, "access_token")
    assert [org["name"] for org in me["orgs"]] == [f"{name}-org"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


def test_create_repo(alice):
    name, api = alice
    url = api.create_repo("short")  # without an owner it is the caller's
    assert url.repo_id == f"{name}/short" and url == f"{api.endpoint}/{name}/short"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(f"{name}/short")
    assert api.create_repo(f"{name}/SHORT", exist_ok=True).repo_id.lower() == f"{name}/short"
    with pytest.raises(HfHubHTTPError, match="400"):
        get_session_post(api, "/api/repos/create", {"name": "../up"})
    with pytest.raises(HfHubHTTPError, match="400"):
        get_session_post(api, "/api/repos/create", {"name": "x", "type": "../model"})


def get_session_post(api, path: str, body: dict) -> None:
    headers = {"Authorization": f"Bearer {api.token}"}
    response = get_session().post(api.endpoint + path, json=body, headers=headers)
    if response.status_code != 200:
        raise HfHubHTTPError(f"{response.status_code} {response.text}", response=response)


def test_delete_and_move(alice):
    name, api = alice
    api.create_repo(f"{name}/old")
    api.upload_file(repo_id=f"{name}/old", path_or_fileobj=b"x", path_in_repo="x")
    api.move_repo(f"{name}/old", f"{name}/new")
    assert not api.repo_exists(f"{name}/old")
    assert "x" in api.list_repo_files(f"{name}/new")
    api.create_repo(f"{name}/old")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.move_repo(f"{name}/old", f"{name}/new")
    api.delete_repo(f"{name}/new")
    assert not api.repo_exists(f"{name}/new")
    api.delete_repo(f"{name}/new", missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(f"{name}/new")
    api.create_repo(f"{name}/new")
    assert api.list_repo_files(f"{name}/new") == [".gitattributes"]


def test_missing_repos_revisions_and_files_have_distinct_errors(repo, anyone):
    with pytest.raises(RepositoryNotFoundError):
        anyone.model_info("nobody/nothing")
    with pytest.raises(RepositoryNotFoundError):
        anyone.model_info("gpt2")  # a name without an owner
    with pytest.raises(RepositoryNotFoundError):
        anyone.hf_hub_download("gpt2", "config.json")
    for revision in ("nope", "refs/pr/9", "0" * 40, "a//b"):
        with pytest.raises(RevisionNotFoundError):
            anyone.model_info(repo, revision=revision)
    with pytest.raises(EntryNotFoundError) as error:
        anyone.hf_hub_download(repo, "nope.txt")
    assert error.value.response.headers["X-Repo-Commit"] == anyone.model_info(repo).sha
    with pytest.raises(EntryNotFoundError):
        list(anyone.list_repo_tree(repo, "nope"))
    assert not anyone.file_exists(repo, "nope.txt") and anyone.file_exists(repo, "a.txt")
    assert not anyone.revision_exists(repo, "nope") and anyone.revision_exists(repo, "main")


def test_auth_check(repo, alice, anyone, user):
    _, api = alice
    _, other = user()
    anyone.auth_check(repo)
    api.auth_check(repo, write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        other.auth_check(repo, write=True)


def test_telemetry_is_welcome(hub):
    assert get_session().head(f"{hub.endpoint}/api/telemetry/transformers/x").status_code == 200


# --- information -------------------------------------------------------------------------------------------------


def test_repo_info(repo, anyone):
    info = anyone.model_info(repo, files_metadata=True)
    found = {sibling.rfilename: sibling for sibling in info.siblings}
    assert found["a.txt"].size == 5 and found["a.txt"].lfs is None
    large = found["dir/deep/c.bin"]
    assert large.lfs.sha256 == hashlib.sha256(LARGE).hexdigest() and large.lfs.size == len(LARGE)
    assert abs((datetime.now(timezone.utc) - info.last_modified).total_seconds()) < 60
    assert anyone.model_info(repo, revision=info.sha[:9]).sha == info.sha
    few = anyone.model_info(repo, expand=["sha", "downloads"])
    assert (few.sha, few.downloads, few.tags, few.siblings) == (info.sha, 0, None, None)


def test_tree(repo, anyone):
    top = {entry.path: entry for entry in anyone.list_repo_tree(repo)}
    assert sorted(top) == [".gitattributes", "a.txt", "dir", "with space"]
    assert isinstance(top["dir"], RepoFolder)
    assert [e.path for e in anyone.list_repo_tree(repo, "dir/deep")] == ["dir/deep/c.bin"]
    assert [e.path for e in anyone.list_repo_tree(repo, "with space")] == ["with space/ü.txt"]
    every = list(anyone.list_repo_tree(repo, recursive=True, expand=True))
    assert {"dir", "dir/b.txt", "dir/deep", "dir/deep/c.bin"} <= {e.path for e in every}
    titles = {e.path: e.last_commit.title for e in every}
    assert titles["a.txt"] == titles["dir/deep"] == "files" and titles[".gitattributes"] == "initial commit"


def test_long_trees_come_in_pages(alice):
    name, api = alice
    repo = f"{name}/many"
    api.create_repo(repo)
    adds = [CommitOperationAdd(f"d{n % 7}/f{n:04}.txt", b"x") for n in range(1100)]
    api.create_commit(repo, adds, commit_message="many")
    entries = [e.path for e in api.list_repo_tree(repo, recursive=True)]
    assert len(entries) == len(set(entries)) == 1100 + 7 + 1
    some = [e.path for e in api.list_repo_tree(repo, "d3", expand=True)]
    assert len(some) == len(set(some)) == 157


def test_paths_info(repo, anyone):
    found = {e.path: e for e in anyone.get_paths_info(repo, ["a.txt", "dir", "nope", "with space/ü.txt"], expand=True)}
    assert sorted(found) == ["a.txt", "dir", "with space/ü.txt"]
    assert found["a.txt"].last_commit.title == "files"


def test_safetensors_headers_without_the_weights(hub, alice):
    import numpy as np
    from safetensors.numpy import save

    name, api = alice
    repo = f"{name}/weights"
    api.create_repo(repo)
    tensors = {"w": np.ones((300, 1000), np.float32), "h": np.ones((10,), np.float16)}
    api.upload_file(repo_id=repo, path_or_fileobj=save(tensors), path_in_repo="model.safetensors")
    metadata = api.get_safetensors_metadata(repo)
    assert metadata.parameter_count == {"F32": 300_000, "F16": 10}
    assert api.model_info(repo).safetensors.total == 300_010
    assert (206, f"/{repo}/resolve/main/model.safetensors") in [(status, path) for _, path, status in hub.requests]


# --- references and history --------------------------------------------------------------------------------------


def test_branches_and_tags(repo, alice):
    _, api = alice
    first = api.repo_info(repo).sha
    api.create_branch(repo, branch="dev/x")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="dev/x")
    api.create_branch(repo, branch="dev/x", exist_ok=True)
    api.upload_file(repo_id=repo, path_or_fileobj=b"new", path_in_repo="new.txt", revision="dev/x")
    assert api.file_exists(repo, "new.txt", revision="dev/x") and not api.file_exists(repo, "new.txt")
    api.create_tag(repo, tag="v1", revision="dev/x", tag_message="first version")
    api.create_tag(repo, tag="v0")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1")
    refs = api.list_repo_refs(repo)
    assert {b.name for b in refs.branches} == {"main", "dev/x"}
    dev = next(b.target_commit for b in refs.branches if b.name == "dev/x")
    assert {t.name: t.target_commit for t in refs.tags} == {"v0": first, "v1": dev}
    assert api.model_info(repo, revision="v1").sha == dev != first
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="dev/x")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="dev/x")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(repo, branch="main")
    for bad in ("../up", "a..b", "x.lock", "-/.", "a b"):
        with pytest.raises(BadRequestError):
            api.create_branch(repo, branch=bad)


def test_history(repo, alice):
    name, api = alice
    message = "Add more\n\nBecause."
    api.create_commit(repo, [CommitOperationAdd("m", b"1")], commit_message="Add more", commit_description="Because.")
    commits = api.list_repo_commits(repo)
    assert [c.title for c in commits] == ["Add more", "files", "initial commit"]
    assert commits[0].message == message.split("\n\n")[1] and commits[0].authors == [name]
    assert [c.title for c in api.list_repo_commits(repo, revision=commits[1].commit_id)] == ["files", "initial commit"]


# --- downloads ---------------------------------------------------------------------------------------------------


def test_download_at_a_revision(repo, alice, tmp_path):
    _, api = alice
    old = api.repo_info(repo).sha
    api.upload_file(repo_id=repo, path_or_fileobj=b"changed", path_in_repo="a.txt")
    now = api.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
    before = api.hf_hub_download(repo, "a.txt", revision=old, cache_dir=tmp_path)
    assert (Path(now).read_bytes(), Path(before).read_bytes()) == (b"changed", b"alpha")
    assert old in before
    spaced = api.hf_hub_download(repo, "with space/ü.txt", cache_dir=tmp_path)
    assert Path(spaced).read_bytes() == b"gamma"


def test_file_headers(repo, anyone):
    sha = anyone.model_info(repo).sha
    for path, size, etag in (
        ("a.txt", 5, hashlib.sha1(b"blob 5\0alpha").hexdigest()),
        ("dir/deep/c.bin", len(LARGE), hashlib.sha256(LARGE).hexdigest()),
    ):
        metadata = anyone.get_hf_file_metadata(url=hf_hub_url(repo, path, endpoint=anyone.endpoint))
        assert (metadata.commit_hash, metadata.size, metadata.etag) == (sha, size, etag)
        assert metadata.xet_file_data is None


@pytest.mark.parametrize("path, data", [("a.txt", b"alpha"), ("dir/deep/c.bin", LARGE)])
def test_ranges(repo, anyone, path, data):
    url = hf_hub_url(repo, path, endpoint=anyone.endpoint)
    n = len(data)
    for wanted, expected in (
        ("bytes=1-3", data[1:4]),
        ("bytes=2-", data[2:]),
        ("bytes=-2", data[-2:]),
        (f"bytes=0-{n + 1000}", data),
        (f"bytes={n - 1}-{n - 1}", data[-1:]),
    ):
        answer = get_session().get(url, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, expected), wanted
        assert answer.headers["Content-Range"].endswith(f"/{n}")
    assert get_session().get(url, headers={"Range": f"bytes={n}-"}).status_code == 416


def test_interrupted_downloads_go_on(hub, repo, anyone, tmp_path):
    """What the client kept of a broken download is not fetched again."""
    etag = hashlib.sha256(LARGE).hexdigest()
    half = tmp_path / f"models--{repo.replace('/', '--')}" / "blobs" / f"{etag}.incomplete"
    half.parent.mkdir(parents=True)
    half.write_bytes(LARGE[:100_000])
    path = anyone.hf_hub_download(repo, "dir/deep/c.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == LARGE


def test_downloads_are_counted(alice, tmp_path):
    name, api = alice
    repo = f"{name}/counted"
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="config.json")
    for n in range(3):
        api.hf_hub_download(repo, "config.json", cache_dir=tmp_path / str(n))
    assert api.model_info(repo).downloads == 3


def test_filesystem(repo, alice):
    """fsspec's view, which datasets and pandas read through."""
    from huggingface_hub import HfFileSystem

    _, api = alice
    fs = HfFileSystem(endpoint=api.endpoint, token=api.token)
    assert fs.read_text(f"{repo}/dir/b.txt") == "beta"
    with fs.open(f"{repo}/dir/deep/c.bin") as file:
        file.seek(1000)
        assert file.read(10) == LARGE[1000:1010]
    assert sorted(fs.find(f"{repo}/dir")) == [f"{repo}/dir/b.txt", f"{repo}/dir/deep/c.bin"]
    with fs.open(f"{repo}/written.txt", "w") as file:
        file.write("by fsspec")
    assert fs.read_text(f"{repo}/written.txt") == "by fsspec"


# --- collections -------------------------------------------------------------------------------------------------


def test_collections(repo, alice, user, anyone):
    name, api = alice
    made = api.create_collection("Irony & more", description="experts")
    assert made.slug.startswith(f"{name}/irony-more-") and made.owner["name"] == name
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_collection("Irony & more")
    assert api.create_collection("Irony & more", exists_ok=True).slug == made.slug
    api.create_repo(f"{name}/second")
    api.add_collection_item(made.slug, repo, "model", note="the first")
    full = api.add_collection_item(made.slug, f"{name}/second", "model")
    assert [(i.item_id, i.item_type, i.position, i.note) for i in full.items] == [
        (repo, "model", 0, "the first"),
        (f"{name}/second", "model", 1, None),
    ]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(made.slug, repo, "model")
    api.add_collection_item(made.slug, repo, "model", exists_ok=True)
    api.update_collection_item(made.slug, full.items[1].item_object_id, note="now first", position=0)
    assert [i.note for i in anyone.get_collection(made.slug).items] == ["now first", "the first"]
    api.delete_collection_item(made.slug, full.items[0].item_object_id)
    assert [i.item_id for i in api.get_collection(made.slug).items] == [f"{name}/second"]
    changed = api.update_collection_metadata(made.slug, title="Renamed", theme="pink")
    assert (changed.title, changed.theme, changed.description) == ("Renamed", "pink", "experts")

    api.create_collection("Hidden", private=True)
    assert {c.title for c in api.list_collections(owner=name)} == {"Renamed", "Hidden"}
    assert [c.title for c in anyone.list_collections(owner=name)] == ["Renamed"]
    assert [c.title for c in anyone.list_collections(item=f"models/{name}/second")] == ["Renamed"]
    with pytest.raises(HfHubHTTPError, match="403"):
        user()[1].add_collection_item(made.slug, repo, "model")
    api.delete_collection(made.slug)
    assert list(anyone.list_collections(owner=name)) == []
    api.delete_collection(made.slug, missing_ok=True)


def test_many_collections_come_in_pages(hub, alice):
    name, api = alice
    for n in range(7):
        api.create_collection(f"Number {n}")
    url = f"{hub.endpoint}/api/collections?owner={name}&limit=3"
    titles = []
    while url:
        page = get_session().get(url)
        titles += [row["title"] for row in page.json()]
        url = page.links.get("next", {}).get("url")
    assert titles == [f"Number {n}" for n in reversed(range(7))]
