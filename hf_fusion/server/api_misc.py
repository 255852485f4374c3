"""Routes for whoami, telemetry and collections."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Depends, Request, Response

from hf_fusion.server.access import CurrentUser, Endpoint, SignedIn, StoreDep
from hf_fusion.server.bodies import CollectionBody, CollectionChange, ItemBody, ItemChange
from hf_fusion.server.collections import Collection, Collections
from hf_fusion.server.errors import HubError
from hf_fusion.server.listing import Page
from hf_fusion.server.users import User

router = APIRouter()


@router.get("/api/whoami-v2")
def whoami(user: SignedIn) -> dict[str, Any]:
    """The user of the token."""
    return {
        "type": "user",
        "id": user.name,
        "name": user.name,
        "fullname": user.name,
        "email": None,
        "canPay": False,
        "isPro": False,
        "orgs": [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "write"} for org in user.orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "token", "role": "write"}},
    }


@router.head("/api/telemetry/{topic:path}")
@router.post("/v1/telemetry")
def telemetry() -> Response:
    """Accept clients' telemetry; nothing is stored."""
    return Response()


# --- collections -------------------------------------------------------------------------------------------------


def _visible(collection: Collection, user: User | None) -> bool:
    return not collection["private"] or (user is not None and user.owns(collection["owner"]["name"]))


def readable_collection(owner: str, slug: str, store: StoreDep, user: CurrentUser) -> Collection:
    """The collection of a path, if the caller may see it."""
    collection = store.collections.get(f"{owner}/{slug}")
    if not _visible(collection, user):
        raise HubError(404, f"there is no collection {owner}/{slug}")
    return collection


Readable = Annotated[Collection, Depends(readable_collection)]


def writable_slug(collection: Readable, user: SignedIn) -> str:
    """The slug of a collection the caller may change."""
    if not user.owns(collection["owner"]["name"]):
        raise HubError(403, f"{user.name} has no write access to {collection['slug']}")
    return str(collection["slug"])


Writable = Annotated[str, Depends(writable_slug)]


def all_collections(store: StoreDep) -> Collections:
    """The Hub's collections."""
    return store.collections


CollectionsDep = Annotated[Collections, Depends(all_collections)]


@router.get("/api/collections")
def list_collections(
    collections: CollectionsDep,
    user: CurrentUser,
    request: Request,
    response: Response,
    endpoint: Endpoint,
    limit: int = 100,
    p: int = 0,
) -> list[Collection]:
    """Collections by owner or by item, page by page; without `position`, which the client counts."""
    query = parse_qs(request.url.query)
    owners = set(query.get("owner", []))
    wanted = set(query.get("item", []))
    found = [
        collection
        for collection in collections.all()
        if _visible(collection, user)
        and (not owners or collection["owner"]["name"] in owners)
        and wanted <= {f"{item['type']}s/{item['id']}" for item in collection["items"]}
    ]
    page = Page.of(found, p, limit)
    if page.cursor:
        others = urlencode({"limit": limit, "p": page.cursor, **{n: query.get(n, []) for n in ("owner", "item")}}, True)
        response.headers["Link"] = f'<{endpoint}/api/collections?{others}>; rel="next"'
    return [{name: value for name, value in c.items() if name != "position"} for c in page.items]


@router.post("/api/collections")
def create_collection(body: CollectionBody, collections: CollectionsDep, user: SignedIn) -> Collection:
    """Makes a collection."""
    owner = body.namespace or user.name
    if not user.owns(owner):
        raise HubError(403, f"{user.name} has no rights in the namespace {owner}")
    return collections.create(owner, body.title, body.description, body.private)


@router.get("/api/collections/{owner}/{slug}")
def get_collection(collection: Readable) -> Collection:
    """One collection with its items."""
    return collection


@router.patch("/api/collections/{owner}/{slug}")
def edit_collection(slug: Writable, body: CollectionChange, collections: CollectionsDep) -> dict[str, Collection]:
    """Changes title, description, visibility, theme."""
    return {"data": collections.edit(slug, body.model_dump(exclude_none=True))}


@router.delete("/api/collections/{owner}/{slug}")
def delete_collection(slug: Writable, collections: CollectionsDep) -> dict[str, Any]:
    """Removes a collection."""
    collections.delete(slug)
    return {}


@router.post("/api/collections/{owner}/{slug}/items")
def add_item(slug: Writable, body: ItemBody, collections: CollectionsDep) -> Collection:
    """Add a repo to a collection."""
    return collections.add_item(slug, body.item.type, body.item.id, body.note)


@router.patch("/api/collections/{owner}/{slug}/items/{item}")
def edit_item(slug: Writable, item: str, body: ItemChange, collections: CollectionsDep) -> Collection:
    """Change an item's note or position."""
    return collections.edit_item(slug, item, body.note, body.position)


@router.delete("/api/collections/{owner}/{slug}/items/{item}")
def delete_item(slug: Writable, item: str, collections: CollectionsDep) -> Collection:
    """Remove an item from a collection."""
    return collections.delete_item(slug, item)
