"""From a fused model to a repo on the Hub: plan, look, push.

A push is at most two commits, each atomic: first everything (on a new repo with a card), then the card that pins the
first one's sha, since no commit can name its own. Whatever interrupts it, the repo holds a whole model or none, and
the same call again does only what is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.experts import ExpertInfo
from hf_fusion.folders import STALE
from hf_fusion.fusion import save_fused
from hf_fusion.hub.adapters import CONFIG as ADAPTER_CONFIG
from hf_fusion.hub.adapters import read_json
from hf_fusion.hub.card import README, CardFacts, pinned_revision, read_facts, render_card
from hf_fusion.hub.discover import read_info
from hf_fusion.hub.files import explained, hub_api, in_parallel, parts_of, resolve, same_file, weight_files
from hf_fusion.hub.licenses import combine
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel


_LOGIN = "hf auth login with a token that may write there"


@dataclass(frozen=True)
class PublishPlan:
    """What a push would do; nothing has been sent yet.

    Attributes:
        repo_id: where to.
        folder: what is pushed.
        files: path → bytes, without the card.
        exists: whether the repo is already there.
        private: its visibility (a repo that exists keeps its own).
        license: licence id of the model.
        experts: what the Hub says about the experts.
        card: the README as it will be, but for the commit it pins.
        facts: what the card is rendered from.
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
    _staging: Any = field(default=None, repr=False, compare=False)  # holds the temporary folder of a model in memory

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
            "experts": [info.pinned for info in self.experts],
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
    api: HfApi | None = None,
) -> PublishPlan:
    """Find out what publishing would do, and whether it may be done.

    Args:
        model: a folder written by `save_fused`, or a model as `fuse` returned it.
        repo_id: ``owner/name``.
        private: visibility of a new repo.
        license: the model's licence; default is computed from the experts'.
        results: what was measured (`Results` or its dict); default is ``results.json`` in the folder.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: for experts without a pinned commit or that the Hub does not have, licences that cannot be
            combined, weights of private or gated experts on their way to a public repo, or an incomplete folder.
    """
    api = hub_api(api)
    _check_id(repo_id)
    staging = None
    if isinstance(model, (str, Path)):
        folder = Path(model)
    else:
        staging = tempfile.TemporaryDirectory(prefix="hf-fusion-")
        folder = save_fused(model, Path(staging.name) / repo_id.rpartition("/")[2])
    files = _files(folder)
    recipe = Recipe.load(folder)
    _refuse_unnamed(recipe.unpinned)
    allowed = _allowed(recipe, repo_id, private, license, with_bases=not _refers_to_base(folder), api=api)
    experts, exists, private, license = allowed.experts, allowed.exists, allowed.private, allowed.license
    facts = read_facts(folder, repo_id, experts, license, results)
    written = _remote_card(repo_id, api) if exists else ""
    if not written and (folder / README).exists():
        written = (folder / README).read_text(encoding="utf-8")
    card = render_card(facts, written)
    return PublishPlan(repo_id, folder, files, exists, private, license, tuple(experts), card, facts, staging)


def publish(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    results: Any = None,
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
        confirm: asked with the plan before anything is sent; default sends without asking.
        api: the Hub's client.

    Returns:
        Where it lies now; None if ``confirm`` said no.

    Raises:
        FusionError: see `plan`, and if the Hub refuses.
    """
    api = hub_api(api)
    planned = plan(model, repo_id, private=private, license=license, results=results, api=api)
    if confirm is not None and not confirm(planned):
        return None
    return push(planned, api)


def check_publish(
    recipe: Recipe,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    api: HfApi | None = None,
) -> None:
    """Refuse, before a model is made, what would keep it from being published; only metadata are read.

    Args:
        recipe: what the model will be made of; commits need not be named yet.
        repo_id: ``owner/name``, to be created if missing.
        private: visibility of a new repo.
        license: the model's licence; default is computed from the experts'.
        api: the Hub's client.

    Raises:
        FusionError: see `plan`; and if there is no token, or it may not write there.
    """
    api = hub_api(api)
    _check_id(repo_id)
    names = [expert.model for expert in recipe.experts] + ([recipe.base] if recipe.base else [])
    _refuse_unnamed(
        [name for name in names if any(part and Path(part).expanduser().is_dir() for part in parts_of(name))]
    )
    _check_write(repo_id, api)
    # whether a family refers to its base is seen when it is made
    row = MERGE_METHODS.get(recipe.method)
    _allowed(recipe, repo_id, private, license, with_bases=row is not None and row.merges == "models", api=api)


def push(planned: PublishPlan, api: HfApi | None = None) -> PublishResult:
    """Carry out a plan."""
    from huggingface_hub import CommitOperationAdd

    api = hub_api(api)
    repo_id = planned.repo_id
    with explained(repo_id):
        url = api.create_repo(repo_id, private=planned.private, exist_ok=True)
        info = api.model_info(repo_id)
        card = _remote_card(repo_id, api)
        sha = _commit_with(planned, [pinned_revision(card), info.sha], api)
        head = str(info.sha)
        if sha is None:
            sha = head = _push_files(planned, head, first=not card, api=api)
            card = _remote_card(repo_id, api)
        wanted = render_card(replace(planned.facts, revision=sha), card or planned.card)
        if wanted != card:
            operation = CommitOperationAdd(README, wanted.encode())
            api.create_commit(repo_id, [operation], commit_message="Pin the card to the weights", parent_commit=head)
    return PublishResult(repo_id, sha, str(url), planned.private)


def _files(folder: Path) -> dict[str, int]:
    """What of a folder is published: everything but the card and hidden files."""
    stem = "adapter_model" if (folder / ADAPTER_CONFIG).exists() else "model"
    if stem == "model" and not (folder / "config.json").exists():
        raise FusionError(f"{folder} holds no model.", hint=f"hf-fusion fuse RECIPE --output {folder}")
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    }
    files.pop(README, None)
    if not weight_files(files, stem, "safetensors"):
        raise FusionError(f"{folder} has no {stem}.safetensors.", hint=f"hf-fusion fuse RECIPE --output {folder}")
    return files


def _refers_to_base(folder: Path) -> bool:
    """Whether the base's weights stay in its own repo."""
    if (folder / ADAPTER_CONFIG).exists():
        return True
    return bool(read_json(folder / "config.json", str(folder)).get("base_by_reference"))


def _check_id(repo_id: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise FusionError(f"{repo_id!r} is not a repo id.", hint="write owner/name")
    with explained(repo_id):
        validate_repo_id(repo_id)


def _check_write(repo_id: str, api: HfApi) -> None:
    """Refuse a repo that the token may not write to, or create.

    Raises:
        FusionError: saying who asked.
    """
    if api.token is False:
        raise FusionError(f"{repo_id} needs a token.", hint=_LOGIN)
    with explained(repo_id):
        user = api.whoami()
        if api.repo_exists(repo_id):
            api.auth_check(repo_id, write=True)
            return
    # of "fineGrained" tokens the push tells what they may
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise FusionError(f"{repo_id} cannot be created: the token of {user['name']} only reads.", hint=_LOGIN)
    writes = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    if repo_id.partition("/")[0].lower() not in map(str.lower, writes):
        raise FusionError(
            f"{repo_id} cannot be created by {user['name']}.", hint=f"write {user['name']}/NAME, or {_LOGIN}"
        )


@dataclass(frozen=True)
class _Allowed:
    """What the Hub says about a model that may be published."""

    experts: list[ExpertInfo]
    exists: bool
    private: bool
    license: str


def _allowed(
    recipe: Recipe, repo_id: str, private: bool, license: str | None, *, with_bases: bool, api: HfApi
) -> _Allowed:
    """Whether a model may be published: its weights may be shown there, and there is a licence for it.

    Args:
        recipe: what it is made of.
        repo_id: where to.
        private: visibility of a new repo.
        license: the model's, or None.
        with_bases: whether it holds its bases' weights; a base by reference stays behind its own gate.
        api: the Hub's client.
    """
    experts, bases = _find_experts(recipe, api)
    with explained(repo_id):
        exists = api.repo_exists(repo_id)
        private = bool(api.model_info(repo_id).private) if exists else private
    held = [*experts, *bases] if with_bases else experts
    closed = [info.id for info in held if info.private or info.gated]
    if closed and not private:
        raise FusionError(
            f"{repo_id} is public, but it would hold the weights of private or gated experts: {', '.join(closed)}.",
            hint="publish it to a private repo",
        )
    license = license or combine({info.id: info.license for info in (*experts, *bases)})
    return _Allowed(experts, exists, private, license)


def _refuse_unnamed(names: list[str]) -> None:
    """Refuse models that others could not find."""
    if names:
        raise FusionError(
            f"No commit on the Hub is named for: {', '.join(names)}.",
            hint="push each expert, then fuse from owner/name@sha",
        )


def _find_experts(recipe: Recipe, api: HfApi) -> tuple[list[ExpertInfo], list[ExpertInfo]]:
    """The experts of a recipe and the bases whose weights travel with them, as the Hub knows them."""
    named = [parts_of(expert.model) for expert in recipe.experts]
    experts = _find([name for _, name in named], api)
    bases = {base for base in (recipe.base, *(base for base, _ in named)) if base}
    for info, (base, _) in zip(experts, named, strict=True):
        if info.is_adapter and info.base_model and not (base or recipe.base):
            bases.add(f"{info.base_model}@{info.base_revision}" if info.base_revision else info.base_model)
    return experts, _find(sorted(bases), api)


def _find(names: list[str], api: HfApi) -> list[ExpertInfo]:
    """`ExpertInfo` of each, or one error that lists all that cannot be found."""

    def read(name: str) -> ExpertInfo | FusionError:
        try:
            return read_info(resolve(name, api))
        except FusionError as error:
            return error

    found = in_parallel(read, names)
    if errors := [error for error in found if isinstance(error, FusionError)]:
        raise FusionError(" ".join(error.message for error in errors), hint=errors[0].hint)
    return [info for info in found if isinstance(info, ExpertInfo)]


def _remote_card(repo_id: str, api: HfApi) -> str:
    """The README on the Hub now, empty where there is none."""
    sha = api.model_info(repo_id).sha
    if not api.file_exists(repo_id, README, revision=sha):
        return ""
    return Path(api.hf_hub_download(repo_id, README, revision=sha)).read_text(encoding="utf-8")


def _commit_with(planned: PublishPlan, candidates: list[str | None], api: HfApi) -> str | None:
    """The first of some commits that holds exactly this model, if one does."""
    from huggingface_hub.errors import RevisionNotFoundError

    for sha in dict.fromkeys(candidates):
        if sha is None:
            continue
        try:
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
    return "/" not in path and any(fnmatch(path, pattern) for pattern in STALE)


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
