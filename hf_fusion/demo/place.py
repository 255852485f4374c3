"""Where a demo happens: a folder, a Hub, and who one is there. Everything here can be run again and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_fusion.cli.output import Out
    from hf_fusion.publishing.push import PublishResult

OWNER = "demo"
MARKER = ".hf-fusion-demo"
PORT = 8765  # at which the next commands find the embedded Hub again
STRANGER = Path(__file__).with_name("stranger.py")


@dataclass(frozen=True)
class Place:
    """A demo's surroundings.

    Attributes:
        folder: holds everything the demo makes.
        namespace: owner of all its repos.
        api: the Hub's client, as that owner.
        anyone: the Hub's client without a token: what everybody sees.
        embedded: the Hub is the embedded one, in ``folder/hub``.
    """

    folder: Path
    namespace: str
    api: HfApi
    anyone: HfApi
    embedded: bool

    @property
    def endpoint(self) -> str:
        """Where the Hub answers."""
        return self.api.endpoint

    def repo(self, name: str) -> str:
        """Id of one of the demo's repos."""
        return f"{self.namespace}/{name}"

    def push(self, name: str, folder: Path, settings: Mapping[str, Any] | None = None) -> bool:
        """Uploads a folder as a public repo with its settings; False where the Hub has exactly these files already."""
        repo = self.repo(name)
        self.api.create_repo(repo, exist_ok=True)
        before = self.api.model_info(repo).sha
        commit = self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {name}")
        if settings:
            self.api.update_repo_settings(repo, **settings)
        return commit.oid != before


@contextmanager
def open_place(folder: Path, namespace: str | None = None, real_hub: bool = False) -> Iterator[Place]:
    """Opens the demo's folder and its Hub, which is up for as long as the context lasts.

    Args:
        folder: created if missing.
        namespace: owner of the repos; "demo" on the embedded Hub.
        real_hub: use the Hub at HF_ENDPOINT with the stored token instead of an embedded one.

    Raises:
        FusionError: the real Hub is wanted without a namespace, or the folder is somebody else's.
    """
    from huggingface_hub import HfApi

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    if real_hub:
        if namespace is None:
            raise FusionError("on the real Hub the demo needs a place for its repos", "--namespace YOUR_NAME")
        yield Place(folder, namespace, HfApi(), HfApi(token=False), embedded=False)
        return
    from hf_fusion.server import HubServer

    namespace = namespace or OWNER
    with HubServer(folder / "hub") as hub:
        owner = HfApi(endpoint=hub.endpoint, token=hub.token(namespace))
        yield Place(folder, namespace, owner, HfApi(endpoint=hub.endpoint, token=False), embedded=True)


def _claim(folder: Path) -> None:
    """Marks a folder as the demo's, which replaces what it finds there; refuses one that holds other files."""
    marker = folder / MARKER
    if (
        not marker.exists()
        and not (folder / "hub" / "users.json").exists()
        and any(p.name != "cache" for p in folder.iterdir())
    ):
        raise FusionError(f"{folder} holds files that are not a demo's", "--folder, one that does not exist yet")
    marker.touch()


def ask_a_stranger(place: Place, repo: str, revision: str, inputs: Path) -> dict[str, Any]:
    """Lets a fresh process use a published model: empty HF_HOME, another folder, no hf_fusion.

    Args:
        repo, revision: what it loads.
        inputs: folder with what it is asked, see `stranger.py`.

    Returns:
        What it answered.

    Raises:
        FusionError: it could not load or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="stranger_") as home:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        given = {"HF_HOME": home, "HF_ENDPOINT": place.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if not place.embedded and place.api.token:
            given["HF_TOKEN"] = str(place.api.token)
        done = subprocess.run(
            [sys.executable, "-I", str(STRANGER), repo, revision, str(inputs)],
            env={**kept, **given},
            cwd=home,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise FusionError(f"a fresh process could not use {repo}: {done.stderr.strip()[-2000:]}")
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def report_push(new: bool, repo: str, out: Out) -> None:
    """One line about a repo."""
    out.log(f"      {'pushed' if new else 'there already'}  {repo}")


def publish_to(place: Place, folder: Path, name: str, out: Out) -> PublishResult:
    """Publishes a fused model's folder, and says where."""
    from hf_fusion.publishing.publish import publish

    published = publish(folder, place.repo(name), private=not place.embedded, api=place.api)
    assert published is not None  # nobody was asked to confirm
    out.log(f"      {published.url}  at {published.sha[:12]}")
    return published


def near(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def shell_lines() -> list[str]:
    """What to type first where the environment of this process is not active."""
    activate = Path(sys.executable).parent / "activate"
    return [f"source {near(activate)}"] if shutil.which("hf-fusion") is None and activate.is_file() else []


def hub_lines(place: Place) -> list[str]:
    """What to type for an embedded Hub to be there again."""
    if not place.embedded:
        return []
    return [
        f"hf-fusion hub serve {near(place.folder / 'hub')} --port {PORT} &",
        f"export HF_ENDPOINT=http://127.0.0.1:{PORT}",
    ]


def show_hub(place: Place, out: Out) -> None:
    """Where the Hub is kept, or where repos go."""
    where = f"kept in {place.folder / 'hub'}" if place.embedded else f"your repos go to {place.namespace}/…"
    out.log(f"      {where}")


def show_next(place: Place, out: Out, files: Mapping[str, str], commands: Sequence[str]) -> None:
    """Where things lie, and commands that work as they stand.

    Args:
        files: folders, and what is in each.
        commands: what to type, after the environment is active.
    """
    for folder, content in files.items():
        out.log(f"      {folder}: {content}")
    if place.embedded:
        out.log(f"      {near(place.folder / 'hub')}: the Hub, to look at in a browser and to load from")
    out.log("")
    for line in [*shell_lines(), *commands]:
        out.hint(line)
