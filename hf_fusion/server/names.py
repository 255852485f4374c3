"""Valid paths, branches and tags of a repo: names from clients become names on disk."""

from __future__ import annotations

import re

from hf_fusion.server.errors import HubError

REF_PART = re.compile(r"(?!\.)[A-Za-z0-9_.+@-]{1,100}(?<!\.)(?<!\.lock)", re.ASCII)
SHA = re.compile(r"[0-9a-f]{40}")
MAX_REF, MAX_PATH = 250, 1000  # characters; git keeps a ref in a file of that name
MAX_DEPTH = 32  # folders below folders; what walks over them is safe from what users name


def check_path(path: str) -> str:
    """A path inside a repo as the clients may name it.

    Raises:
        HubError: 400 for anything that could leave the repo or confuse git.
    """
    parts = path.split("/")
    if (
        not path
        or len(path) > MAX_PATH
        or len(parts) > MAX_DEPTH
        or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
        or any(ord(c) < 32 or c in "\\\x7f" for c in path)
    ):
        raise HubError(400, f"{path!r} is not a path inside a repo")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise HubError(400, f"{path!r} is not a path inside a repo") from None
    return path


def check_ref(name: str) -> str:
    """A branch or tag name.

    Raises:
        HubError: 400 where git would refuse it, or where it is longer or deeper than any that people use.
    """
    parts = name[: MAX_REF + 1].split("/")
    if (
        len(name) > MAX_REF
        or len(parts) > MAX_DEPTH
        or not all(REF_PART.fullmatch(part) for part in parts)
        or ".." in name
        or "@{" in name
    ):
        raise HubError(400, f"{name[:MAX_REF]!r} is not a valid branch or tag name")
    return name


def check_new_ref(name: str) -> str:
    """`check_ref` for a new branch or tag: a name that looks like a commit sha could be mistaken for that commit.

    Raises:
        HubError: 400.
    """
    if SHA.fullmatch(check_ref(name)):
        raise HubError(400, f"{name} has the form of a commit sha, so it cannot name a branch or tag")
    return name
