"""The Hub on a full or read-only disk: 507 with a sentence, nothing changed, and reads still work."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import pytest
from disks import contents, small_disk
from hub_integrity import check
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError

from hf_fusion import FusionError
from hf_fusion.server import HubServer, add_user

LARGE = os.urandom(1 << 20)
FILES = {"config.json": b'{"a": 1}', "w.bin": LARGE}


def writes(api: HfApi, slug: str) -> dict[str, object]:
    """Every kind of request that writes."""
    repo = {"repo_id": "me/m"}
    return {
        "a repo": lambda: api.create_repo("me/new"),
        "a small file": lambda: api.upload_file(**repo, path_in_repo="a.txt", path_or_fileobj=b"x" * 50_000),
        "a large file by LFS": lambda: api.upload_file(
            **repo, path_in_repo="b.bin", path_or_fileobj=BytesIO(LARGE[1:])
        ),
        "a xorb": lambda: xorb(api),
        "a large file by Xet": lambda: api.upload_file(**repo, path_in_repo="c.bin", path_or_fileobj=LARGE[2:]),
        "a deleted file": lambda: api.delete_file("config.json", **repo),
        "a branch": lambda: api.create_branch(**repo, branch="new"),
        "a tag": lambda: api.create_tag(**repo, tag="new", tag_message="x"),
        "settings": lambda: api.update_repo_settings(**repo, private=True),
        "gating": lambda: api.update_repo_settings(**repo, gated="auto"),
        "a pull request": lambda: api.upload_file(
            **repo, path_in_repo="a.txt", path_or_fileobj=b"y" * 50_000, create_pr=True
        ),
        "a collection": lambda: api.create_collection("new"),
        "a collection's item": lambda: api.add_collection_item(slug, "me/m", "model"),
        "a collection's title": lambda: api.update_collection_metadata(slug, title="other"),
    }


def xorb(api: HfApi) -> None:
    """What a client sends first where the disk was not yet full; by itself it would try again for minutes."""
    headers = {"Authorization": f"Bearer {api.token}"}
    answer = get_session().get(f"{api.endpoint}/api/models/me/m/xet-write-token/main", headers=headers)
    if answer.status_code == 200:
        own = answer.json()
        headers = {"Authorization": f"Bearer {own['accessToken']}"}
        url = f"{own['casUrl']}/v1/xorbs/default/{'0' * 64}"
        answer = get_session().post(url, content=LARGE, headers=headers)
    if answer.status_code != 200:
        raise HfHubHTTPError(answer.text, response=answer)


# What a read-only disk refuses as well, and a full one can do.
REMOVING = {
    "a removed branch": lambda api, slug: api.delete_branch("me/m", branch="dev"),
    "a removed tag": lambda api, slug: api.delete_tag("me/m", tag="v1"),
    "a removed repo": lambda api, slug: api.delete_repo("me/m"),
    "a moved repo": lambda api, slug: api.move_repo("me/m", "me/moved"),
    "a removed collection": lambda api, slug: api.delete_collection(slug),
}


def state(api: HfApi, slug: str, cache: Path) -> object:
    """All that a client can ask for."""
    got = {name: Path(api.hf_hub_download("me/m", name, cache_dir=cache, force_download=True)) for name in FILES}
    return (
        {name: path.read_bytes() for name, path in got.items()},
        [(m.id, m.private, m.sha) for m in api.list_models()],
        api.model_info("me/m").gated,
        api.list_repo_refs("me/m", include_pull_requests=True),
        [c.title for c in api.list_repo_commits("me/m")],
        api.get_collection(slug).title,
        len(api.get_collection(slug).items),
        len(list(api.list_collections(owner="me"))),
    )


@pytest.mark.long
def test_full_disk_changes_nothing_and_reads_still_work(tmp_path):
    with small_disk(tmp_path / "disk", 16) as disk, HubServer(disk.path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("me"))
        api.create_repo("me/m")
        for name, data in FILES.items():
            api.upload_file(repo_id="me/m", path_in_repo=name, path_or_fileobj=data)
        api.create_branch("me/m", branch="dev")
        api.create_tag("me/m", tag="v1")
        slug = api.create_collection("mine").slug
        before = state(api, slug, tmp_path / "cache")
        files, temporary = contents(disk.path), set(contents(disk.path / "hub" / "tmp"))

        def refused(write, name: str) -> None:
            with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:  # the client wraps errors of large files
                write()
            answer = caught.value if isinstance(caught.value, HfHubHTTPError) else caught.value.__cause__
            assert answer.response.status_code == 507 and "disk" in str(answer), name
            assert state(api, slug, tmp_path / "cache") == before, name
            assert set(contents(disk.path / "hub" / "tmp")) == temporary, name

        with disk.full():
            for name, write in writes(api, slug).items():
                refused(write, name)
            with pytest.raises(FusionError, match="users.json cannot be written: the disk is full"):
                hub.token("you")
        with disk.full(leave=100_000):  # a part of what is sent has room
            for name in ("a large file by LFS", "a xorb"):
                refused(writes(api, slug)[name], name)
        with disk.read_only():
            for name, write in writes(api, slug).items():
                refused(write, name)
            for name, remove in REMOVING.items():
                refused(lambda remove=remove: remove(api, slug), name)
            with pytest.raises(FusionError, match="users.json cannot be written: the disk is read-only"):
                add_user(disk.path / "hub", "you")
        changed = {name for name, own in contents(disk.path).items() if files.get(name) != own}
        # commits that were refused may leave objects that nothing leads to; a second push uses them
        assert all(
            "/objects/" in name or name.endswith(("downloads", "hub/tmp/xet", "summary.json")) for name in changed
        )
        assert max(status for *_, status in hub.requests) == 507
        for write in writes(api, slug).values():
            write()
        assert api.model_info("me/m").private


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        HubServer(disk.path / "hub").start().stop()
        before = contents(disk.path)
        with disk.read_only(), pytest.raises(FusionError, match="hub cannot be written: the disk is read-only"):
            HubServer(disk.path / "hub").start()
        with disk.read_only(), pytest.raises(FusionError, match="other cannot be written: the disk is read-only"):
            HubServer(disk.path / "other").start()
        assert contents(disk.path) == before
        HubServer(disk.path / "hub").start().stop()
        assert check(disk.path / "hub") == 0
