"""Spaces as deployed: a copied folder, in a separate process that cannot import hf_fusion."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from axe_playwright_python.sync_playwright import Axe

SPACES = Path(__file__).parents[2] / "spaces"
# a Space has neither hf_fusion nor peft
ALONE = "import sys; sys.modules['hf_fusion'] = sys.modules['peft'] = None; sys.path.insert(0, '.')\n"
RUN = ALONE + "import runpy; runpy.run_path('app.py', run_name='__main__')"
START_SECONDS = 90
SHOWN = ".ui-section, .ui-message"  # once a page is there


@pytest.fixture(scope="module")
def space_modules() -> Iterator[Callable[..., list[ModuleType]]]:
    """``space_modules("foe", "page", …)`` imports a Space's own modules; other Spaces may use the same names."""
    folders: list[Path] = []

    def load(space: str, *modules: str) -> list[ModuleType]:
        if folders and folders[-1] != SPACES / space:
            forget(folders[-1])
        folders.append(SPACES / space)
        sys.path.insert(0, str(folders[-1]))
        return [importlib.import_module(module) for module in modules]

    yield load
    for folder in folders:
        sys.path.remove(str(folder))
        forget(folder)


def forget(space: Path) -> None:
    """Other Spaces have modules of the same names."""
    own = {path.stem for path in space.glob("*.py")}
    for name in [name for name in sys.modules if name in own or name.partition(".")[0] == "shared"]:
        del sys.modules[name]


@pytest.fixture
def alone(hub, tmp_path) -> Callable[..., str]:
    """``alone("foe", code, …)`` runs code in a copy of the Space's folder and gives what it prints."""

    def run(space: str, code: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", ALONE + code],
            cwd=copy_space(space, tmp_path),
            env=space_environment(hub.endpoint, tmp_path / "home", **variables),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def copy_space(name: str | Path, into: Path) -> Path:
    """The Space's folder alone, as a Hub would clone it; a folder that was deployed has an absolute path."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(SPACES / name, into / Path(name).name, ignore=ignored))


def space_environment(endpoint: str, home: Path, **variables: str) -> dict[str, str]:
    """What a Space's process sees: its Hub, an empty cache, its settings."""
    given = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **given, "TRUST_REMOTE_CODE": "true", **variables}


@pytest.fixture(scope="session")
def run_space(hub, tmp_path_factory) -> Iterator[Callable[..., str]]:
    """``run_space("foe", MODEL_ID=…)`` starts a Space and gives its URL; it stops when the tests end."""
    processes: list[subprocess.Popen] = []

    def run(name: str | Path, **variables: str) -> str:
        work = tmp_path_factory.mktemp("space")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = {"GRADIO_SERVER_PORT": str(port), **variables}
        log = (work / "log.txt").open("w")
        process = subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=copy_space(name, work),
            env=space_environment(hub.endpoint, work / "home", **variables),
            stdout=log,
            stderr=log,
        )
        processes.append(process)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urlopen(url, timeout=5).close()
                return url
            except (URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"the Space did not start:\n{(work / 'log.txt').read_text()[-4000:]}")

    yield run
    for process in processes:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def visit(browser):
    """Opens a page. At the end it must not have written an error to the console or asked another host, and axe-core
    must find nothing that keeps people out, such as too little contrast or a control without a name.
    """
    pages, errors, hosts = [], [], set()

    def open_page(url: str, width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on(
            "console", lambda entry: errors.append(f"{entry.text} {entry.location}") if entry.type == "error" else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(re.sub(r"^(\w+:(//[^:/]*)?).*", r"\1", request.url)))
        pages.append(page)
        page.goto(url)
        page.wait_for_selector(SHOWN)
        return page

    yield open_page
    hacked = [page.evaluate("window.hacked") for page in pages]
    barriers = [finding for page in pages for finding in barriers_of(page)]
    for page in pages:
        page.close()
    assert barriers == []
    assert errors == [] and hosts <= {"http://127.0.0.1", "data:", "blob:"} and not any(hacked)


def barriers_of(page) -> list[str]:
    """What axe-core calls serious or critical on a page, as it is now."""
    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {node['failureSummary']} {node['html'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
