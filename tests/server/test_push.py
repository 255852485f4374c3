"""Pushing through the unmodified client: each upload method, and refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from io import BytesIO
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, get_session
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

CARD = b"---\nlicense: mit\ntags: [irony]\nbase_model: base/one\n---\n# Irony\n"


def requests_of(hub, repo: str) -> list[str]:
    return [f"{method} {path} {status}" for method, path, status in list(hub.requests) if repo in path]


def contents(api, repo: str, folder, **options) -> dict[str, bytes]:
    """All files of a repo but .gitattributes, as a fresh download gives them."""
    api.snapshot_download(repo, local_dir=folder, **options)
    paths = [p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts and p.name != ".gitattributes"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def test_push_and_read_back_with_xet(hub, alice, anyone, tmp_path):
    name, api = alice
    repo = f"{name}/irony"
    api.create_repo(repo)
    shared = os.urandom(1_000_000)
    files = {
        "README.md": CARD,
        "model.safetensors": os.urandom(3_000_000),
        "repeats.bin": shared + b"between" + shared,
        "zeros.npy": bytes(2_000_001),
        "empty.bin": b"",
        "sub/dir/notes.txt": "grüße".encode(),
    }
    pushed = api.create_commit(repo, [CommitOperationAdd(p, data) for p, data in files.items()], commit_message="all")

    assert contents(anyone, repo, tmp_path / "snapshot") == files
    assert anyone.model_info(repo).sha == pushed.oid
    assert any("xet-write-token" in line for line in requests_of(hub, repo))
    assert any(line.endswith("/v1/shards 200") for line in requests_of(hub, repo))


def test_push_and_read_back_without_xet(hub, alice, anyone, fresh_python, tmp_path):
    name, api = alice
    repo = f"{name}/plain"
    files = {"README.md": CARD, "model.safetensors": os.urandom(3_000_000), "again.bin": b"\0" * 500}
    source = tmp_path / "source"
    source.mkdir()
    for path, data in files.items():
        (source / path).write_bytes(data)
    code = f"""
from huggingface_hub import HfApi
HfApi().create_repo({repo!r})
HfApi().upload_folder(repo_id={repo!r}, folder_path={str(source)!r})
"""
    fresh_python(code, hub, token=hub.token(name), HF_HUB_DISABLE_XET="1")

    assert contents(anyone, repo, tmp_path / "snapshot") == files
    log = requests_of(hub, repo)
    assert not any("xet" in line for line in log)
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    expected = {
        f"POST /api/models/{repo}/preupload/main 200",
        f"POST /{repo}.git/info/lfs/objects/batch 200",
        f"PUT /lfs/models/{repo}/{sha256} 200",
        f"POST /lfs-verify/models/{repo} 200",
        f"POST /api/models/{repo}/commit/main 200",
    }
    assert expected <= set(log)


def test_file_objects_go_over_lfs_and_are_sent_once(hub, alice):
    name, api = alice
    repo = f"{name}/objects"
    api.create_repo(repo)
    data = os.urandom(200_000)
    for path in ("a.bin", "b.bin"):
        api.upload_file(repo_id=repo, path_or_fileobj=BytesIO(data), path_in_repo=path)
    assert len([line for line in requests_of(hub, repo) if line.startswith("PUT")]) == 1
    large = [f for f in api.list_repo_tree(repo) if f.path.endswith(".bin")]
    assert [f.lfs.sha256 for f in large] == [hashlib.sha256(data).hexdigest()] * 2


@pytest.mark.parametrize("repo_type", ["dataset", "space"])
def test_other_kinds(alice, tmp_path, repo_type):
    name, api = alice
    repo = f"{name}/{repo_type}"
    url = api.create_repo(repo, repo_type=repo_type, space_sdk="gradio" if repo_type == "space" else None)
    assert (url.repo_type, url.repo_id) == (repo_type, repo)
    files = {"README.md": b"---\nlicense: mit\n---\n", "data.parquet": os.urandom(50_000), "app.py": b"print()\n"}
    for path, data in files.items():
        api.upload_file(repo_id=repo, repo_type=repo_type, path_or_fileobj=data, path_in_repo=path)
    assert contents(api, repo, tmp_path / "snapshot", repo_type=repo_type) == files
    # a model of the same name is another repo
    assert not api.repo_exists(repo)


def test_unchanged_files_make_no_commit(alice):
    name, api = alice
    repo = f"{name}/same"
    api.create_repo(repo)
    adds = lambda: [CommitOperationAdd("a.txt", b"text"), CommitOperationAdd("b.bin", b"\0" * 1000)]  # noqa: E731
    first = api.create_commit(repo, adds(), commit_message="first")
    assert api.create_commit(repo, adds(), commit_message="second").oid == first.oid
    assert [c.title for c in api.list_repo_commits(repo)] == ["first", "initial commit"]


@pytest.mark.parametrize("megabytes", [4, 11])
def test_an_unchanged_text_file_makes_no_commit_however_large(alice, megabytes):
    name, api = alice
    repo = f"{name}/text-{megabytes}"
    api.create_repo(repo)
    upload = {"repo_id": repo, "path_in_repo": "tokenizer.json", "path_or_fileobj": b"[1, 2]\n" * (megabytes * 150_000)}
    first = api.upload_file(**upload)
    assert api.upload_file(**upload).oid == first.oid
    (entry,) = api.get_paths_info(repo, ["tokenizer.json"])
    assert (entry.lfs is not None) == (megabytes > 10)


def test_copy_and_delete(alice, tmp_path):
    name, api = alice
    repo = f"{name}/moves"
    api.create_repo(repo)
    start = {
        "small.txt": b"small",
        "large.bin": b"\0" * 5000,
        "dir/x.txt": b"x",
        "dir/deep/y.txt": b"y",
        "keep.txt": b"",
    }
    api.create_commit(repo, [CommitOperationAdd(p, d) for p, d in start.items()], commit_message="start")
    changes = [
        CommitOperationCopy("small.txt", "small2.txt"),
        CommitOperationCopy("large.bin", "large2.bin"),
        CommitOperationDelete("large.bin"),
        CommitOperationDelete("dir/"),
    ]
    api.create_commit(repo, changes, commit_message="change")
    expected = {"small.txt": b"small", "small2.txt": b"small", "large2.bin": b"\0" * 5000, "keep.txt": b""}
    assert contents(api, repo, tmp_path / "after") == expected
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "dir"))


def test_gitignore_of_the_push_and_of_the_repo(alice):
    name, api = alice
    repo = f"{name}/ignoring"
    api.create_repo(repo)
    adds = [CommitOperationAdd(p, b"1") for p in ("logs/run.txt", "kept.txt", "deep/x.tmp")]
    ignore = CommitOperationAdd(".gitignore", b"logs/\n*.tmp\n")
    api.create_commit(repo, [ignore, *adds], commit_message="with")
    api.create_commit(repo, [CommitOperationAdd("logs/other.txt", b"2")], commit_message="after")
    assert sorted(api.list_repo_files(repo)) == [".gitattributes", ".gitignore", "kept.txt"]


def test_stale_parent_is_refused(alice):
    name, api = alice
    repo = f"{name}/stale"
    api.create_repo(repo)
    base = api.repo_info(repo).sha
    api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="a", parent_commit=base)
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="a", parent_commit=base)
    assert error.value.response.status_code == 412
    head = api.repo_info(repo).sha
    api.upload_file(repo_id=repo, path_or_fileobj=b"3", path_in_repo="a", parent_commit=head[:7])


def test_concurrent_commits_lose_nothing(alice, hub):
    name, api = alice
    repo = f"{name}/crowd"
    api.create_repo(repo)

    def push(worker: int) -> None:
        for n in range(5):
            data = f"{worker}.{n}".encode()
            api.upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo=f"w{worker}/f{n}.txt")

    threads = [threading.Thread(target=push, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(api.list_repo_files(repo)) == 1 + 30
    assert len(api.list_repo_commits(repo)) == 1 + 30


def test_pull_requests(alice, user):
    name, api = alice
    repo = f"{name}/contributed"
    api.create_repo(repo)
    _, guest = user()
    with pytest.raises(HfHubHTTPError, match="403"):
        guest.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="a.txt")
    pull = guest.upload_file(repo_id=repo, path_or_fileobj=b"1" * 100 + b"\0", path_in_repo="a.bin", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    guest.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="b.txt", revision=pull.pr_revision)
    assert {"a.bin", "b.txt"} <= set(api.list_repo_files(repo, revision="refs/pr/1"))
    assert api.list_repo_files(repo) == [".gitattributes"]
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    with pytest.raises(HfHubHTTPError, match="403"):
        user()[1].upload_file(repo_id=repo, path_or_fileobj=b"3", path_in_repo="c", revision=pull.pr_revision)


def test_cards_are_checked(alice):
    name, api = alice
    repo = f"{name}/cards"
    api.create_repo(repo)
    for bad in (b"---\nlicense: [\n---\n", b"---\ntags: one\n---\n", b"---\na: &a [x]\nb: [*a, *a]\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.upload_file(repo_id=repo, path_or_fileobj=bad, path_in_repo="README.md")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(repo_id=repo, path_or_fileobj=b"# no metadata\n", path_in_repo="README.md")


# --- what a client of ours would never send ----------------------------------------------------------------------


def commit(hub, token: str, repo: str, *operations: dict) -> Any:
    lines = [{"key": "header", "value": {"summary": "raw"}}, *operations]
    body = "\n".join(json.dumps(line) for line in lines)
    headers = {"Authorization": f"Bearer {token}"}
    return get_session().post(f"{hub.endpoint}/api/models/{repo}/commit/main", content=body, headers=headers)


def file(path: str, data: bytes = b"x") -> dict:
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}}


@pytest.fixture
def raw(hub, alice):
    """A repo, and a function that commits to it by hand."""
    name, api = alice
    api.create_repo(f"{name}/raw")
    token = hub.token(name)
    return api, f"{name}/raw", lambda *operations: commit(hub, token, f"{name}/raw", *operations)


@pytest.mark.long
@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "a//b", ".git/config", "a/.GIT/x", "a\\..\\b", "x\0y", "", "."]
)
def test_paths_cannot_leave_the_repo(raw, hub, path):
    api, repo, send = raw
    before = sorted(p for p in hub.root.parent.rglob("*") if "tmp" not in p.parts)
    head = api.repo_info(repo).sha
    assert send(file(path)).status_code == 400
    assert send({"key": "lfsFile", "value": {"path": path, "oid": "0" * 64}}).status_code == 400
    assert api.repo_info(repo).sha == head
    assert sorted(p for p in hub.root.parent.rglob("*") if "tmp" not in p.parts) == before


def test_large_files_must_have_arrived(raw):
    api, repo, send = raw
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 5\n"
    missing = {"key": "lfsFile", "value": {"path": "w.bin", "oid": "a" * 64, "size": 5}}
    for operation in (missing, file("w.txt", pointer)):
        answer = send(operation)
        assert answer.status_code == 400 and "never uploaded" in answer.json()["error"]
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_files_and_folders_do_not_mix(raw):
    _, _, send = raw
    assert send(file("a"), file("a/b")).status_code == 400
    assert send(file("c")).status_code == 200
    assert send(file("c/d")).status_code == 400
    assert send({"key": "deletedFile", "value": {"path": "c"}}, file("c/d")).status_code == 200
    assert send({"key": "deletedFile", "value": {"path": "nothing"}}).status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]\n", b'{"key": "header", "value": null}', b'{"key": "x", "value": {}}']
)
def test_broken_commits(raw, hub, body):
    api, repo, _ = raw
    token = api.token
    url = f"{hub.endpoint}/api/models/{repo}/commit/main"
    assert get_session().post(url, content=body, headers={"Authorization": f"Bearer {token}"}).status_code == 400


def test_broken_base64(raw):
    _, _, send = raw
    broken = {"key": "file", "value": {"path": "a.txt", "content": "a?b=", "encoding": "base64"}}
    assert send(broken).status_code == 400


def test_a_regular_file_too_large_for_git_is_kept_beside_it(raw, tmp_path):
    api, repo, send = raw
    data = os.urandom(11_000_000)  # more than one step of the base64 decoder
    assert send(file("model.bin", data), file("big.txt", b"text " * 2_500_000)).status_code == 200
    tree = {f.path: f for f in api.list_repo_tree(repo)}
    assert tree["model.bin"].lfs.sha256 == hashlib.sha256(data).hexdigest() and tree["big.txt"].lfs
    assert contents(api, repo, tmp_path / "x")["model.bin"] == data


def test_uploads_match_their_hash(hub, alice):
    name, api = alice
    repo = f"{name}/claims"
    api.create_repo(repo)
    data = b"the real content"
    oid = hashlib.sha256(data).hexdigest()
    url = f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch"
    body = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    assert get_session().post(url, json=body).status_code == 401
    actions = (
        get_session()
        .post(url, json=body, headers={"Authorization": f"Bearer {api.token}"})
        .json()["objects"][0]["actions"]
    )
    href = actions["upload"]["href"]
    assert get_session().put(href, content=b"another content!").status_code == 400  # same size
    assert get_session().put(href, content=data[:-1]).status_code == 400
    assert get_session().put(href, content=data + b"!").status_code == 413
    assert get_session().put(href.replace(oid, "0" * 64), content=data).status_code == 403
    assert get_session().put(href[:-1] + ("0" if href[-1] != "0" else "1"), content=data).status_code == 403
    verify = lambda: get_session().post(  # noqa: E731
        actions["verify"]["href"],
        json={"oid": oid, "size": len(data)},
        headers={"Authorization": f"Bearer {api.token}"},
    )
    assert verify().status_code == 404
    assert get_session().put(href, content=data).status_code == 200
    assert verify().status_code == 200


def test_git_lfs_fetches_pushed_files(hub, alice):
    name, api = alice
    repo = f"{name}/fetched"
    api.create_repo(repo)
    data = os.urandom(1000)
    api.upload_file(repo_id=repo, path_or_fileobj=BytesIO(data), path_in_repo="w.bin")
    oid = hashlib.sha256(data).hexdigest()
    url = f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch"
    body = {"operation": "download", "objects": [{"oid": oid, "size": 1000}, {"oid": "0" * 64, "size": 1}]}
    there, missing = get_session().post(url, json=body).json()["objects"]
    href = there["actions"]["download"]["href"]
    assert get_session().get(href).content == data and "actions" not in missing
    assert get_session().put(href, content=data).status_code == 403
    api.update_repo_settings(repo, gated="auto")
    assert get_session().post(url, json=body).status_code == 401


def test_xet_uploads_match_their_hash(hub, alice):
    name, api = alice
    repo = f"{name}/xet"
    api.create_repo(repo)
    url = f"{hub.endpoint}/api/models/{repo}/xet-write-token/main"
    assert get_session().get(url).status_code == 401
    given = get_session().get(url, headers={"Authorization": f"Bearer {api.token}"}).json()
    cas, headers = given["casUrl"], {"Authorization": f"Bearer {given['accessToken']}"}
    xorb = b"\0\x03\0\0\0\x03\0\0abc"
    assert get_session().post(f"{cas}/v1/xorbs/default/{'1' * 64}", content=xorb).status_code == 403
    assert get_session().post(f"{cas}/v1/xorbs/default/..%2Fx", content=xorb, headers=headers).status_code == 400
    assert get_session().post(f"{cas}/v1/xorbs/default/{'1' * 64}", content=xorb, headers=headers).status_code == 200
    # a shard that says: the file with this sha256 is chunk 0 of that xorb
    hexed = lambda text: b"".join(bytes.fromhex(text[n : n + 16])[::-1] for n in range(0, 64, 16))  # noqa: E731
    numbers = lambda *values: b"".join(value.to_bytes(4, "little") for value in values)  # noqa: E731

    def shard(xorb: str, sha256: str) -> bytes:
        head = bytes(32) + numbers(1 << 30, 1, 0, 0)
        return (
            bytes(48) + head + hexed(xorb) + numbers(0, 3, 0, 1) + hexed(sha256) + bytes(16) + b"\xff" * 32 + bytes(16)
        )

    right = hashlib.sha256(b"abc").hexdigest()
    post = lambda body: get_session().post(f"{cas}/v1/shards", content=body, headers=headers)  # noqa: E731
    assert post(shard("1" * 64, "0" * 64)).status_code == 400  # wrong content
    assert post(shard("2" * 64, right)).status_code == 400  # no such xorb
    assert post(b"rubbish").status_code == 400
    assert post(shard("1" * 64, right)).status_code == 200
    link = {"key": "lfsFile", "value": {"path": "abc.bin", "oid": right, "size": 3}}
    assert commit(hub, api.token, repo, link).status_code == 200
