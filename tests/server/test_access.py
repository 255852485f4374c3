"""Permissions, and that tokens are not stored or logged."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from hf_fusion.errors import FusionError
from hf_fusion.server import HubServer, add_user


def test_private_repos_exist_for_their_owner_only(hub, alice, user, anyone, tmp_path):
    name, api = alice
    repo = f"{name}/secret"
    api.create_repo(repo, private=True)
    api.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="x.txt")
    assert api.model_info(repo).private
    assert [m.id for m in api.list_models(author=name)] == [repo]
    _, other = user()
    for stranger in (anyone, other):
        assert list(stranger.list_models(author=name)) == []
        for ask in (
            lambda: stranger.model_info(repo),  # noqa: B023 - called at once
            lambda: stranger.hf_hub_download(repo, "x.txt", cache_dir=tmp_path),  # noqa: B023
            lambda: list(stranger.list_repo_tree(repo)),  # noqa: B023
            lambda: stranger.list_repo_refs(repo),  # noqa: B023
            lambda: stranger.list_repo_commits(repo),  # noqa: B023
            lambda: stranger.get_paths_info(repo, ["x.txt"]),  # noqa: B023
        ):
            with pytest.raises(RepositoryNotFoundError):
                ask()
    for page in (f"/{repo}", f"/{repo}/info/refs", f"/{repo}/resolve/main/x.txt"):
        assert get_session().get(hub.endpoint + page).status_code in (401, 404)
    api.update_repo_settings(repo, private=False)
    assert anyone.model_info(repo).private is False


def test_gated_repos_show_metadata_but_no_files(alice, user, anyone, tmp_path):
    name, api = alice
    repo = f"{name}/gated"
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="x.txt")
    guest, other = user()
    with pytest.raises(HfHubHTTPError, match="not gated"):
        api.grant_access(repo, guest)
    api.update_repo_settings(repo, gated="manual")
    assert anyone.model_info(repo).gated == "manual"
    assert "x.txt" in anyone.list_repo_files(repo)
    for stranger, status in ((anyone, 401), (other, 403)):
        with pytest.raises(GatedRepoError) as error:
            stranger.hf_hub_download(repo, "x.txt", cache_dir=tmp_path / "no")
        assert error.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            stranger.auth_check(repo)
    assert Path(api.hf_hub_download(repo, "x.txt", cache_dir=tmp_path / "own")).read_bytes() == b"x"
    api.grant_access(repo, guest)
    assert Path(other.hf_hub_download(repo, "x.txt", cache_dir=tmp_path / "granted")).read_bytes() == b"x"
    assert [m.id for m in anyone.list_models(author=name, gated=True)] == [repo]
    assert list(anyone.list_models(author=name, gated=False)) == []


def test_only_members_write_to_an_organisation(hub, user):
    (name, api), (_, other) = user(), user()
    org = f"{name}-lab"
    hub.org(org, [name])
    api.create_repo(f"{org}/shared", private=True)
    api.upload_file(repo_id=f"{org}/shared", path_or_fileobj=b"x", path_in_repo="x")
    for attempt in (
        lambda: other.create_repo(f"{org}/mine"),
        lambda: other.create_repo(f"{name}/mine"),
        lambda: other.delete_repo(f"{org}/shared"),
    ):
        with pytest.raises(HfHubHTTPError):
            attempt()
    assert [m.id for m in api.list_models(author=org)] == [f"{org}/shared"]


def test_unauthorised_requests_change_nothing(alice, user, anyone):
    name, api = alice
    repo = f"{name}/mine"
    api.create_repo(repo)
    before = api.model_info(repo)
    for stranger in (anyone, user()[1]):
        for attempt in (
            lambda: stranger.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="x"),  # noqa: B023
            lambda: stranger.create_branch(repo, branch="b"),  # noqa: B023
            lambda: stranger.create_tag(repo, tag="t"),  # noqa: B023
            lambda: stranger.update_repo_settings(repo, private=True),  # noqa: B023
            lambda: stranger.move_repo(repo, f"{name}/other"),  # noqa: B023
            lambda: stranger.delete_repo(repo),  # noqa: B023
        ):
            with pytest.raises(HfHubHTTPError):
                attempt()
    assert api.model_info(repo) == before
    assert len(api.list_repo_refs(repo).branches) == 1


def test_tokens_leave_no_trace(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    root = tmp_path / "hub"
    with HubServer(root) as hub:
        token = hub.token("alice")
        api = HfApi(endpoint=hub.endpoint, token=token)
        api.create_repo("alice/m")
        api.upload_file(repo_id="alice/m", path_or_fileobj=b"\0" * 5000, path_in_repo="w.bin")
        api.upload_file(repo_id="alice/m", path_or_fileobj=BytesIO(b"\0" * 600), path_in_repo="w2.bin")
        api.whoami()
        basic = get_session().get(f"{hub.endpoint}/alice/m/info/refs", auth=("alice", token))
        assert basic.status_code == 200
        recorded = repr(list(hub.requests))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("hf_fusion", "uvicorn"))]
    assert any("/commit/main" in line for line in ours) and "/commit/main" in recorded
    secret = token.removeprefix("hf_")
    assert secret not in "\n".join(ours) + recorded
    assert "signature" not in "\n".join(ours) + recorded
    stored = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert secret.encode() not in stored


def test_add_user_beside_a_running_server_and_without_one(tmp_path):
    early = add_user(tmp_path, "early")
    with HubServer(tmp_path) as hub:
        late = add_user(tmp_path, "late")
        for token, name in ((early, "early"), (late, "late")):
            assert HfApi(endpoint=hub.endpoint, token=token).whoami()["name"] == name
        again = add_user(tmp_path, "late")
        assert again != late
        assert HfApi(endpoint=hub.endpoint, token=late).whoami()["name"] == "late"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", ".x", "a..b", "x" * 97, "a b", "é"])
def test_user_names(tmp_path, name):
    with pytest.raises(FusionError, match="is not a valid user name"):
        add_user(tmp_path, name)
    assert not list(tmp_path.glob("**/users.json"))


def test_one_server_per_folder_and_per_port(tmp_path):
    with HubServer(tmp_path / "a") as hub:
        with pytest.raises(FusionError, match="another process already serves"):
            HubServer(tmp_path / "a").start()
        with pytest.raises(FusionError, match="cannot listen"):
            HubServer(tmp_path / "b", port=hub.port).start()
        HfApi(endpoint=hub.endpoint, token=hub.token("x")).whoami()


def test_server_listens_on_the_given_host_only(tmp_path):
    with HubServer(tmp_path, host="127.0.0.2") as hub:
        assert hub.endpoint.startswith("http://127.0.0.2:")
        assert get_session().get(f"{hub.endpoint}/api/models").json() == []
        with pytest.raises(OSError):
            import socket

            socket.create_connection(("127.0.0.1", hub.port), timeout=2)
