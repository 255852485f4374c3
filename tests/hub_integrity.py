"""Checks all files of a Hub's folder, like `git fsck`, including large files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dulwich.objects import Blob, Commit, ShaFile, Tag, Tree
from dulwich.repo import Repo

from hf_fusion.server.repo import POINTER


def check(root: Path) -> int:
    """Asserts that everything a branch, tag or pull request leads to is there and is what its name says.

    Returns:
        The number of commits seen.
    """
    seen = 0
    for path in (root / "repos").glob("*/*/*.git"):
        json.loads((path / "hub.json").read_text())
        for large in (path / "lfs").rglob("*"):
            if large.is_file():
                assert hashlib.sha256(large.read_bytes()).hexdigest() == large.name, f"{large} is torn"
        repo = Repo(str(path))
        for loose in (path / "objects").glob("??/*"):
            stored = ShaFile.from_path(str(loose))
            assert stored.id.decode() == loose.parent.name + loose.name, f"{loose} is torn"
            stored.check()
        refs = repo.refs.as_dict()
        assert b"refs/heads/main" in refs, f"{path} has no main"
        seen += _walk(repo, path, list(refs.values()))
        repo.close()
    return seen


def _walk(repo: Repo, path: Path, todo: list[bytes]) -> int:
    done, commits = set(), 0
    while todo:
        sha = todo.pop()
        if sha in done:
            continue
        done.add(sha)
        found = repo[sha]
        if isinstance(found, Commit):
            commits += 1
            todo += [found.tree, *found.parents]
        elif isinstance(found, Tree):
            todo += [entry.sha for entry in found.iteritems()]
        elif isinstance(found, Tag):
            todo.append(found.object[1])
        elif isinstance(found, Blob) and (pointer := POINTER.fullmatch(found.data)):
            name = pointer[1].decode()
            large = path / "lfs" / name[:2] / name[2:4] / name
            assert large.stat().st_size == int(pointer[2]), f"{large} is not {pointer[2]} bytes"
    return commits
