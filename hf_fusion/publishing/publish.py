"""From a fused model to a repo on the Hub: plan, look, push.

A push is at most two commits, each atomic: first everything (on a new repo with a card), then the card that pins the
first one's sha, since no commit can name its own. Whatever interrupts it, the repo holds a whole model or none, and
the same call again does only what is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.card import README, CardFacts, read_facts, render_card
from hf_fusion.cards.usage import pinned_revision
from hf_fusion.errors import FusionError
from hf_fusion.families import STALE
from hf_fusion.fusion import save_fused
from hf_fusion.hub.client import explained, hub_api, same_file
from hf_fusion.hub.commits import download_file, found_commit
from hf_fusion.hub.formats import ADAPTER_CONFIG, weight_files
from hf_fusion.hub.provenance import recipe_in, told, told_plain
from hf_fusion.hub.snapshot import check_snapshot
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.progress import phase
from hf_fusion.publishing.checks import allowed_to, check_id, check_write, refuse_unnamed
from hf_fusion.publishing.local_experts import (
    folder_info,
    push_folders,
    refuse_changed,
    repos_of,
    told_names,
    without_paths,
)
from hf_fusion.recipe import Recipe
from hf_fusion.types import ExpertInfo, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel


_LEFT = ("training_args.bin", "trainer_state.json", "optimizer.*", "scheduler.pt", "rng_state*.pth", "scaler.pt")


@dataclass(frozen=True)
class PublishPlan:
    """What a push would do; nothing has been sent yet.

    Attributes:
        repo_id: where to.
        folder: what is pushed; without a path of this machine.
        files: path → bytes, without the card.
        exists: whether the repo is already there.
        private: its visibility (a repo that exists keeps its own).
        license: licence id of the model.
        experts: what the Hub says about the experts.
        card: the README as it will be, but for the commit it pins.
        facts: what the card is rendered from.
        pushes: folders that are pushed first, as experts and bases: path → ``owner/name``.
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
    _staging: Any = field(default=None, repr=False, compare=False)  # holds the temporary folder
    # the plan once the folders are pushed, from path → ``owner/name@sha``
    _pushed: Callable[[Mapping[str, str]], PublishPlan] | None = field(default=None, repr=False, compare=False)

    @property
    def megabytes(self) -> float:
        """Size of all files."""
        return sum(self.files.values()) / 1e6

    def summary(self) -> dict[str, Any]:
        """The plan in a few plain values, for printing."""
        return {
            "repo": self.repo_id + ("" if self.exists else " (new)"),
            "visibility": "private" if self.private else "public",
            "files": len(self.files),
            "MB": round(self.megabytes, 1),
            "license": self.license,
            "experts": [str(info.ref) for info in self.experts],
            **({"pushed first": [f"{path} → {repo}" for path, repo in self.pushes.items()]} if self.pushes else {}),
        }


@dataclass(frozen=True)
class PublishResult:
    """Where a model lies now.

    Attributes:
        repo_id: its repo.
        sha: the commit that its card pins: load it with ``revision=sha``.
        url: its page.
        private: whether only its owner sees it.
    """

    repo_id: str
    sha: str
    url: str
    private: bool


def plan(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    results: Any = None,
    push_experts: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> PublishPlan:
    """Find out what publishing would do, and whether it may be done.

    Args:
        model: a folder written by `save_fused`, or a model as `fuse` returned it.
        repo_id: ``owner/name``.
        private: visibility of a new repo.
        license: the model's licence; default is computed from the experts'.
        results: what was measured (`Results` or its dict); default is ``results.json`` in the folder.
        push_experts: first push experts and bases that are folders, as repos of the same owner and visibility, and name
            those. By default others are told a folder's name and the sha256 of its content.
        overwrite: whether a repo may be replaced that holds another model than an earlier version of this one, made by
            the same method of experts of the same names.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: for experts that are neither on the Hub at a commit nor folders, folders that were changed since,
            licences that cannot be combined, weights of private or gated experts on their way to a public repo, an
            incomplete folder, or a repo that holds another model.
    """
    api = hub_api(api)
    check_id(repo_id)
    staging = tempfile.TemporaryDirectory(prefix="hf-fusion-")
    is_folder = isinstance(model, (str, Path))
    folder = Path(model) if is_folder else save_fused(model, Path(staging.name) / repo_id.rpartition("/")[2])  # type: ignore
    _files(folder)
    recipe = recipe_in(folder)
    names = told_names(recipe, folder, None if is_folder else model)

    def planned(names: Mapping[str, str]) -> PublishPlan:
        return _plan(folder, repo_id, recipe, names, private, license, results, overwrite, staging, api)

    if push_experts and names:
        refuse_changed(names)
        repos = repos_of(names, repo_id)
        return replace(planned(repos), pushes=repos, _pushed=planned)
    return planned(names)


def _plan(
    folder: Path,
    repo_id: str,
    recipe: Recipe,
    names: Mapping[str, str],
    private: bool,
    license: str | None,
    results: Any,
    overwrite: bool,
    staging: Any,
    api: HfApi,
) -> PublishPlan:
    """`plan` of a folder, with ``names``: what others are told of each folder of the recipe."""
    public, files = told(recipe, names), _files(folder)
    refuse_unnamed([name for name in public.unpinned if name not in names.values()])
    place = Path(tempfile.mkdtemp(dir=staging.name))
    shown = without_paths(folder, files, public, names, place)
    allowed = allowed_to(
        public,
        repo_id,
        private,
        license,
        with_bases=not _refers_to_base(folder),
        known={name: folder_info(path, name) for path, name in names.items()},
        config=read_json(shown / "config.json", str(folder)) if (shown / "config.json").exists() else {},
        overwrite=overwrite,
        api=api,
    )
    facts = read_facts(shown, repo_id, allowed.experts, allowed.license, results)
    facts = replace(facts, results=told_plain(facts.results, names))
    written = _remote_card(repo_id, api) if allowed.exists else ""
    if not written and (folder / README).exists():
        written = read_text(folder / README)
    card = render_card(facts, written)
    experts = tuple(allowed.experts)
    return PublishPlan(
        repo_id,
        shown,
        _sizes(shown),
        allowed.exists,
        allowed.private,
        allowed.license,
        experts,
        card,
        facts,
        {},
        staging,
    )


def publish(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    results: Any = None,
    push_experts: bool = False,
    overwrite: bool = False,
    confirm: Callable[[PublishPlan], bool] | None = None,
    api: HfApi | None = None,
) -> PublishResult | None:
    """Publish a fused model with its recipe and card. Can be run again after an interruption.

    Args:
        model: see `plan`, as for the other arguments.
        repo_id: ``owner/name``; created if missing.
        private: visibility of a new repo; a repo that exists keeps its own.
        license: the model's licence; default is computed from the experts'.
        results: what was measured; default is ``results.json`` in the folder.
        push_experts: see `plan`.
        overwrite: see `plan`.
        confirm: asked with the plan before anything is sent; default sends without asking.
        api: the Hub's client.

    Returns:
        Where it lies now; None if ``confirm`` said no.

    Raises:
        FusionError: see `plan`, and if the Hub refuses.
    """
    api = hub_api(api)
    planned = plan(
        model,
        repo_id,
        private=private,
        license=license,
        results=results,
        push_experts=push_experts,
        overwrite=overwrite,
        api=api,
    )
    if confirm is not None and not confirm(planned):
        return None
    return push(planned, api)


def check_publish(
    recipe: Recipe,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    push_experts: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> None:
    """Refuse, before a model is made, what would keep it from being published; only metadata are read.

    Args:
        recipe: what the model will be made of; commits need not be named yet.
        repo_id: ``owner/name``, to be created if missing.
        private: visibility of a new repo.
        license: the model's licence; default is computed from the experts'.
        push_experts: see `plan`.
        overwrite: see `plan`.
        api: the Hub's client.

    Raises:
        FusionError: see `plan`; and if there is no token, or it may not write there.
    """
    api = hub_api(api)
    check_id(repo_id)
    check_write(repo_id, api)
    parts = [str(ref) for name in recipe.models for ref in ModelRef.parse_pair(name) if ref]
    known = {part: folder_info(part) for part in parts if Path(part).expanduser().is_dir()}
    if push_experts:
        repos_of({str(Path(part).expanduser().resolve()): "" for part in known}, repo_id)
    # whether a family refers to its base is seen when it is made
    row = MERGE_METHODS.get(recipe.method)
    with_bases = row is not None and row.merges == "models"
    allowed_to(
        recipe,
        repo_id,
        private,
        license,
        with_bases=with_bases,
        known=known,
        config={},
        overwrite=overwrite,
        api=api,
    )


def push(planned: PublishPlan, api: HfApi | None = None) -> PublishResult:
    """Carry out a plan."""
    from huggingface_hub import CommitOperationAdd

    api = hub_api(api)
    if planned.pushes and planned._pushed is not None:
        planned = planned._pushed(push_folders(planned.pushes, planned.private, api))
    repo_id = planned.repo_id
    with explained(repo_id):
        url = api.create_repo(repo_id, private=planned.private, exist_ok=True)
        info = api.model_info(repo_id)
        card = _remote_card(repo_id, api)
        sha = _commit_with(planned, [pinned_revision(card), info.sha], api)
        head = str(info.sha)
        if sha is None:
            with phase(f"Pushing {planned.megabytes:,.0f} MB to {repo_id}"):
                sha = head = _push_files(planned, head, first=not card, api=api)
            card = _remote_card(repo_id, api)
        wanted = render_card(replace(planned.facts, revision=sha), card or planned.card)
        if wanted != card:
            operation = CommitOperationAdd(README, wanted.encode())
            api.create_commit(repo_id, [operation], commit_message="Pin the card to the weights", parent_commit=head)
    return PublishResult(repo_id, sha, str(url), planned.private)


def _files(folder: Path) -> dict[str, int]:
    """What of a folder is published: everything but the card, hidden files, and what a Trainer left for itself.

    Raises:
        FusionError: it holds no model, or a file of it leads out of the folder.
    """
    check_snapshot(folder, str(folder))
    stem = "adapter_model" if (folder / ADAPTER_CONFIG).exists() else "model"
    if stem == "model" and not (folder / "config.json").exists():
        raise FusionError(f"{folder} holds no model.", hint=f"hf-fusion fuse RECIPE --output {folder}")
    files = _sizes(folder)
    for name in files:
        own_file(folder / name, folder)  # links in sub-folders, which no loader reads but others would be given
    if not weight_files(files, stem, "safetensors"):
        raise FusionError(f"{folder} has no {stem}.safetensors.", hint=f"hf-fusion fuse RECIPE --output {folder}")
    return files


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a folder that are published, and their bytes."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(_is_left(part) for part in path.relative_to(folder).parts)
    }
    files.pop(README, None)
    return files


def _is_left(part: str) -> bool:
    """Whether a file or folder is hidden, or of a training: its state, pickled arguments with paths of this machine."""
    return part.startswith((".", "__pycache__", "checkpoint-")) or any(fnmatch(part, left) for left in _LEFT)


def _refers_to_base(folder: Path) -> bool:
    """Whether the base's weights stay in its own repo."""
    if (folder / ADAPTER_CONFIG).exists():
        return True
    return bool(read_json(folder / "config.json", str(folder)).get("base_by_reference"))


def _remote_card(repo_id: str, api: HfApi) -> str:
    """The README on the Hub now, empty where there is none."""
    sha = api.model_info(repo_id).sha
    if not api.file_exists(repo_id, README, revision=sha):
        return ""
    return download_file(api, repo_id, README, sha).read_text(encoding="utf-8")


def _commit_with(planned: PublishPlan, candidates: list[str | None], api: HfApi) -> str | None:
    """The first of some commits that holds exactly this model, if one does."""
    from huggingface_hub.errors import RevisionNotFoundError

    for sha in dict.fromkeys(candidates):
        if sha is None:
            continue
        try:
            found_commit(planned.repo_id, sha, api.model_info(planned.repo_id, revision=sha).sha)
            if not list(_differences(planned, sha, api)):
                return sha
        except RevisionNotFoundError:  # a card that somebody edited
            continue
    return None


def _differences(planned: PublishPlan, sha: str, api: HfApi) -> Iterator[str]:
    """Paths in which a commit differs from the plan; files that neither we nor a loader would touch do not count."""
    from huggingface_hub.hf_api import RepoFile

    tree = {entry.path: entry for entry in api.list_repo_tree(planned.repo_id, recursive=True, revision=sha)}
    remote = {path: entry for path, entry in tree.items() if isinstance(entry, RepoFile)}
    yield from (path for path in remote if path not in planned.files and _is_stale(path))
    for path, size in planned.files.items():
        entry = remote.get(path)
        if entry is None or entry.size != size or not same_file(planned.folder / path, entry):
            yield path


def _is_stale(path: str) -> bool:
    """Whether a loader might take this file for part of the model."""
    top, _, below = path.partition("/")
    return top in STALE if below else any(fnmatch(path, pattern) for pattern in STALE)


def _push_files(planned: PublishPlan, parent: str, first: bool, api: HfApi) -> str:
    """One commit with all files, and a card if there was none; gives back its sha.

    A card that is there already stays as it is: it pins and describes the weights before these.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = [
        path
        for path in api.list_repo_files(planned.repo_id, revision=parent)
        if path not in planned.files and _is_stale(path)
    ]
    operations: list[Any] = [CommitOperationAdd(path, planned.folder / path) for path in planned.files]
    operations += [CommitOperationDelete(path) for path in stale]
    if first:
        operations.append(CommitOperationAdd(README, planned.card.encode()))
    return api.create_commit(
        planned.repo_id, operations, commit_message="Publish a fused model", parent_commit=parent
    ).oid
