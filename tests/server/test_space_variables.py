"""Variables of a Space, by the unmodified client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


def test_variables_are_set_read_and_deleted(alice):
    name, api = alice
    repo = f"{name}/app"
    api.create_repo(repo, repo_type="space", space_sdk="gradio")
    assert api.get_space_variables(repo) == {}
    api.add_space_variable(repo, "MODEL_ID", "me/one")
    api.add_space_variable(repo, "MODEL_ID", "me/two", description="what it shows")
    found = api.add_space_variable(repo, "OTHER", "1")
    assert {key: (each.value, each.description) for key, each in found.items()} == {
        "MODEL_ID": ("me/two", "what it shows"),
        "OTHER": ("1", None),
    }
    assert found["OTHER"].updated_at is not None
    assert set(api.delete_space_variable(repo, "OTHER")) == set(api.get_space_variables(repo)) == {"MODEL_ID"}


def test_variables_set_at_once_are_all_kept(alice):
    name, api = alice
    repo = f"{name}/busy"
    api.create_repo(repo, repo_type="space", space_sdk="gradio")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: api.add_space_variable(repo, f"KEY_{number}", str(number)), range(16)))
    assert {key: each.value for key, each in api.get_space_variables(repo).items()} == {
        f"KEY_{number}": str(number) for number in range(16)
    }


def test_only_writers_of_a_space_see_its_variables(hub, alice, user):
    name, api = alice
    repo = f"{name}/mine"
    api.create_repo(repo, repo_type="space", space_sdk="gradio")
    _, other = user()
    for client, status in ((other, 403), (HfApi(endpoint=hub.endpoint, token=False), 401)):
        with pytest.raises(HfHubHTTPError) as refused:
            client.get_space_variables(repo)
        assert refused.value.response.status_code == status
    api.create_repo(f"{name}/model")
    with pytest.raises(RepositoryNotFoundError):
        api.get_space_variables(f"{name}/model")
    with pytest.raises(HfHubHTTPError, match="body.key"):
        api.add_space_variable(repo, "not a name", "1")
