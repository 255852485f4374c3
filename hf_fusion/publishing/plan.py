"""The plan of a push: which files go where, under which licence and with which card; nothing is sent.

The files are staged in a temporary folder without any local path of this machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.card import README, render_card
from hf_fusion.cards.facts import CardFacts, read_facts
from hf_fusion.errors import FusionError
from hf_fusion.fusion import save_fused
from hf_fusion.hub.client import hub_api
from hf_fusion.hub.commits import download_file
from hf_fusion.hub.formats import ADAPTER_CONFIG, weight_files
from hf_fusion.hub.provenance import read_recipe, strip_local_paths, strip_paths_from_recipe
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.publishing.checks import check_publishable, check_repo_id, refuse_unpinned
from hf_fusion.publishing.local_experts import (
    folder_info,
    public_names,
    refuse_changed_folders,
    stage_folder,
    target_repos,
)
from hf_fusion.recipe import Recipe
from hf_fusion.types import ExpertInfo

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.evaluation.results import Results

# what a Trainer leaves in a folder for itself
_TRAINING_STATE = (
    "training_args.bin",
    "trainer_state.json",
    "optimizer.*",
    "scheduler.pt",
    "rng_state*.pth",
    "scaler.pt",
)


@dataclass(frozen=True)
class PublishPlan:
    """What a push would do; nothing has been uploaded yet.

    Attributes:
        repo_id: ``owner/name`` of the target.
        folder: folder of the staged files, without local paths.
        files: path in the folder → size in bytes; the card is not among them.
        exists: whether the repo already exists.
        private: whether the repo is private (an existing repo keeps its visibility).
        license: licence id of the model.
        experts: metadata of the experts.
        card: the README, which does not pin the commit of this push yet.
        facts: what the card is rendered from.
        pushes: local experts and bases to push first: path of the folder → ``owner/name``.
    """

    repo_id: str
    folder: Path
    files: dict[str, int]
    exists: bool
    private: bool
    license: str
    experts: tuple[ExpertInfo, ...]
    card: str
    facts: CardFacts
    pushes: dict[str, str] = field(default_factory=dict)
    _staging: tempfile.TemporaryDirectory[str] | None = field(
        default=None, repr=False, compare=False
    )  # keeps the temporary folder alive
    # makes the plan again after `pushes`, from path → ``owner/name@sha``
    _pushed: Callable[[Mapping[str, str]], PublishPlan] | None = field(default=None, repr=False, compare=False)

    @property
    def megabytes(self) -> float:
        """Size of all files, in units of 10⁶ bytes."""
        return sum(self.files.values()) / 1e6

    def summary(self) -> dict[str, Any]:
        """The plan as plain values, for printing."""
        return {
            "repo": self.repo_id + ("" if self.exists else " (new)"),
            "visibility": "private" if self.private else "public",
            "files": len(self.files),
            "MB": round(self.megabytes, 1),
            "license": self.license,
            "experts": [str(info.ref) for info in self.experts],
            **({"pushed first": [f"{path} → {repo}" for path, repo in self.pushes.items()]} if self.pushes else {}),
        }


def plan(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    results: Results | Mapping[str, Any] | None = None,
    push_experts: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> PublishPlan:
    """Prepare a push and run all of its checks; nothing is uploaded.

    Args:
        model: a folder written by `save_fused`, or a model returned by `fuse`.
        repo_id: ``owner/name``.
        private: whether a new repo is private.
        license: licence id of the model; default: derived from those of the experts.
        results: `Results`, or its dict; default: ``results.json`` in the folder.
        push_experts: first push the experts and bases that are local folders, as repos of the same owner and
            visibility, and refer to those repos. By default the published recipe names a folder by its name and the
            SHA-256 of its content.
        overwrite: whether to replace another model in the repo. An earlier version of this model (same method,
            experts of the same names) is always replaced.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: an expert is neither a repo at a commit nor a folder, a folder was changed since the fusion,
            the licences cannot be combined, weights of private or gated experts would become public, the folder is
            incomplete, or the repo contains another model.
    """
    api = hub_api(api)
    check_repo_id(repo_id)
    staging = tempfile.TemporaryDirectory(prefix="hf-fusion-")
    in_memory = None if isinstance(model, (str, Path)) else model
    name = repo_id.rpartition("/")[2]
    folder = Path(model) if isinstance(model, (str, Path)) else save_fused(model, Path(staging.name) / name)
    publishable_files(folder)
    recipe = read_recipe(folder)
    names = public_names(recipe, folder, in_memory)

    def plan_with(names: Mapping[str, str]) -> PublishPlan:
        return _plan_folder(folder, repo_id, recipe, names, private, license, results, overwrite, staging, api)

    if push_experts and names:
        refuse_changed_folders(names)
        repos = target_repos(names, repo_id)
        return replace(plan_with(repos), pushes=repos, _pushed=plan_with)
    return plan_with(names)


def _plan_folder(
    folder: Path,
    repo_id: str,
    recipe: Recipe,
    names: Mapping[str, str],
    private: bool,
    license: str | None,
    results: Results | Mapping[str, Any] | None,
    overwrite: bool,
    staging: tempfile.TemporaryDirectory[str],
    api: HfApi,
) -> PublishPlan:
    """`plan` for a folder; ``names`` maps each local folder of the recipe to its public name."""
    public, files = strip_paths_from_recipe(recipe, names), publishable_files(folder)
    refuse_unpinned([name for name in public.unpinned if name not in names.values()])
    parent = Path(tempfile.mkdtemp(dir=staging.name))
    staged = stage_folder(folder, files, public, names, parent)
    checked = check_publishable(
        public,
        repo_id,
        private,
        license,
        with_bases=not _base_is_referenced(folder),
        known={name: folder_info(path, name) for path, name in names.items()},
        config=read_json(staged / "config.json", str(folder)) if (staged / "config.json").exists() else {},
        overwrite=overwrite,
        api=api,
    )
    facts = read_facts(staged, repo_id, checked.experts, checked.license, results)
    facts = replace(facts, results=strip_local_paths(facts.results, names), license_is_stated=license is not None)
    existing = remote_card(repo_id, api) if checked.exists else ""
    if not existing and (folder / README).exists():
        existing = read_text(folder / README)
    card = render_card(facts, existing)
    experts = tuple(checked.experts)
    return PublishPlan(
        repo_id,
        staged,
        _file_sizes(staged),
        checked.exists,
        checked.private,
        checked.license,
        experts,
        card,
        facts,
        {},
        staging,
    )


def publishable_files(folder: Path) -> dict[str, int]:
    """The files to publish, by size in bytes: all but the card, hidden files and the training state.

    Raises:
        FusionError: the folder contains no complete model, or a link leads out of it.
    """
    check_snapshot(folder, str(folder))
    stem = "adapter_model" if (folder / ADAPTER_CONFIG).exists() else "model"
    if stem == "model" and not (folder / "config.json").exists():
        raise FusionError(f"{folder} contains no model", hint=f"hf-fusion fuse RECIPE --output {folder}")
    files = _file_sizes(folder)
    for name in files:
        own_file(folder / name, folder)  # also in subfolders: no loader follows their links, but a push would
    if not weight_files(files, stem, "safetensors"):
        raise FusionError(f"{folder} has no {stem}.safetensors", hint=f"hf-fusion fuse RECIPE --output {folder}")
    return files


def _file_sizes(folder: Path) -> dict[str, int]:
    """Like `publishable_files`, without the checks."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(_is_excluded(name) for name in path.relative_to(folder).parts)
    }
    files.pop(README, None)
    return files


def _is_excluded(name: str) -> bool:
    """Whether a file or folder is hidden, or training state (whose pickled arguments hold local paths)."""
    return name.startswith((".", "__pycache__", "checkpoint-")) or any(
        fnmatch(name, pattern) for pattern in _TRAINING_STATE
    )


def _base_is_referenced(folder: Path) -> bool:
    """Whether the model refers to its base, whose weights are then not uploaded."""
    if (folder / ADAPTER_CONFIG).exists():
        return True
    return bool(read_json(folder / "config.json", str(folder)).get("base_by_reference"))


def remote_card(repo_id: str, api: HfApi) -> str:
    """The README at the newest commit of a repo; empty where there is none."""
    sha = api.model_info(repo_id).sha
    if not api.file_exists(repo_id, README, revision=sha):
        return ""
    return download_file(api, repo_id, README, sha).read_text(encoding="utf-8")
