"""The workspace of a demo: a folder, a Hub and the owner of its repos. Everything can be repeated without change."""

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
PORT = 8765  # of the embedded Hub in the commands that are printed at the end
SCRIPT = Path(__file__).with_name("fresh_process.py")


@dataclass(frozen=True)
class Workspace:
    """A demo's folder and Hub.

    Attributes:
        folder: for all files of the demo.
        namespace: owner of its repos.
        api: client of the Hub as that owner.
        anyone: client of the Hub without a token.
        embedded: whether the Hub is the embedded one, in ``folder/hub``.
    """

    folder: Path
    namespace: str
    api: HfApi
    anyone: HfApi
    embedded: bool

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return self.api.endpoint

    def repo(self, name: str) -> str:
        """Id of one of the demo's repos."""
        return f"{self.namespace}/{name}"

    def push(self, name: str, folder: Path, settings: Mapping[str, Any] | None = None) -> bool:
        """Upload a folder as a public repo with its settings; returns False if the repo already has these files."""
        repo = self.repo(name)
        self.api.create_repo(repo, exist_ok=True)
        before = self.api.model_info(repo).sha
        commit = self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {name}")
        if settings:
            self.api.update_repo_settings(repo, **settings)
        return commit.oid != before


@contextmanager
def open_workspace(folder: Path, namespace: str | None = None, real_hub: bool = False) -> Iterator[Workspace]:
    """Context manager that opens the demo's folder and runs its Hub.

    Args:
        folder: created if missing.
        namespace: owner of the repos; "demo" on the embedded Hub.
        real_hub: use the Hub at HF_ENDPOINT with the stored token instead of an embedded one.

    Raises:
        FusionError: the real Hub has no namespace, or the folder has other files.
    """
    from huggingface_hub import HfApi

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    if real_hub:
        if namespace is None:
            raise FusionError("on the real Hub the demo needs an owner for its repos", "--namespace YOUR_NAME")
        yield Workspace(folder, namespace, HfApi(), HfApi(token=False), embedded=False)
        return
    from hf_fusion.server import HubServer

    namespace = namespace or OWNER
    with HubServer(folder / "hub") as hub:
        owner = HfApi(endpoint=hub.endpoint, token=hub.token(namespace))
        yield Workspace(folder, namespace, owner, HfApi(endpoint=hub.endpoint, token=False), embedded=True)


def _claim(folder: Path) -> None:
    """Mark a folder as the demo's, whose files it may replace; raises FusionError for one with other files."""
    marker = folder / MARKER
    if (
        not marker.exists()
        and not (folder / "hub" / "users.json").exists()
        and any(p.name != "cache" for p in folder.iterdir())
    ):
        raise FusionError(
            f"{folder} contains files that are not a demo's", "name a folder that does not exist yet: --folder DIR"
        )
    marker.touch()


def run_in_fresh_process(workspace: Workspace, repo: str, revision: str, inputs: Path) -> dict[str, Any]:
    """Load and run a published model in a fresh process: empty HF_HOME, another folder, no hf_fusion.

    Args:
        repo: id of the model.
        revision: its commit.
        inputs: folder with the inputs, see `fresh_process.py`.

    Returns:
        The predictions.

    Raises:
        FusionError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="stranger_") as home:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        given = {"HF_HOME": home, "HF_ENDPOINT": workspace.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if not workspace.embedded and workspace.api.token:
            given["HF_TOKEN"] = str(workspace.api.token)
        done = subprocess.run(
            [sys.executable, "-I", str(SCRIPT), repo, revision, str(inputs)],
            env={**kept, **given},
            cwd=home,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise FusionError(f"a fresh process could not load and run {repo}: {done.stderr.strip()[-2000:]}")
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def report_push(new: bool, repo: str, out: Out) -> None:
    """Print one line about a repo."""
    out.log(f"      {'pushed' if new else 'already there'}  {repo}")


def publish_to(workspace: Workspace, folder: Path, name: str, out: Out) -> PublishResult:
    """Publish a fused model's folder, and print its address."""
    from hf_fusion.publishing.publish import publish

    published = publish(folder, workspace.repo(name), private=not workspace.embedded, api=workspace.api)
    assert published is not None  # the demo does not ask for confirmation
    out.log(f"      {published.url}  at {published.sha[:12]}")
    return published


def relative_path(path: Path) -> str:
    """A path, relative to the working directory if it is inside of it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def shell_commands() -> list[str]:
    """The command that activates the environment of this process, if it is not active."""
    activate = Path(sys.executable).parent / "activate"
    return [f"source {relative_path(activate)}"] if shutil.which("hf-fusion") is None and activate.is_file() else []


def hub_commands(workspace: Workspace) -> list[str]:
    """The commands that start the embedded Hub again."""
    if not workspace.embedded:
        return []
    return [
        f"hf-fusion hub serve {relative_path(workspace.folder / 'hub')} --port {PORT} &",
        f"export HF_ENDPOINT=http://127.0.0.1:{PORT}",
    ]


def show_hub(workspace: Workspace, out: Out) -> None:
    """Print where the Hub is stored, or where repos are pushed."""
    where = (
        f"its repos are stored in {workspace.folder / 'hub'}"
        if workspace.embedded
        else f"your repos go to {workspace.namespace}/…"
    )
    out.log(f"      {where}")


def show_next(workspace: Workspace, out: Out, files: Mapping[str, str], commands: Sequence[str]) -> None:
    """Print the resulting folders, and commands to run next.

    Args:
        files: folder → its content.
        commands: printed after those that activate the environment.
    """
    for folder, content in files.items():
        out.log(f"      {folder}: {content}")
    if workspace.embedded:
        out.log(f"      {relative_path(workspace.folder / 'hub')}: the Hub, which you can browse and load models from")
    out.log("")
    for line in [*shell_commands(), *commands]:
        out.hint(line)
