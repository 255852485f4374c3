"""Fixtures for all tests: an embedded Hub, and clients that never use this machine's caches or tokens."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from quick_python import run_python

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Read when huggingface_hub is imported, so it has to happen before any test module is.
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_home = tempfile.TemporaryDirectory(prefix="hf_home_")
os.environ.update(HF_HOME=_home.name, HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leaves what collecting imports out of garbage collection: every training asks for one, of a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


STARTERS = {"fresh_python", "hf_fusion", "alone", "run_space"}  # fixtures that start processes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `make fast` leaves out and a fixture or a folder tells; other tests are marked where they stand."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & STARTERS:
            item.add_marker("process")
        if "browser" in fixtures:
            item.add_marker("browser")
        if item.path.parent == Path(__file__).parent / "demo":
            item.add_marker("demo")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """One embedded Hub per test process. Tests stay apart by working under user names of their own."""
    from hf_fusion.server import HubServer

    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


_owners = itertools.count()


class Owner:
    """A user of the embedded Hub and its client."""

    def __init__(self, name: str, api: HfApi) -> None:
        self.name, self.api = name, api

    def push(self, name: str, folder: Path, **options) -> str:
        """Upload a folder to ``owner/name`` and give back its commit."""
        repo = f"{self.name}/{name}"
        self.api.create_repo(repo, exist_ok=True, **options)
        return self.api.upload_folder(repo_id=repo, folder_path=folder).oid


@pytest.fixture
def owner(hub) -> Owner:
    """A user and its client."""
    from huggingface_hub import HfApi

    name = f"owner{next(_owners)}"
    return Owner(name, HfApi(endpoint=hub.endpoint, token=hub.token(name)))


@pytest.fixture
def anyone(hub) -> HfApi:
    """A client without a token."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def fresh_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a new process with an empty HF_HOME: ``fresh_python(code, hub, token=None, **env)``.

    HF_ENDPOINT is only read at import, so from_pretrained and load_dataset need a process of their own.
    """

    def run(code: str, hub, token: str | None = None, check: bool = True, **env: str):
        home = Path(tempfile.mkdtemp(dir=tmp_path, prefix="hf_home_"))
        given = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **env}
        if token:
            given["HF_TOKEN"] = token
        done = run_python("-c", code, env={**os.environ, **given}, cwd=tmp_path)
        if check:
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A headless Chromium, one per test process; tests that need one are skipped where there is none."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser found: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()
