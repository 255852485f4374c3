"""The embedded Hub under load: clients that push and pull as fast as they can, every byte compared.

    python tests/benchmarks/hub_load.py                      # 16 clients for 60 s
    python tests/benchmarks/hub_load.py --seconds 5 --clients 4

Each client has a repo of its own and all share one, so that commits meet. Half of the pushes go through Xet, half
through LFS. A file is named after its sha256, so that anyone can check what anyone else pushed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

PROCESSES = 4
SHARED = "lab/shared"
SIZES = (200, 20_000, 300_000, 3_000_000)


@dataclass
class Result:
    """What one client did, or all of them together."""

    pushes: list[float] = field(default_factory=list)  # seconds each
    pulls: list[float] = field(default_factory=list)
    bytes_pushed: int = 0
    bytes_pulled: int = 0
    pushed: dict[str, set[str]] = field(default_factory=dict)  # repo -> files that must be there
    errors: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Takes another client's figures in."""
        self.pushes += other.pushes
        self.pulls += other.pulls
        self.bytes_pushed += other.bytes_pushed
        self.bytes_pulled += other.bytes_pulled
        self.errors += other.errors
        for repo, names in other.pushed.items():
            self.pushed.setdefault(repo, set()).update(names)


def client(endpoint: str, token: str, number: int, until: float, result: Result) -> None:
    """Pushes and pulls until the time is over."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    chance = random.Random(number)
    own = f"user{number}/m"
    api.create_repo(own)
    while time.time() < until:
        repo = SHARED if chance.random() < 0.3 else own
        files = [chance.randbytes(chance.choice(SIZES)) for _ in range(chance.randint(1, 3))]
        names = [f"{hashlib.sha256(data).hexdigest()}.{chance.choice(['bin', 'txt'])}" for data in files]
        # file objects cannot go through Xet
        wrap = BytesIO if chance.random() < 0.5 else bytes
        adds = [CommitOperationAdd(name, wrap(data)) for name, data in zip(names, files, strict=True)]
        try:
            began = time.perf_counter()
            commit = api.create_commit(repo, adds, commit_message="load")
            result.pushes.append(time.perf_counter() - began)
            result.bytes_pushed += sum(map(len, files))
            result.pushed.setdefault(repo, set()).update(names)
            pull(api, repo, chance.choice(names), commit.oid, result)
            other = chance.choice([SHARED, own])
            if there := [name for name in api.list_repo_files(other) if "." in name[1:]]:
                pull(api, other, chance.choice(there), "main", result)
        except Exception as error:
            result.errors.append(f"{type(error).__name__}: {error}"[:500])


def pull(api, repo: str, name: str, revision: str, result: Result) -> None:
    """Downloads a file into an empty cache and compares it with its name."""
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        path = Path(api.hf_hub_download(repo, name, revision=revision, cache_dir=cache))
        result.pulls.append(time.perf_counter() - began)
        data = path.read_bytes()
    result.bytes_pulled += len(data)
    if hashlib.sha256(data).hexdigest() != name.split(".")[0]:
        result.errors.append(f"{repo}/{name} came back different")


def run_clients(endpoint: str, tokens: dict[int, str], until: float, results) -> None:
    """Some clients, each in a thread of this process."""
    found = [Result() for _ in tokens]
    threads = [
        threading.Thread(target=client, args=(endpoint, token, number, until, result))
        for (number, token), result in zip(tokens.items(), found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Result()
    for result in found:
        total.add(result)
    results.put(total)


class StatusCounter(logging.Handler):
    """Counts the answers of the Hub by status, from its log."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: Counter[int] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one line of the log."""
        if isinstance(record.args, tuple) and len(record.args) == 3:
            self.statuses[record.args[2]] += 1


def run(seconds: float, clients: int) -> tuple[Result, Counter[int]]:
    """The whole load; afterwards everything that was pushed is read once more."""
    from huggingface_hub import HfApi

    from hf_fusion.server import HubServer

    counter = StatusCounter()
    log = logging.getLogger("hf_fusion.server.app")
    log.addHandler(counter)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    total = Result()
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder)) as hub:
        tokens = {number: hub.token(f"user{number}") for number in range(clients)}
        hub.org("lab", [f"user{number}" for number in tokens])
        api = HfApi(endpoint=hub.endpoint, token=tokens[0])
        api.create_repo(SHARED)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        until = time.time() + seconds + 3  # seconds to start the processes in
        workers = [
            context.Process(
                target=run_clients,
                args=(hub.endpoint, {n: t for n, t in tokens.items() if n % PROCESSES == part}, until, results),
            )
            for part in range(min(PROCESSES, clients))
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            total.add(results.get(timeout=seconds + 120))
        for worker in workers:
            worker.join()
        for repo, names in total.pushed.items():
            copy = Path(api.snapshot_download(repo, local_dir=Path(folder) / "copy" / repo))
            for name in names:
                if hashlib.sha256((copy / name).read_bytes()).hexdigest() != name.split(".")[0]:
                    total.errors.append(f"{repo}/{name} did not survive")
    log.removeHandler(counter)
    return total, counter.statuses


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args(arguments)
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_VERBOSITY="error")
    home = tempfile.TemporaryDirectory()
    os.environ["HF_HOME"] = home.name
    total, statuses = run(options.seconds, options.clients)

    for verb, times, size in (
        ("pushes", total.pushes, total.bytes_pushed),
        ("pulls", total.pulls, total.bytes_pulled),
    ):
        middle = statistics.median(times) if times else float("nan")
        worst = sorted(times)[int(len(times) * 0.95)] if times else float("nan")
        speed = size / 1e6 / options.seconds
        print(
            f"{len(times):6} {verb:7} {speed:7.1f} MB/s   median {middle * 1000:6.0f} ms   95 % {worst * 1000:6.0f} ms"
        )
    print(f"{sum(statuses.values()):6} answers", dict(sorted(statuses.items())))
    failed = sum(count for status, count in statuses.items() if status >= 500)
    print(f"{failed:6} answers of 500 and above")
    print(f"{len(total.errors):6} errors", *total.errors[:5], sep="\n         ")
    return 1 if failed or total.errors or not total.pulls else 0


if __name__ == "__main__":
    sys.exit(main())
