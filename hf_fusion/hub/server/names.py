"""Which paths, branches and tags a repo may hold: names come from clients, and become names on disk."""

from __future__ import annotations

import re

from .errors import HubError

REF_PART = re.compile(r"(?!\.)[A-Za-z0-9_.+@-]{1,100}(?<!\.)(?<!\.lock)", re.ASCII)


def check_path(path: str) -> str:
    """A path inside a repo as the clients may name it.

    Raises:
        HubError: 400 for anything that could leave the repo or confuse git.
    """
    parts = path.split("/")
    if (
        not path
        or len(path) > 1000
        or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
        or any(ord(c) < 32 or c in "\\\x7f" for c in path)
    ):
        raise HubError(400, f"{path!r} is no path inside a repo")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise HubError(400, f"{path!r} is no path inside a repo") from None
    return path


def check_ref(name: str) -> str:
    """A branch or tag name.

    Raises:
        HubError: 400 where git would refuse it.
    """
    if not name or not all(REF_PART.fullmatch(part) for part in name.split("/")) or ".." in name or "@{" in name:
        raise HubError(400, f"{name!r} is no branch or tag name")
    return name
