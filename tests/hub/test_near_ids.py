"""An id that is not on the Hub: the error names the ids that may have been meant, from the Hub or its cache."""

from __future__ import annotations

import socket
import time

import pytest
from huggingface_hub import HfApi

from hf_fusion.errors import FusionError
from hf_fusion.hub.near_ids import SECONDS, near_ids
from hf_fusion.hub.refs_to_files import resolve_repo
from hf_fusion.server import HubServer


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        for owner, names in {"me": ("bert-irony", "bert-emotion", "vit-digits"), "you": ("qwen-sums",)}.items():
            client = HfApi(hub.endpoint, token=hub.token(owner))
            for name in names:
                client.create_repo(f"{owner}/{name}")
        yield HfApi(hub.endpoint, token=hub.token("me"))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("me/bert-irny", ["me/bert-irony"]),
        ("Me/Bert-Irony-x", ["me/bert-irony"]),
        ("me/bert", ["me/bert-irony", "me/bert-emotion"]),
        ("yuo/qwen-sums", ["you/qwen-sums"]),
        ("me/qwen-sums", ["you/qwen-sums"]),
        ("nobody/nothing-alike", []),
    ],
)
def test_ids_near_one_that_does_not_exist(wanted, found, api):
    assert near_ids(wanted, api) == found


def test_the_error_of_a_mistyped_id_names_the_right_one(api):
    with pytest.raises(
        FusionError, match="(?s)me/bert-irny was not found.*did you mean me/bert-irony\\?.*hf auth login"
    ):
        resolve_repo("me/bert-irny", api)


def test_a_hub_that_never_answers_does_not_hold_up_the_error():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert near_ids("me/bert-irny", HfApi(f"http://127.0.0.1:{silent.getsockname()[1]}")) == []
    assert time.monotonic() - began < SECONDS + 5
