"""Collections: users' lists of repos, in one JSON file each."""

from __future__ import annotations

import json
import re
import secrets
import threading
from pathlib import Path
from typing import Any

from hf_fusion.server.dates import now
from hf_fusion.server.errors import HubError
from hf_fusion.server.files import write_json

SLUG = re.compile(r"[a-z0-9-]{1,120}")

Collection = dict[str, Any]


class Collections:
    """All collections of a Hub folder.

    Args:
        root: the Hub's folder.
        scratch: where unfinished writes go.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root = root / "collections"
        self._root.mkdir(exist_ok=True)
        self._scratch = scratch
        self._lock = threading.Lock()
        found = (json.loads(path.read_bytes()) for path in sorted(self._root.glob("*/*.json")))
        self._all: dict[str, Collection] = {collection["slug"]: collection for collection in found}

    def all(self) -> list[Collection]:
        """All collections, the most recently changed first."""
        return sorted(self._all.values(), key=lambda c: c["lastUpdated"], reverse=True)

    def get(self, slug: str) -> Collection:
        """One collection.

        Raises:
            HubError: 404.
        """
        try:
            return self._all[slug]
        except KeyError:
            raise HubError(404, f"there is no collection {slug}") from None

    def create(self, owner: str, title: str, description: str | None, private: bool) -> Collection:
        """Makes a collection.

        Raises:
            HubError: 409 if the owner has one with that title.
        """
        with self._lock:
            for other in self._all.values():
                if (other["owner"]["name"], other["title"]) == (owner, title):
                    raise HubError(409, f"{owner} already has a collection {title!r}", body={"slug": other["slug"]})
            words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80]
            collection: Collection = {
                "slug": f"{owner}/{words}-{secrets.token_hex(12)}".replace("/-", "/"),
                "title": title,
                "description": description,
                "owner": {"name": owner, "type": "user"},
                "private": private,
                "theme": "orange",
                "upvotes": 0,
                "position": 0,
                "items": [],
            }
            return self._save(collection)

    def edit(self, slug: str, values: dict[str, Any]) -> Collection:
        """Changes a collection's own properties."""
        with self._lock:
            return self._save({**self.get(slug), **values})

    def delete(self, slug: str) -> None:
        """Removes a collection."""
        with self._lock:
            self.get(slug)
            self._path(slug).unlink(missing_ok=True)
            del self._all[slug]

    def add_item(self, slug: str, kind: str, name: str, note: str | None) -> Collection:
        """Appends a repo.

        Raises:
            HubError: 409 if the collection already contains it.
        """
        with self._lock:
            collection = self.get(slug)
            if any((other["type"], other["id"]) == (kind, name) for other in collection["items"]):
                raise HubError(409, f"{name} is already in {slug}")
            entry = {"_id": secrets.token_hex(12), "id": name, "type": kind}
            return self._save_items(collection, [*collection["items"], _with_note(entry, note)])

    def edit_item(self, slug: str, item_id: str, note: str | None, position: int | None) -> Collection:
        """Change an item's note or position."""
        with self._lock:
            collection = self.get(slug)
            entry = _with_note(self._item(collection, item_id), note)
            items = [entry if item["_id"] == item_id else item for item in collection["items"]]
            if position is not None:
                items.remove(entry)
                items.insert(position, entry)
            return self._save_items(collection, items)

    def delete_item(self, slug: str, item_id: str) -> Collection:
        """Remove an item."""
        with self._lock:
            collection = self.get(slug)
            entry = self._item(collection, item_id)
            return self._save_items(collection, [item for item in collection["items"] if item is not entry])

    def _item(self, collection: Collection, item_id: str) -> dict[str, Any]:
        items: list[dict[str, Any]] = collection["items"]
        for item in items:
            if item["_id"] == item_id:
                return item
        raise HubError(404, f"there is no item {item_id} in {collection['slug']}")

    def _save_items(self, collection: Collection, items: list[dict[str, Any]]) -> Collection:
        return self._save({**collection, "items": [{**item, "position": n} for n, item in enumerate(items)]})

    def _save(self, collection: Collection) -> Collection:
        collection = {**collection, "lastUpdated": now()}
        write_json(self._path(collection["slug"]), collection, self._scratch, self._root)
        self._all[collection["slug"]] = collection
        return collection

    def _path(self, slug: str) -> Path:
        owner, _, name = slug.partition("/")
        assert SLUG.fullmatch(name), slug  # made by create()
        return self._root / owner / f"{name}.json"


def _with_note(item: dict[str, Any], note: str | None) -> dict[str, Any]:
    return item if note is None else {**item, "note": {"text": note[:500], "html": ""}}
