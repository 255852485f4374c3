"""Malformed requests: the Hub answers with a reason, and keeps serving."""

from __future__ import annotations

import pytest
from huggingface_hub import get_session

ROUTES = [
    "POST /api/validate-yaml",
    "POST /api/repos/create",
    "DELETE /api/repos/delete",
    "POST /api/repos/move",
    "POST /api/collections",
    "POST /api/collections/{slug}/items",
    "PATCH /api/collections/{slug}",
    "PATCH /api/collections/{slug}/items/{item}",
    "PUT /api/models/{repo}/settings",
    "POST /api/models/{repo}/preupload/main",
    "POST /api/models/{repo}/paths-info/main",
    "POST /api/models/{repo}/branch/x",
    "POST /api/models/{repo}/tag/main",
    "POST /api/models/{repo}/commit/main",
    "POST /api/models/{repo}/user-access-request/grant",
    "POST /{repo}.git/info/lfs/objects/batch",
    "POST /lfs-verify/models/{repo}",
    "PUT /lfs/models/{repo}/" + "0" * 64,
    "POST /xet/models/{repo}/" + "0" * 32 + "/v1/shards",
    "GET /api/models?limit=x&cursor=%ff&filter=%00&sort=",
    "GET /api/models/{repo}/commits/main?p=-1&limit=-5",
    "GET /api/models/{repo}/tree/main/%2e%2e%2f%2e%2e?cursor=%ff",
    "GET /{repo}/resolve/main/..%2f..%2f..%2fhub.json",
    "GET /{repo}/resolve/%2e%2e/x",
    "GET /{repo}/objects/..%2f..%2fhub.json",
    "GET /{repo}/objects/info/packs",
    "GET /..%2f..%2fusers.json",
    "GET /%ff%fe/%00",
    "GET /?kind=nothing&q=%ff",
    "PATCH /api/whoami-v2",
]
BODIES = [
    b"",
    b"null",
    b"[]",
    b"7",
    b"{",
    b"\xff\xfe\x00",
    b"{}",
    b'{"name": 1, "type": [], "files": 1, "objects": {}, "item": [], "note": {}, "title": [], "position": "x"}',
    b'{"name": "..", "organization": "..", "files": [{"path": "../x", "size": -1, "sample": "?"}], "tag": "../x"}',
    b'{"fromRepo": "../../x", "toRepo": "../../y", "user": "../x", "item": {"id": "../x", "type": "file"}}',
    b'{"files": [{"path": "a"}], "objects": [{"oid": "../../x", "size": 1}], "startingPoint": "../x", "gated": 5}',
    b'{"files": [{"path": "\\ud800", "size": 1}], "name": "\\ud800", "title": "\\ud800", "tag": "\\ud800"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("route", ROUTES)
def test_nonsense_is_refused(hub, alice, route):
    name, api = alice
    api.create_repo(f"{name}/m")
    api.create_repo(f"{name}/x")
    collection = api.add_collection_item(api.create_collection("c").slug, f"{name}/m", "model")
    method, path = route.split(" ")
    path = path.format(repo=f"{name}/m", slug=collection.slug, item=collection.items[0].item_object_id)
    for body in BODIES:
        for headers in ({}, {"Authorization": f"Bearer {api.token}", "Content-Type": "application/json"}):
            answer = get_session().request(method, hub.endpoint + path, content=body, headers=headers)
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code >= 400 and "validate-yaml" not in path:
                assert answer.json()["error"] and answer.headers["X-Error-Message"]
    assert api.whoami()["name"] == name


def test_bodies_have_limits(hub):
    def endless():
        for _ in range(80):
            yield b" " * (1 << 20)

    answer = get_session().post(f"{hub.endpoint}/api/validate-yaml", content=endless(), timeout=60)
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize("header", ["Bearer", "Bearer x y", "Basic !!!", "Basic YTpi", "Digest x", "x" * 5000])
def test_odd_credentials(hub, header):
    answer = get_session().get(f"{hub.endpoint}/api/whoami-v2", headers={"Authorization": header})
    assert answer.status_code == 401
