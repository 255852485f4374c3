"""Restarts and kill -9: exactly what was committed survives."""

from __future__ import annotations

import base64
import filecmp
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from hub_integrity import check
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError

from hf_fusion.server import HubServer, add_user

SERVE = """
import sys
from pathlib import Path
from hf_fusion.server import serve
serve(Path(sys.argv[1]), port=int(sys.argv[2]), on_ready=lambda endpoint: print(endpoint, flush=True))
"""


@pytest.fixture
def start():
    """Starts the Hub in a process of its own: ``start(root, port)`` -> process and endpoint. None outlives the test."""
    processes = []

    def run(root: Path, port: int) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", SERVE, str(root), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield run
    for process in processes:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_restart_keeps_everything(tmp_path):
    with HubServer(tmp_path) as hub:
        token = hub.token("alice")
        hub.org("lab", ["alice"])
        api = HfApi(endpoint=hub.endpoint, token=token)
        api.create_repo("alice/m", private=True)
        api.create_repo("lab/d", repo_type="dataset")
        api.upload_file(repo_id="alice/m", path_or_fileobj=b"\0" * 5000, path_in_repo="w.bin")
        api.upload_file(repo_id="alice/m", path_or_fileobj=b"{}", path_in_repo="config.json")
        api.create_branch("alice/m", branch="dev")
        api.create_tag("alice/m", tag="v1", tag_message="one")
        api.update_repo_settings("alice/m", gated="auto")
        slug = api.add_collection_item(api.create_collection("Mine").slug, "alice/m", "model").slug
        api.hf_hub_download("alice/m", "config.json", cache_dir=tmp_path / "cache")

        def everything(api: HfApi):
            return (
                api.model_info("alice/m", files_metadata=True),
                api.list_repo_refs("alice/m"),
                [c.commit_id for c in api.list_repo_commits("alice/m")],
                [d.id for d in api.list_datasets()],
                api.get_collection(slug).items,
                api.whoami(),
            )

        before = everything(api)
    with HubServer(tmp_path) as hub:
        after = everything(HfApi(endpoint=hub.endpoint, token=token))
    assert after == before
    assert before[0].downloads == 1 and check(tmp_path) == 4


def test_stopping_is_fast_even_with_open_connections(tmp_path):
    hub = HubServer(tmp_path).start()
    HfApi(endpoint=hub.endpoint, token=hub.token("x")).whoami()  # its connection stays open
    began = time.monotonic()
    hub.stop()
    hub.stop()
    assert time.monotonic() - began < 3
    with HubServer(tmp_path):
        pass


@pytest.mark.process
def test_the_command_ends_on_a_signal(tmp_path, start):
    process, endpoint = start(tmp_path, 0)
    HfApi(endpoint=endpoint, token=add_user(tmp_path, "x")).create_repo("x/m")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert check(tmp_path) == 1


def test_debris_of_a_crash_is_cleared(tmp_path):
    with HubServer(tmp_path) as hub:
        token = hub.token("a")
        HfApi(endpoint=hub.endpoint, token=token).create_repo("a/m")
    (tmp_path / "tmp" / "half").write_bytes(b"x" * 1000)
    (tmp_path / "tmp" / "new-1" / "objects").mkdir(parents=True)
    with HubServer(tmp_path) as hub:
        assert not list((tmp_path / "tmp").iterdir())
        assert HfApi(endpoint=hub.endpoint, token=token).repo_exists("a/m")


def test_a_repo_deleted_during_a_push_does_not_come_back(alice, hub):
    name, api = alice
    stop = threading.Event()

    def push(n: int) -> None:
        while not stop.is_set():
            with suppress(HfHubHTTPError, RuntimeError):  # the client wraps errors of large files
                data = BytesIO(os.urandom(2000))
                api.upload_file(repo_id=f"{name}/m", path_or_fileobj=data, path_in_repo=f"{n}.bin")

    threads = [threading.Thread(target=push, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        api.create_repo(f"{name}/m", exist_ok=True)
        time.sleep(random.uniform(0, 0.1))
        api.delete_repo(f"{name}/m")
    stop.set()
    for thread in threads:
        thread.join()
    assert not api.repo_exists(f"{name}/m")
    assert max(status for _, path, status in hub.requests if f"{name}/m" in path) < 500
    api.create_repo(f"{name}/m")
    assert api.list_repo_files(f"{name}/m") == [".gitattributes"]


@pytest.mark.process
@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_during_pushes(tmp_path, start, rounds):
    """Killed at a random moment of a push, the Hub comes back with the old commit or the new one, and a retry works."""
    root, port = tmp_path / "hub", free_port()
    token = add_user(root, "alice")
    process, endpoint = start(root, port)
    api = HfApi(endpoint=endpoint, token=token)
    randomness = random.Random(0)

    def made(number: int) -> dict[str, bytes]:
        files = {f"file{n}.bin": os.urandom(randomness.randrange(1, 2_000_000)) for n in range(3)}
        return {**files, "README.md": f"---\nlicense: mit\n---\nround {number}".encode()}

    def push(files: dict[str, bytes], number: int) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        api.create_repo("alice/m", exist_ok=True)
        # every other round without xet, which cannot send file objects
        adds = [CommitOperationAdd(p, BytesIO(d) if number % 2 else d) for p, d in files.items()]
        api.create_commit("alice/m", adds, commit_message=f"round {number}")
        return time.monotonic() - began

    seconds = []
    for number in (-4, -3, -2, -1):
        pushed = [made(number)]
        seconds.append(push(pushed[0], number))
    whole = min(seconds[2:])  # the first of either way takes longer
    hit = 0
    for number in range(rounds):
        files = made(number)

        def try_push(files=files, number=number) -> None:
            with suppress(Exception):  # whatever the client makes of a Hub that is gone
                push(files, number)

        thread = threading.Thread(target=try_push)
        thread.start()
        time.sleep(randomness.uniform(0, whole))
        hit += thread.is_alive()  # the client may have tried again until the Hub was back
        process.kill()
        process.wait()
        process, _ = start(root, port)
        thread.join()
        check(root)
        assert contents(api, tmp_path / f"torn{number}") in (pushed[-1], {**pushed[-1], **files})
        push(files, number)
        pushed.append(files)
        assert contents(api, tmp_path / f"whole{number}") == files
    process.kill()
    process.wait()
    assert check(root) >= rounds + 1
    assert hit or rounds < 20


def contents(api: HfApi, folder: Path) -> dict[str, bytes]:
    api.snapshot_download("alice/m", local_dir=folder)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".gitattributes"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_the_files(tmp_path, start):
    """A file of 200 MB within a commit, and one of 200 MB through Xet, pass through a Hub that stays small."""
    token = add_user(tmp_path, "alice")
    process, endpoint = start(tmp_path, 0)
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo("alice/m")

    def peak() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1000

    def body():
        yield b'{"key": "header", "value": {"summary": "large"}}\n'
        yield b'{"key": "file", "value": {"path": "a.bin", "encoding": "base64", "content": "'
        for _ in range(200):
            yield base64.b64encode(os.urandom(999_999))
        yield b'"}}\n'

    before = peak()
    url = f"{endpoint}/api/models/alice/m/commit/main"
    headers = {"Authorization": f"Bearer {token}"}
    assert get_session().post(url, content=body(), headers=headers, timeout=120).status_code == 200
    large = tmp_path / "b.bin"
    with large.open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(1_000_000))
    api.upload_file(repo_id="alice/m", path_or_fileobj=large, path_in_repo="b.bin")
    copy = Path(api.hf_hub_download("alice/m", "b.bin", cache_dir=tmp_path / "cache"))
    assert filecmp.cmp(copy, large, shallow=False)
    sizes = {entry.path: entry.size for entry in api.list_repo_tree("alice/m")}
    assert sizes["a.bin"] == 200 * 999_999 and sizes["b.bin"] == 200_000_000
    assert peak() - before < 150, f"from {before} to {peak()} MB"
    process.kill()
    process.wait()
    assert check(tmp_path) == 3
