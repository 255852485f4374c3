"""Concurrent clients that push, delete, branch, list, download and resume, in processes and threads.

Each has a repo that is its own and a folder of the repo that all share, so that it knows at every moment what must be
there: what was acknowledged, and nothing else.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

SHARED = "lab/shared"
SIZES = (0, 40, 5_000, 200_000, 1_500_000)


class Client:
    """One user.

    Attributes:
        expected: repo -> path -> sha256 of what was acknowledged, on main.
        done: how often each kind of work was done.
    """

    def __init__(self, endpoint: str, token: str, number: int) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()
        self.api, self.endpoint, self.name = HfApi(endpoint=endpoint, token=token), endpoint, f"user{number}"
        self.randomness = random.Random(number)
        self.repo = f"{self.name}/m"
        self.expected: dict[str, dict[str, str]] = {self.repo: {}, SHARED: {}}
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []

    def work(self, until: float) -> None:
        """Does something, again and again, until the time is over."""
        self.api.create_repo(self.repo)
        kinds: list[Callable[[str], None]] = [self.push, self.push, self.delete, self.branch, self.list, self.download]
        kinds += [self.resume, self.temporary]
        while time.time() < until:
            kind = self.randomness.choice(kinds)
            repo = self.randomness.choice([self.repo, SHARED])
            try:
                kind(repo)
                self.done[kind.__name__] += 1
            except Exception as error:
                self.errors.append(f"{kind.__name__} {repo}: {type(error).__name__}: {error}"[:600])

    def path(self, name: str) -> str:
        return f"{self.name}/{name}"

    def files(self) -> dict[str, bytes]:
        made = [self.randomness.randbytes(self.randomness.choice(SIZES)) for _ in range(self.randomness.randint(1, 3))]
        names = [f"{self.randomness.randrange(12)}.{self.randomness.choice(['bin', 'txt'])}" for _ in made]
        return {self.path(name): data for name, data in zip(names, made, strict=True)}

    def adds(self, files: dict[str, bytes]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd

        wrap = self.randomness.choice([bytes, BytesIO])  # file objects go through LFS, bytes through Xet
        return [CommitOperationAdd(path, wrap(data)) for path, data in files.items()]

    def push(self, repo: str) -> None:
        files = self.files()
        self.api.create_commit(repo, self.adds(files), commit_message="push")
        self.expected[repo] |= {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}

    def delete(self, repo: str) -> None:
        if self.expected[repo]:
            path = self.randomness.choice(sorted(self.expected[repo]))
            self.api.delete_file(path, repo)
            del self.expected[repo][path]

    def branch(self, repo: str) -> None:
        """A branch is made, pushed to, read and removed; main does not see it."""
        name, files = f"{self.name}-{self.randomness.randrange(1 << 30)}", self.files()
        self.api.create_branch(repo, branch=name)
        self.api.create_commit(repo, self.adds(files), commit_message="on a branch", revision=name)
        path, data = self.randomness.choice(list(files.items()))
        self.compare(self.fetch(repo, path, name), hashlib.sha256(data).hexdigest(), path)
        self.api.delete_branch(repo, branch=name)

    def list(self, repo: str) -> None:
        found = {path for path in self.api.list_repo_files(repo) if path.startswith(f"{self.name}/")}
        if found != self.expected[repo].keys():
            self.errors.append(f"{repo} lists {sorted(found)}, acknowledged were {sorted(self.expected[repo])}")
        if repo not in {model.id for model in self.api.list_models(author=repo.split("/")[0])}:
            self.errors.append(f"{repo} is not listed")

    def download(self, repo: str) -> None:
        if self.expected[repo]:
            path = self.randomness.choice(sorted(self.expected[repo]))
            self.compare(self.fetch(repo, path, "main"), self.expected[repo][path], path)

    def resume(self, repo: str) -> None:
        """Goes on with a download of which half is there, as the client does when a connection breaks."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get

        if not self.expected[repo]:
            return
        path = self.randomness.choice(sorted(self.expected[repo]))
        url, headers = hf_hub_url(repo, path, endpoint=self.endpoint), {"Authorization": f"Bearer {self.api.token}"}
        size = get_hf_file_metadata(url, headers=headers).size or 0
        whole = BytesIO(self.fetch(repo, path, "main")[: size // 2])
        whole.seek(size // 2)
        if size:
            http_get(url, whole, resume_size=size // 2, headers=headers, expected_size=size)
        self.compare(whole.getvalue(), self.expected[repo][path], path)

    def temporary(self, repo: str) -> None:
        """A repo that comes and goes."""
        name = f"{self.name}/temporary"
        self.api.create_repo(name, private=self.randomness.random() < 0.5)
        files = self.files()
        self.api.create_commit(name, self.adds(files), commit_message="push")
        self.api.create_tag(name, tag="v1")
        path, data = self.randomness.choice(list(files.items()))
        self.compare(self.fetch(name, path, "v1"), hashlib.sha256(data).hexdigest(), path)
        self.api.delete_repo(name)

    def fetch(self, repo: str, path: str, revision: str) -> bytes:
        with tempfile.TemporaryDirectory() as cache:
            return Path(self.api.hf_hub_download(repo, path, revision=revision, cache_dir=cache)).read_bytes()

    def compare(self, data: bytes, sha256: str, path: str) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            self.errors.append(f"{path} came back different: {len(data)} bytes")


def _work(endpoint: str, tokens: dict[int, str], until: float, results: Any) -> None:
    clients = [Client(endpoint, token, number) for number, token in tokens.items()]
    threads = [threading.Thread(target=client.work, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put([(client.expected, client.done, client.errors) for client in clients])


def run(hub: Any, clients: int, seconds: float, processes: int) -> tuple[dict[str, dict[str, str]], Counter, list[str]]:
    """Lets them work; what must be in each repo in the end, how much was done, and what went wrong."""
    from huggingface_hub import HfApi

    tokens = {number: hub.token(f"user{number}") for number in range(clients)}
    hub.org("lab", [f"user{number}" for number in tokens])
    HfApi(endpoint=hub.endpoint, token=tokens[0]).create_repo(SHARED)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    until = time.time() + seconds + 2  # seconds to start the processes in
    workers = [
        context.Process(
            target=_work,
            args=(hub.endpoint, {n: t for n, t in tokens.items() if n % processes == part}, until, results),
        )
        for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    expected: dict[str, dict[str, str]] = {}
    done: Counter[str] = Counter()
    errors: list[str] = []
    for _ in workers:
        for own, count, wrong in results.get(timeout=seconds + 120):
            for repo, files in own.items():
                expected.setdefault(repo, {}).update(files)
            done += count
            errors += wrong
    for worker in workers:
        worker.join()
    return expected, done, errors
