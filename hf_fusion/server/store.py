"""The Hub's folder with all repos, found by kind and name. Names from clients are checked before they become paths.

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
_HUB_ENTRIES = ("users.json", "repos", "server.lock")  # a folder with one of these is a Hub's
KINDS = ("models", "datasets", "spaces")
# First parts of the Hub's routes; an account with such a name could not be reached.
RESERVED = frozenset({"api", "models", "datasets", "spaces", "collections", "static", "xet", "lfs", "favicon.ico"})
REPO_NAME = re.compile(rf"{NAME.pattern}/{NAME.pattern}", re.ASCII)


def refuse_foreign(root: Path) -> None:
    """Refuses a folder with files that are not a Hub's, since the Hub empties and serves its folder.

    Raises:
        FusionError: the folder is not empty and not a Hub's; the message names it.
    """
    if root.is_dir() and any(root.iterdir()) and not any((root / name).exists() for name in _HUB_ENTRIES):
        raise FusionError(
            f"{root} contains files, but is not a Hub's folder",
            hint="name an empty folder, or one that does not exist yet",
        )


class Store:
    """All repos of one Hub folder, which only one process at a time can open.

    Args:
        root: the folder; created if missing.

    Raises:
        FusionError: another server uses the folder, or it is not a Hub's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.scratch = self.root / "tmp"
        with writing(root):
            self.root.mkdir(parents=True, exist_ok=True)
            refuse_foreign(self.root)
            self._lock_file = (self.root / "server.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise FusionError(
                f"another process already serves {root}",
                hint="stop it, or serve another folder: hf-fusion hub serve DIR",
            ) from None
        remove_tree(self.scratch)
        try:
            with writing(root):
                self.scratch.mkdir(exist_ok=True)
        except FusionError:
            self._lock_file.close()
            raise
        self.users = Users(self.root)
        self.collections = Collections(self.root, self.scratch)
        self._lock = threading.Lock()
        self._repos = {kind: dict(self._scan(kind)) for kind in KINDS}

    def close(self) -> None:
        """Releases the folder for other processes."""
        self._lock_file.close()

    def _scan(self, kind: str) -> Iterator[tuple[str, Repo]]:
        for path in sorted((self.root / "repos" / kind).glob("*/*.git")):
            name = f"{path.parent.name}/{path.stem}"
            try:
                repo = Repo(kind, name, path, self.scratch)
            except (OSError, ValueError) as error:  # the other repos must still be served
                self._quarantine(kind, name, path, error)
            else:
                yield name.lower(), repo

    def _quarantine(self, kind: str, name: str, path: Path, error: Exception) -> None:
        """Moves a repo whose settings cannot be read out of the way; nothing is deleted."""
        target = self.root / "quarantine" / f"{kind}-{name.replace('/', '-')}-{time.time_ns()}.git"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        logger.warning("the repo %s/%s cannot be read (%s), so it was moved to %s", kind, name, error, target)

    def _path(self, kind: str, name: str) -> Path:
        """The folder of a repo; checks the name, and is the only way in which a name becomes a path.

        Raises:
            HubError: 400 for an invalid name.
        """
        owner, _, repo_name = name.partition("/")
        if (
            kind not in KINDS
            or not REPO_NAME.fullmatch(name)
            or max(len(owner), len(repo_name)) > 96
            or repo_name.endswith((".git", "."))
            or owner.lower() in RESERVED
        ):
            raise HubError(400, f"{name!r} is not a repo name: write owner/name with letters, digits, '-', '_' and '.'")
        return self.root / "repos" / kind / owner / f"{repo_name}.git"

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
        """Whether a repo still exists: not deleted, moved, or replaced by another of its name."""
        return self._repos[repo.kind].get(repo.name.lower()) is repo

    def create(self, kind: str, name: str, author: str, settings: dict[str, Any]) -> Repo:
        """Creates a repo.

        Raises:
            FileExistsError: the name is taken.
        """
        path = self._path(kind, name)
        with self._lock:
            if name.lower() in self._repos[kind]:
                raise FileExistsError(name)
            repo = Repo.create(kind, name, path, self.scratch, {"created": now(), **settings}, author)
            self._repos[kind][name.lower()] = repo
        return repo

    def delete(self, repo: Repo) -> None:
        """Deletes a repo: it disappears in one step, then its files are removed."""
        with self._lock:
            doomed = self.scratch / f"deleted-{time.time_ns()}"
            repo.path.rename(doomed)
            self._repos[repo.kind].pop(repo.name.lower(), None)  # last, so that the repo stays if renaming fails
        remove_tree(doomed)

    def move(self, repo: Repo, name: str) -> Repo:
        """Renames a repo.

        Raises:
            HubError: 409 if the new name is taken.
        """
        path = self._path(repo.kind, name)
        with self._lock:
            repos = self._repos[repo.kind]
            if name.lower() in repos or path.exists():
                raise HubError(409, f"{name} already exists")
            path.parent.mkdir(parents=True, exist_ok=True)
            repo.path.rename(path)
            del repos[repo.name.lower()]
            repos[name.lower()] = moved = Repo(repo.kind, name, path, self.scratch)
        return moved
