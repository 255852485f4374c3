"""Users, organisations and their tokens. Only sha256 hashes of tokens are ever stored."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError, writing
from hf_fusion.server.files import sync_folder

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*", re.ASCII)


@dataclass(frozen=True)
class User:
    """The user of a request: a name and the organisations it belongs to."""

    name: str
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether the user may write to repos of a namespace."""
        return namespace == self.name or namespace in self.orgs


class Users:
    """The accounts of one Hub folder, in ``users.json``; safe to change from several processes at once.

    Args:
        root: the Hub's folder.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "users.json"
        self._seen: tuple[int, int] | None = None
        self._accounts: dict[str, dict[str, Any]] = {}

    def _load(self) -> dict[str, dict[str, Any]]:
        """Reads the file again when it changed, so that `hub user` works beside a running server."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return {}
        if self._seen != (stat.st_mtime_ns, stat.st_ino):
            self._accounts = json.loads(self._path.read_bytes())
            self._seen = (stat.st_mtime_ns, stat.st_ino)
        return self._accounts

    @contextmanager
    def _change(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Yields the accounts for changes, under a lock, and saves them atomically."""
        draft = self._path.with_suffix(".new")
        with writing(self._path), ExitStack() as stack:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(self._path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            accounts = json.loads(self._path.read_bytes()) if self._path.exists() else {}
            yield accounts
            stack.callback(draft.unlink, missing_ok=True)
            with draft.open("w") as file:
                draft.chmod(0o600)
                json.dump(accounts, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
            sync_folder(self._path.parent)

    def new_token(self, name: str) -> str:
        """Creates a token for a user, who is created if new. Only its hash is stored, so it cannot be shown again."""
        _check_name(name)
        token = "hf_" + secrets.token_urlsafe(30).replace("_", "x").replace("-", "y")
        with self._change() as accounts:
            account = accounts.setdefault(name, {"type": "user", "tokens": [], "orgs": []})
            if account["type"] != "user":
                raise FusionError(f"{name} is an organisation and has no tokens", hint="use a member's token")
            account["tokens"].append(_digest(token))
        return token

    def new_org(self, name: str, members: list[str]) -> None:
        """Creates an organisation, or adds members to it; unknown members are created."""
        for account_name in (name, *members):
            _check_name(account_name)
        with self._change() as accounts:
            if accounts.setdefault(name, {"type": "org"})["type"] != "org":
                raise FusionError(f"{name} is a user, not an organisation", hint="choose another name")
            for member in members:
                account = accounts.setdefault(member, {"type": "user", "tokens": [], "orgs": []})
                if name not in account["orgs"]:
                    account["orgs"].append(name)

    def by_token(self, token: str) -> User | None:
        """The user that a token belongs to, or None."""
        digest = _digest(token)
        for name, account in self._load().items():
            if digest in account.get("tokens", ()):
                return User(name, tuple(account["orgs"]))
        return None

    def exists(self, name: str) -> bool:
        """Whether there is a user or organisation of that name."""
        return name in self._load()

    def members(self, org: str) -> list[str]:
        """Names of the users that belong to an organisation."""
        return [name for name, account in self._load().items() if org in account.get("orgs", ())]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()  # a header may contain any bytes


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > 96:
        raise FusionError(f"{name!r} is not a valid user name", hint="use letters, digits, '-', '_' and '.'")
