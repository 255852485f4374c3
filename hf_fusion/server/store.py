"""The Hub's folder: all repos, found by kind and name; nothing in here trusts a name from a client.

::

    DIR/users.json            accounts, hashes of their tokens
    DIR/repos/models/owner/name.git/   (datasets/, spaces/)
    DIR/collections/owner/slug.json
    DIR/tmp/                  unfinished writes, emptied at start
    DIR/quarantine/           repos that could not be read at start
"""

from __future__ import annotations

import fcntl
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError, writing
from hf_fusion.server.collections import Collections
from hf_fusion.server.dates import now
from hf_fusion.server.errors import HubError, repo_not_found
from hf_fusion.server.files import remove_tree
from hf_fusion.server.repo import Repo
from hf_fusion.server.users import NAME, Users

logger = logging.getLogger(__name__)
_OURS = ("users.json", "repos", "server.lock")  # by what a folder is known to be a Hub's
KINDS = ("models", "datasets", "spaces")
# First parts of the Hub's own addresses; an account of that name could not be reached.
RESERVED = frozenset({"api", "models", "datasets", "spaces", "collections", "static", "xet", "lfs", "favicon.ico"})
REPO_NAME = re.compile(rf"{NAME.pattern}/{NAME.pattern}", re.ASCII)


def refuse_foreign(root: Path) -> None:
    """Refuse a folder that holds other files than a Hub's: some of theirs would be emptied, or served.

    Raises:
        FusionError: naming it.
    """
    if root.is_dir() and any(root.iterdir()) and not any((root / name).exists() for name in _OURS):
        raise FusionError(
            f"{root} holds other files, and no Hub", hint="name an empty folder, or one that does not exist yet"
        )


class Store:
    """All repos of one Hub folder. One process at a time may hold it.

    Args:
        root: the folder; created if missing.

    Raises:
        FusionError: another server holds the folder, or it holds something else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.scratch = self.root / "tmp"
        with writing(root):
            self.root.mkdir(parents=True, exist_ok=True)
            refuse_foreign(self.root)
            self._hold = (self.root / "server.lock").open("w")
        try:
            fcntl.flock(self._hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._hold.close()
            raise FusionError(
                f"another Hub serves {root}", hint="stop it, or serve another folder: hf-fusion hub serve DIR"
            ) from None
        remove_tree(self.scratch)
        try:
            with writing(root):
                self.scratch.mkdir(exist_ok=True)
        except FusionError:
            self._hold.close()
            raise
        self.users = Users(self.root)
        self.collections = Collections(self.root, self.scratch)
        self._lock = threading.Lock()
        self._repos = {kind: dict(self._scan(kind)) for kind in KINDS}

    def close(self) -> None:
        """Lets the folder go."""
        self._hold.close()

    def _scan(self, kind: str) -> Iterator[tuple[str, Repo]]:
        for path in sorted((self.root / "repos" / kind).glob("*/*.git")):
            name = f"{path.parent.name}/{path.stem}"
            try:
                repo = Repo(kind, name, path, self.scratch)
            except (OSError, ValueError) as error:  # one damaged repo must not keep the others from being served
                self._quarantine(kind, name, path, error)
            else:
                yield name.lower(), repo

    def _quarantine(self, kind: str, name: str, path: Path, error: Exception) -> None:
        """Sets a repo aside whose settings cannot be read; nothing of it is deleted."""
        aside = self.root / "quarantine" / f"{kind}-{name.replace('/', '-')}-{time.time_ns()}.git"
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        logger.warning("%s %s cannot be read (%s) and was set aside as %s", kind, name, error, aside)

    def _path(self, kind: str, name: str) -> Path:
        """Where a repo lies. Every name that becomes a path passes here.

        Raises:
            HubError: 400 for a name that is none.
        """
        owner, _, own = name.partition("/")
        if (
            kind not in KINDS
            or not REPO_NAME.fullmatch(name)
            or max(len(owner), len(own)) > 96
            or own.endswith((".git", "."))
            or owner.lower() in RESERVED
        ):
            raise HubError(400, f"{name!r} is not a repo name: owner/name with letters, digits, '-', '_', '.'")
        return self.root / "repos" / kind / owner / f"{own}.git"

    def all(self, kind: str) -> list[Repo]:
        """Every repo of a kind."""
        return list(self._repos[kind].values())

    def get(self, kind: str, name: str) -> Repo:
        """One repo; case does not matter.

        Raises:
            HubError: 404 RepoNotFound.
        """
        try:
            return self._repos[kind][name.lower()]
        except KeyError:
            raise repo_not_found(name) from None

    def holds(self, repo: Repo) -> bool:
        """The repo is still there: neither deleted nor moved, nor replaced by another of its name."""
        return self._repos[repo.kind].get(repo.name.lower()) is repo

    def create(self, kind: str, name: str, author: str, settings: dict[str, Any]) -> Repo:
        """Makes a repo.

        Raises:
            FileExistsError: there is one of that name.
        """
        path = self._path(kind, name)
        with self._lock:
            if name.lower() in self._repos[kind]:
                raise FileExistsError(name)
            repo = Repo.create(kind, name, path, self.scratch, {"created": now(), **settings}, author)
            self._repos[kind][name.lower()] = repo
        return repo

    def delete(self, repo: Repo) -> None:
        """Removes a repo: first from sight in one step, then from disk."""
        with self._lock:
            doomed = self.scratch / f"deleted-{time.time_ns()}"
            repo.path.rename(doomed)
            self._repos[repo.kind].pop(repo.name.lower(), None)  # only now: what cannot be renamed stays in sight
        remove_tree(doomed)

    def move(self, repo: Repo, name: str) -> Repo:
        """Gives a repo another name.

        Raises:
            HubError: 409 if that is taken.
        """
        path = self._path(repo.kind, name)
        with self._lock:
            repos = self._repos[repo.kind]
            if name.lower() in repos or path.exists():
                raise HubError(409, f"{name} exists already")
            path.parent.mkdir(parents=True, exist_ok=True)
            repo.path.rename(path)
            del repos[repo.name.lower()]
            repos[name.lower()] = moved = Repo(repo.kind, name, path, self.scratch)
        return moved
