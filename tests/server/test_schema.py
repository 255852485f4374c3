"""Requests that schemathesis generates from the Hub's OpenAPI schema, with and without a token: no 5xx."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import requests
import schemathesis
from hub_integrity import check
from huggingface_hub import HfApi
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from hf_fusion.server import HubServer

SEED = 0
# values that lead somewhere, by the name of a parameter; without them nearly all requests would end in 404
THERE = {
    "kind": ["models", "datasets", "spaces"],
    "owner": ["alice", "lab"],
    "author": ["alice"],
    "name": ["m", "private", "gated", "Odd%20name"],
    "rev": ["main", "dev", "v1", "refs%2Fpr%2F1", "0" * 40, "abcdef0"],
    "path": ["config.json", "w.bin", "a/b", "a/b/c.txt", "HEAD", "info/packs", "..%2f..%2fhub.json"],
    "access": ["read", "write"],
    "view": ["tree", "commit", "commits", "discussions"],
    "oid": ["0" * 64],
    "session": ["0" * 32],
    "xorb": ["0" * 64],
}
QUERY = ("filter", "search", "author", "sort", "direction", "limit", "cursor", "expand", "full", "config", "p", "item")
LINES = st.lists(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["header", "file", "lfsFile", "deletedFile", "deletedFolder", "other"]),
            "value": st.fixed_dictionaries(
                {},
                optional={
                    "summary": st.text(max_size=20),
                    "description": st.none() | st.text(max_size=20),
                    "parentCommit": st.none() | st.text(max_size=41) | st.integers(),
                    "path": st.sampled_from(["a/b", "a", "x.txt", "../x", ""]) | st.text(max_size=20),
                    "content": st.sampled_from(["", "aGVsbG8=", "!", "aGVsbG8"]) | st.text(max_size=20),
                    "encoding": st.just("base64"),
                    "oid": st.just("0" * 64) | st.text(max_size=64),
                    "size": st.integers(-1, 1 << 70) | st.none(),
                },
            ),
        }
    ),
    max_size=4,
).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())
BODIES = st.binary(max_size=300) | LINES  # for the routes that read their body themselves


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[HubServer, HfApi]]:
    """A Hub that is for this file alone: its repos are deleted, moved and overwritten."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.org("lab", ["alice"])
        yield hub, HfApi(endpoint=hub.endpoint, token=hub.token("alice"))
    assert check(hub.root) > 1  # whatever was asked, what is on disk is whole


def refill(api: HfApi) -> None:
    """Puts back what a request may have removed."""
    for kind in ("model", "dataset"):
        for name in ("m", "private", "gated"):
            if api.repo_exists(f"alice/{name}", repo_type=kind):
                continue
            api.create_repo(f"alice/{name}", repo_type=kind, private=name == "private")
            for path, data in (("config.json", b"{}"), ("w.bin", b"\0" * 500), ("a/b/c.txt", b"hello")):
                api.upload_file(
                    repo_id=f"alice/{name}",
                    repo_type=kind,
                    path_in_repo=path,
                    path_or_fileobj=data,
                    run_as_future=False,
                )
            api.create_branch(f"alice/{name}", repo_type=kind, branch="dev")
            api.create_tag(f"alice/{name}", repo_type=kind, tag="v1")
            if name == "gated":
                api.update_repo_settings(f"alice/{name}", repo_type=kind, gated="auto")


def directed(case: schemathesis.Case, chance: random.Random, slug: str, body: bytes) -> schemathesis.Case:
    """Most parameters of a request lead to something that is there; the rest stay as they were made."""
    for name in case.path_parameters or {}:
        known = [slug.partition("/")[2]] if name == "slug" else THERE.get(name)
        if known and chance.random() < 0.8:
            case.path_parameters[name] = chance.choice(known)
    if case.method in ("POST", "PUT", "PATCH") and not list(case.operation.body or ()):
        case.body, case.media_type = body, "application/octet-stream"
    if case.method == "GET" and chance.random() < 0.5:
        odd = ["", "-1", "0", "1", "9" * 30, "%00", "é", "true", "downloads", "lastModified", "[1]", "W10="]
        case.query = {**(case.query or {}), **{name: chance.choice(odd) for name in chance.sample(QUERY, 2)}}
    return case


@pytest.mark.long
@pytest.mark.parametrize("examples", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_no_schema_request_gets_500(served, examples):
    """Seed 0; each request without a token and with one; 100 a route, valid and 100 invalid: about 20,000 in all."""
    hub, api = served
    schema = schemathesis.openapi.from_url(f"{hub.endpoint}/.well-known/openapi.json")
    session = requests.Session()
    routes = [found.ok() for found in schema.get_all_operations()]
    assert len(routes) > 55
    sent = 0
    for route in routes:
        for mode in GenerationMode:
            refill(api)
            slug = next((c.slug for c in api.list_collections(owner="alice")), None)
            slug = slug or api.add_collection_item(api.create_collection("c").slug, "alice/m", "model").slug

            def send(case: schemathesis.Case) -> None:
                for headers in ({}, {"Authorization": f"Bearer {api.token}"}):
                    answer = case.call(session=session, base_url=hub.endpoint, headers=headers, timeout=30)
                    assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.text}"

            sent += ask(route, mode, examples, slug, send)
    assert sent > examples * len(routes)
    assert max(status for *_, status in hub.requests) < 500


def ask(route, mode: GenerationMode, examples: int, slug: str, send: Callable[[schemathesis.Case], None]) -> int:
    """Sends requests to one route; gives back how many there were."""
    sent = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(route.as_strategy(generation_mode=mode), st.integers(0, 1 << 32), BODIES)
    def requests_of(case: schemathesis.Case, seed: int, body: bytes) -> None:
        nonlocal sent
        sent += 1
        send(directed(case, random.Random(seed), slug, body))

    with suppress(Unsatisfiable):  # a route without parameters takes nothing that is invalid
        requests_of()
    return sent
