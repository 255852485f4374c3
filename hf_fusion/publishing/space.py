"""Deploys one of the project's Gradio apps as a Space: a folder that works without this package.

The requirements are pinned to the versions that are installed here, and the README's ``sdk_version`` is the version of
gradio that the app was tested with. The model of a Space is set by variables, pinned to its commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.families import FAMILIES
from hf_fusion.hub.client import explain_hub_errors, hub_api
from hf_fusion.hub.commits import check_commit, download_file
from hf_fusion.hub.readme import put_metadata, read_metadata
from hf_fusion.io.json_files import read_json
from hf_fusion.progress import phase
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

APPS = Path(__file__).parent / "space_apps"  # the project's folder `spaces`
README, REQUIREMENTS = "README.md", "requirements.txt"
IMPORT = re.compile(r"^\s*from shared\.(\w+) import", re.MULTILINE)


@dataclass(frozen=True)
class SpacePlan:
    """What a deployment would do; nothing has been uploaded yet.

    Attributes:
        name: of the app.
        repo_id: ``owner/name`` of the Space.
        files: path → content.
        removed: files of the Space that the app does not have.
        exists: whether the Space already exists.
        private: whether the Space is private (an existing one keeps its visibility).
        variables: of the Space.
    """

    name: str
    repo_id: str
    files: dict[str, bytes]
    removed: tuple[str, ...]
    exists: bool
    private: bool
    variables: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The plan for display."""
        return {
            "app": self.name,
            "space": self.repo_id,
            "state": "replaced" if self.exists else "private" if self.private else "public",
            "files": len(self.files),
            "removed": list(self.removed),
            "requirements": self.files[REQUIREMENTS].decode().split(),
            "variables": self.variables,
        }


@dataclass(frozen=True)
class DeployedSpace:
    """Where an app runs.

    Attributes:
        repo_id: ``owner/name``.
        sha: commit of its files.
        url: address of its page.
    """

    repo_id: str
    sha: str
    url: str


def app_names() -> list[str]:
    """Names of the apps that can be deployed."""
    return sorted(path.parent.name for path in APPS.glob("*/app.py"))


def plan_space(
    name: str,
    repo_id: str,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    private: bool = True,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> SpacePlan:
    """What it takes to deploy an app; only reads.

    Args:
        name: one of `app_names`.
        repo_id: ``owner/name`` of the Space; created if missing.
        model: ``owner/name[@revision]`` of the fused model that the Space shows; pinned to its commit. By default the
            app's own.
        trust_remote_code: let the Space run the model's code, of that commit; read it first.
        private: whether a new Space is private.
        overwrite: replace the files of a Space that exists.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: there is no such app, its folder is incomplete, an installed library is not of the version that it
            requires, the model does not fit, or the Space has files already.
    """
    if name not in app_names():
        raise FusionError(f"there is no Space {name!r}", suggestion(name, app_names()))
    api = hub_api(api)
    files = _files(name)
    variables: dict[str, str] = {}
    if model is not None:
        pinned = _checked_model(name, ModelRef.parse(model), api)
        variables = {"MODEL_ID": pinned.id, "MODEL_REVISION": str(pinned.revision)}
        variables |= {"TRUST_REMOTE_CODE": "true"} if trust_remote_code else {}
        card = put_metadata(files[README].decode(), {"models": [pinned.id]})
        files[README] = card.encode()
    elif trust_remote_code:
        raise FusionError("trust_remote_code consents to the code of one model, and none is named", "--model ID")
    with explain_hub_errors(repo_id):
        exists = api.repo_exists(repo_id, repo_type="space")
        present = set(api.list_repo_files(repo_id, repo_type="space")) if exists else set()
    if present - {".gitattributes", README} and not overwrite:
        raise FusionError(f"the Space {repo_id} has files already", "--overwrite replaces them")
    removed = tuple(sorted(present - files.keys() - {".gitattributes"}))
    return SpacePlan(name, repo_id, files, removed, exists, private, variables)


def deploy_space(planned: SpacePlan, api: HfApi | None = None) -> DeployedSpace:
    """Carries out a plan: sets the variables, then commits all files at once, and compares what the Hub has then.

    Args:
        planned: what `plan_space` returned.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: the Hub refuses a request, or the commit lacks a file.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, repo_id = hub_api(api), planned.repo_id
    options: dict[str, Any] = {"repo_type": "space"}
    with explain_hub_errors(repo_id), phase(f"Deploying {planned.name} to {repo_id}"):
        url = api.create_repo(repo_id, private=planned.private, exist_ok=True, space_sdk="gradio", **options)
        head = api.repo_info(repo_id, **options).sha
        for key, value in planned.variables.items():
            api.add_space_variable(repo_id, key, value)
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in planned.files.items()]
        operations += [CommitOperationDelete(path) for path in planned.removed]
        message = f"Deploy the Space {planned.name} of hf_fusion {metadata.version('hf_fusion')}"
        done = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head, **options)
        sizes = {
            entry.path: entry.size
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=done.oid, **options)
            if hasattr(entry, "size")
        }
    wrong = [path for path, content in planned.files.items() if sizes.get(path) != len(content)]
    if wrong:
        raise FusionError(f"{repo_id} at {done.oid} lacks {wrong[0]} as it was sent", "run the command again")
    return DeployedSpace(repo_id, str(done.oid), str(url))


def _files(name: str) -> dict[str, bytes]:
    """The files of an app, checked to be complete, with its requirements pinned."""
    folder = APPS / name
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for wanted in (README, REQUIREMENTS):
        if wanted not in files:
            raise FusionError(f"the Space {name} lacks {wanted}", "reinstall hf_fusion")
    modules = {found for path, content in files.items() if path.endswith(".py") for found in _shared(content)}
    if missing := sorted(module for module in modules if f"shared/{module}.py" not in files):
        raise FusionError(f"the Space {name} lacks shared/{missing[0]}.py", "make spaces")
    check_front_matter(name, read_metadata(files[README].decode()), files)
    files[REQUIREMENTS] = pinned(files[REQUIREMENTS].decode()).encode()
    return files


def _shared(content: bytes) -> list[str]:
    return IMPORT.findall(content.decode())


def check_front_matter(name: str, given: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Checks what the Hub reads at the top of a Space's README.

    Args:
        name: of the app.
        given: the metadata.
        files: of the app.

    Raises:
        FusionError: a value is missing or wrong.
    """
    missing = [key for key in ("title", "sdk", "sdk_version", "app_file", "license") if not given.get(key)]
    if missing:
        raise FusionError(
            f"the README of the Space {name} does not set {missing[0]}", f"add {missing[0]}: … at its top"
        )
    if given["sdk"] != "gradio" or given["app_file"] not in files:
        raise FusionError(f"the Space {name} has no {given['app_file']} of gradio", "correct the top of its README")
    if not re.fullmatch(r"\d+\.\d+\.\d+", str(given["sdk_version"])):
        raise FusionError(
            f"the sdk_version {given['sdk_version']!r} of the Space {name} is not a version", 'write it as "6.31.0"'
        )


def pinned(requirements: str) -> str:
    """Requirements with the versions that are installed here.

    Args:
        requirements: lines such as ``torch>=2.6``.

    Raises:
        FusionError: a library is missing, or not of a version that the line allows.
    """
    from packaging.requirements import Requirement

    lines = []
    for line in requirements.splitlines():
        wanted = Requirement(line)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            raise FusionError(
                f"{wanted.name} is not installed, so it cannot be pinned", f"pip install '{line}'"
            ) from None
        if not wanted.specifier.contains(version, prereleases=True):
            raise FusionError(f"the Space requires {line}, but {version} is installed", f"pip install '{line}'")
        lines.append(f"{wanted.name}=={version.partition('+')[0]}\n")  # without "+cpu"
    return "".join(lines)


def _checked_model(name: str, given: ModelRef, api: HfApi) -> ModelRef:
    """A model at its commit, which the app can show.

    Raises:
        FusionError: it cannot.
    """
    if name not in FAMILIES:
        raise FusionError(f"the Space {name} shows no model", "omit --model")
    with explain_hub_errors(given.id, api):
        info = api.model_info(given.id, revision=given.revision)
        sha = check_commit(given.id, given.revision, info.sha)
        config = read_json(download_file(api, given.id, "config.json", sha), given.id)
    if config.get("model_type") != name:
        raise FusionError(
            f"the Space {name} shows models of type {name}, and {given.id} is of type {config.get('model_type')}",
            f"hf-fusion spaces deploy {config['model_type']} …" if config.get("model_type") in FAMILIES else None,
        )
    return ModelRef(given.id, sha)


__all__ = ["DeployedSpace", "SpacePlan", "app_names", "deploy_space", "plan_space"]
