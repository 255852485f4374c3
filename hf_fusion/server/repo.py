"""One repo: a bare git repository, its large files beside it, and its settings.

``name.git/`` holds what git knows, plus ``hub.json`` (settings), ``downloads`` (one byte each) and ``lfs/`` (large
files by sha256). Everything is written by `files.write_atomic`, objects before the ref that names them, so a crash at
any point leaves the old commit or the new one.
"""

from __future__ import annotations

import errno
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dulwich.index import commit_tree
from dulwich.object_store import DiskObjectStore, iter_tree_contents
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tag, Tree

from hf_fusion.server.errors import HubError, entry_not_found, repo_not_found, revision_not_found
from hf_fusion.server.files import (
    IncomingFile,
    files_below,
    remove_tree,
    size_of,
    sync_folder,
    write_atomic,
    write_json,
)
from hf_fusion.server.names import MAX_DEPTH, SHA, check_new_ref, check_ref

SHORT_SHA = re.compile(r"[0-9a-f]{7,39}")
SHA256 = re.compile(r"[0-9a-f]{64}")
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n")
FILE_MODE = 0o100644

# The files a repo starts with; clones made by git then know which files are large.
_SUFFIXES = (
    "7z arrow bz2 gz npy npz parquet rar tar tgz xz zip zst "
    "bin ckpt ftz gguf h5 joblib lz4 model msgpack onnx ot pb pickle pkl pt pth safetensors tflite wasm "
    "bmp flac gif jpeg jpg mp3 mp4 ogg png tiff wav webm webp"
)
LARGE_SUFFIXES = frozenset(_SUFFIXES.split())
GITATTRIBUTES = "".join(f"*.{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(LARGE_SUFFIXES)).encode()


@dataclass(frozen=True)
class File:
    """A file of one commit; ``sha256`` is set for large ones, whose blob is only a pointer."""

    path: str
    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int = 0


@dataclass
class Change:
    """The changes of a commit: path → id of the blob with its new content (None deletes), and folders to delete."""

    files: dict[str, str | None] = field(default_factory=dict)
    deleted_folders: list[str] = field(default_factory=list)


def pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Repo:
    """A repo on disk.

    Args:
        kind: "models", "datasets" or "spaces".
        name: ``owner/name``.
        path: its folder.
        scratch: where temporary files go; the same file system.
    """

    def __init__(self, kind: str, name: str, path: Path, scratch: Path) -> None:
        self.kind = kind
        self.name = name
        self.path = path
        self.scratch = scratch
        self.summary: object = None  # cache of `summaries`
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._head: str | None = None
        self._downloads: int | None = None
        self.settings: dict[str, Any] = json.loads((path / "hub.json").read_bytes())
        if not isinstance(self.settings, dict) or not isinstance(self.settings.get("created"), str):
            raise ValueError("hub.json does not contain a repo's settings")

    @staticmethod
    def create(kind: str, name: str, path: Path, scratch: Path, settings: dict[str, Any], author: str) -> Repo:
        """Creates a repo with one commit on main; it appears at ``path`` only when it is complete.

        Raises:
            FileExistsError: the repo already exists.
        """
        draft = scratch / f"new-{time.time_ns()}-{threading.get_ident()}"
        try:
            (draft / "objects" / "info").mkdir(parents=True)
            (draft / "objects" / "pack").mkdir()
            (draft / "refs" / "heads").mkdir(parents=True)
            (draft / "refs" / "tags").mkdir()
            (draft / "HEAD").write_text("ref: refs/heads/main\n")
            (draft / "config").write_text("[core]\n\trepositoryformatversion = 0\n\tbare = true\n")
            write_json(draft / "hub.json", settings, scratch, draft)
            repo = Repo(kind, name, draft, scratch)
            blob = repo.add_blob(GITATTRIBUTES)
            repo.commit("main", Change({".gitattributes": blob}), "initial commit", author=author, first=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(path)
        except OSError as error:
            remove_tree(draft)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(path) from None
            raise
        return Repo(kind, name, path, scratch)

    # --- settings and counters -------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """The namespace before the slash."""
        return self.name.split("/")[0]

    def change_settings(self, **values: object) -> None:
        """Updates and saves settings such as ``private`` and ``gated``."""
        with self._lock:
            changed = {**self.settings, **values}
            self._write("hub.json", json.dumps(changed).encode())
            sync_folder(self.path)
            self.settings = changed  # last, so that a failed write changes nothing

    def count_download(self) -> None:
        """Adds one to the counter, which is the length of a file that is only appended to."""
        with self._counting, suppress(OSError):  # downloads still work on a full disk
            with (self.path / "downloads").open("ab") as file:
                file.write(b".")
            self._downloads = None if self._downloads is None else self._downloads + 1

    @property
    def downloads(self) -> int:
        """Number of downloads since the repo was created."""
        with self._counting:
            if self._downloads is None:
                self._downloads = size_of(self.path / "downloads") or 0
            return self._downloads

    # --- references ------------------------------------------------------------------------------------------

    @property
    def head(self) -> str:
        """The commit of the main branch, which only this process moves.

        Raises:
            HubError: 404 RevisionNotFound.
        """
        with self._lock:
            if self._head is None:
                self._head = self.resolve("main")
            return self._head

    def refs(self, prefix: str) -> dict[str, str]:
        """Names under ``refs/<prefix>/``, sorted, and the commits they point to."""
        names = sorted(files_below(self.path / "refs" / prefix, MAX_DEPTH))
        shas = {name: self._read_ref(f"refs/{prefix}/{name}") for name in names}
        return {name: sha for name, sha in shas.items() if sha}

    def _read_ref(self, ref: str) -> str | None:
        """The commit that a full ref name points to, also through an annotated tag; None if there is no such ref."""
        try:
            sha = (self.path / ref).read_text().strip()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        target = self.object(sha) if ref.startswith("refs/tags/") else None
        return target.object[1].decode() if isinstance(target, Tag) else sha

    def resolve(self, revision: str) -> str:
        """The full commit sha of a branch, tag, ``refs/…`` name or commit.

        Raises:
            HubError: 404 RevisionNotFound.
        """
        try:
            check_ref(revision)
        except HubError:
            raise revision_not_found(revision) from None
        if SHA.fullmatch(revision):  # always a commit: refs cannot have such names
            candidates, shas = [], [revision]
        else:
            branch, tag = f"refs/heads/{revision}", f"refs/tags/{revision}"
            candidates, shas = [revision] if revision.startswith("refs/") else [branch, tag], []
        for ref in candidates:
            if sha := self._read_ref(ref):
                return sha
        shas = shas or self._ids_starting_with(revision)
        commits = [sha for sha in shas if isinstance(self.object(sha), Commit)]
        if len(commits) == 1:
            return commits[0]
        raise revision_not_found(revision)

    def _ids_starting_with(self, start: str) -> list[str]:
        """Ids of all objects that begin with `start`; none if it is shorter than seven characters."""
        if not SHORT_SHA.fullmatch(start):
            return []
        paths = (self.path / "objects" / start[:2]).glob(f"{start[2:]}*")
        return [start[:2] + path.name for path in paths]

    def create_ref(self, prefix: str, name: str, sha: str, message: str | None = None, author: str = "") -> None:
        """Creates a branch (prefix "heads") or a tag (prefix "tags", annotated if there is a message).

        Raises:
            HubError: 409 if the name exists or conflicts with another.
        """
        check_new_ref(name)
        with self._lock:
            taken = self.refs(prefix)
            if name in taken:
                raise HubError(409, f"Reference already exists: {name}")
            if any(name.startswith(f"{t}/") or t.startswith(f"{name}/") for t in taken):
                raise HubError(409, f"Reference name {name} conflicts with an existing one")
            if message:
                tag = Tag()
                tag.name, tag.message = name.encode(), message.encode()
                tag.object = (Commit, ObjectID(sha.encode()))
                tag.tagger = _signature(author)
                tag.tag_time, tag.tag_timezone = int(time.time()), 0
                sha = self._add(tag)
            self._write_ref(f"refs/{prefix}/{name}", sha)

    def delete_ref(self, prefix: str, name: str) -> None:
        """Removes a branch or a tag.

        Raises:
            HubError: 404 if it does not exist; 403 for main.
        """
        check_ref(name)
        if (prefix, name) == ("heads", "main"):
            raise HubError(403, "Cannot delete the main branch")
        with self._lock:
            if name not in self.refs(prefix):
                raise revision_not_found(name)
            (self.path / "refs" / prefix / name).unlink()

    def _write_ref(self, ref: str, sha: str) -> None:
        self._write(ref, f"{sha}\n".encode(), durable=True)
        if ref == "refs/heads/main":
            self._head = sha

    def _write(self, name: str, data: bytes, durable: bool = False) -> None:
        try:
            write_atomic(self.path / name, data, self.scratch, self.path)
            if durable:
                sync_folder((self.path / name).parent)
        except FileNotFoundError:
            raise repo_not_found(self.name) from None  # deleted or moved meanwhile

    # --- objects ---------------------------------------------------------------------------------------------

    @cached_property
    def _objects(self) -> DiskObjectStore:
        return DiskObjectStore(self.path / "objects")

    def object(self, sha: str) -> ShaFile | None:
        """A git object of any type, or None if there is no such object."""
        try:
            return self._objects[ObjectID(sha.encode())]
        except KeyError:
            return None

    def add_blob(self, data: bytes) -> str:
        """Stores a file's content and returns its id."""
        return self._add(Blob.from_string(data))

    def add_object(self, obj: ShaFile) -> None:
        """Stores a tree; dulwich's `commit_tree` calls this."""
        self._add(obj)

    def _add(self, obj: ShaFile) -> str:
        sha = obj.id.decode()
        name = f"objects/{sha[:2]}/{sha[2:]}"
        if not (self.path / name).exists():
            self._write(name, obj.as_legacy_object())
        return sha

    def add_large(self, incoming: IncomingFile, sha256: str, size: int | None = None) -> None:
        """Stores an uploaded large file.

        Raises:
            HubError: 400 if its sha256 or size differs from what was announced.
        """
        try:
            incoming.publish(self.large_path(sha256), self.path, sha256, size)
        except FileNotFoundError:
            raise repo_not_found(self.name) from None

    def large_path(self, sha256: str) -> Path:
        """The path of a large file, which need not exist yet; 400 for what is not a sha256."""
        if not SHA256.fullmatch(sha256):
            raise HubError(400, f"{sha256!r} is not a sha256")
        return self.path / "lfs" / sha256[:2] / sha256[2:4] / sha256

    # --- commits ---------------------------------------------------------------------------------------------

    def commit_object(self, sha: str) -> Commit:
        """The commit of a sha that `resolve` returned."""
        commit = self.object(sha)
        if not isinstance(commit, Commit):
            raise revision_not_found(sha)
        return commit

    def log(self, sha: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        commit = self.commit_object(sha)
        while True:
            yield commit
            if not commit.parents:
                return
            commit = self.commit_object(commit.parents[0].decode())

    def files(self, sha: str) -> dict[str, File]:
        """All files of a commit by path, sorted."""
        return _files(self, sha)

    def file(self, sha: str, path: str) -> File:
        """One file of a commit.

        Raises:
            HubError: 404 EntryNotFound.
        """
        try:
            return self.files(sha)[path]
        except KeyError:
            raise entry_not_found(path, sha) from None

    def read(self, file: File) -> bytes:
        """The content of a file; for a large file, its pointer."""
        return self.blob(file.oid)

    def blob(self, oid: str) -> bytes:
        """The content of a blob."""
        blob = self.object(oid)
        if not isinstance(blob, Blob):
            raise repo_not_found(self.name)  # deleted meanwhile: commits only name existing blobs
        return blob.as_raw_string()

    def tree_id(self, sha: str, folder: str) -> str:
        """The git id of a folder."""
        tree = self.object(self.commit_object(sha).tree.decode())
        for part in folder.split("/"):
            assert isinstance(tree, Tree)
            tree = self.object(tree[part.encode()][1].decode())
        assert isinstance(tree, Tree)
        return tree.id.decode()

    def last_commits(self, sha: str) -> dict[str, Commit]:
        """The commit that last changed each file and folder of a commit, by path."""
        last: dict[str, Commit] = {}
        files = self.files(sha)
        for commit in self.log(sha):
            before = self.files(commit.parents[0].decode()) if commit.parents else {}
            after = self.files(commit.id.decode())
            for path in files:
                if path in after and after[path] != before.get(path):
                    for name in (path, *_parents(path)):
                        last.setdefault(name, commit)
            if len(last) == len(files) + len({parent for path in files for parent in _parents(path)}):
                break
        return last

    def commit(
        self,
        branch: str,
        change: Change,
        summary: str,
        description: str = "",
        *,
        author: str,
        parent: str | None = None,
        first: bool = False,
        pull_request: bool = False,
    ) -> tuple[str, int | None]:
        """Applies ``change`` on top of ``branch`` and moves the branch there.

        Args:
            branch: branch name or ``refs/pr/N``.
            change: the changes; their blobs are already stored.
            summary: first line of the message.
            description: the rest of the message.
            author: user name.
            parent: the commit that the client started from; None for the branch's newest.
            first: the branch does not exist yet.
            pull_request: leave the branch alone and open a pull request.

        Returns:
            The new commit's sha and the number of the pull request, if one was opened.

        Raises:
            HubError: 412 if the branch is no longer at ``parent``; 400 for a change that cannot be applied.
        """
        ref = branch if branch.startswith("refs/") else f"refs/heads/{branch}"
        with self._lock:
            head = None if first else self.resolve(ref)
            if parent and head and not head.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if not ref.startswith(("refs/heads/", "refs/pr/")):
                raise HubError(400, f"{branch} is not a branch")
            files = {path: file.oid for path, file in self.files(head).items()} if head else {}
            tree = self._tree(_apply(files, change))
            commit = Commit()
            commit.tree = ObjectID(tree.encode())
            commit.parents = [ObjectID(head.encode())] if head else []
            commit.author = commit.committer = _signature(author)
            commit.author_time = commit.commit_time = int(time.time())
            commit.author_timezone = commit.commit_timezone = 0
            commit.encoding = b"UTF-8"
            commit.message = "\n\n".join(part for part in (summary, description) if part).encode(errors="replace")
            sha = self._add(commit)
            number = None
            if pull_request:
                number = max((int(n) for n in self.refs("pr")), default=0) + 1
                ref = f"refs/pr/{number}"
            self._write_ref(ref, sha)
        return sha, number

    def _tree(self, files: dict[str, str]) -> str:
        entries: Iterable[Any] = ((path.encode(), ObjectID(oid.encode()), FILE_MODE) for path, oid in files.items())
        return commit_tree(self, entries).decode()  # type: ignore[arg-type]  # it only calls add_object


def _apply(files: dict[str, str], change: Change) -> dict[str, str]:
    """The files after a change.

    Raises:
        HubError: 400 if a path would be a file and a folder at once, or a deleted path does not exist.
    """
    result = dict(files)
    for folder in change.deleted_folders:
        inside = [path for path in result if path.startswith(f"{folder}/")]
        if not inside and folder not in result:
            raise HubError(400, f"cannot delete {folder}/: there is no such folder")
        for path in [*inside, folder]:
            result.pop(path, None)
    for path, oid in change.files.items():
        if oid is None:
            if result.pop(path, None) is None:
                raise HubError(400, f"cannot delete {path}: there is no such file")
        else:
            result[path] = oid
    for path in change.files:
        if path in result and (clash := next((p for p in _parents(path) if p in result), None)):
            raise HubError(400, f"{clash} cannot be a file and a folder at once")
    folders = {p for path in result for p in _parents(path)}
    if clash := next((path for path in change.files if path in result and path in folders), None):
        raise HubError(400, f"{clash} cannot be a file and a folder at once")
    return result


def _parents(path: str) -> list[str]:
    """``a/b/c`` -> ``["a/b", "a"]``."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


@lru_cache(maxsize=1024)
def _files(repo: Repo, sha: str) -> dict[str, File]:
    """The files of a commit, cached since a commit never changes."""
    entries = iter_tree_contents(repo._objects, repo.commit_object(sha).tree)
    files = (_read_file(repo, entry.path.decode(), entry.sha.decode()) for entry in entries)
    return {file.path: file for file in sorted(files, key=lambda file: file.path)}


def _read_file(repo: Repo, path: str, oid: str) -> File:
    size, sha256, pointer_size = _blob_facts(repo, oid)
    return File(path, oid, size, sha256, pointer_size)


@lru_cache(maxsize=1 << 16)
def _blob_facts(repo: Repo, oid: str) -> tuple[int, str | None, int]:
    """Size of a file, and for a large one its sha256 and the size of its pointer."""
    data = repo.blob(oid)
    if match := POINTER.fullmatch(data):
        return int(match[2]), match[1].decode(), len(data)
    return len(data), None, 0


def _signature(author: str) -> bytes:
    return f"{author} <{author}@users.noreply.localhost>".encode()
