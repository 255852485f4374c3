"""Checks before a push: the target repo, write access, the experts' visibility and the licence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.hub.client import explain_hub_errors, in_parallel
from hf_fusion.hub.discover import read_info
from hf_fusion.hub.licenses import combine
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.recipe import RECIPE_FILE, Recipe
from hf_fusion.types import ExpertInfo, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".msgpack")
_LOGIN = "hf auth login with a token that may write there"


def check_repo_id(repo_id: str) -> None:
    """Raises FusionError unless the id has the form ``owner/name``."""
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise FusionError(f"{repo_id!r} is not a repo id", hint="write owner/name")
    with explain_hub_errors(repo_id):
        validate_repo_id(repo_id)


def check_write_access(repo_id: str, api: HfApi) -> None:
    """Check that the token can write to a repo, or create it.

    Raises:
        FusionError: it cannot; the message names the token's user.
    """
    if api.token is False:
        raise FusionError(f"publishing to {repo_id} needs a token", hint=_LOGIN)
    with explain_hub_errors(repo_id):
        user = api.whoami()
        if api.repo_exists(repo_id):
            api.auth_check(repo_id, write=True)
            return
    # what a "fineGrained" token may write is only known at the push
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise FusionError(f"{repo_id} cannot be created: the token of {user['name']} is read-only", hint=_LOGIN)
    writes = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    if repo_id.partition("/")[0].lower() not in map(str.lower, writes):
        raise FusionError(
            f"{repo_id} cannot be created by {user['name']}", hint=f"write {user['name']}/NAME, or {_LOGIN}"
        )


@dataclass(frozen=True)
class Publishable:
    """A target that passed the checks: metadata of the experts, state and visibility of the repo, licence id."""

    experts: list[ExpertInfo]
    exists: bool
    private: bool
    license: str


def check_publishable(
    recipe: Recipe,
    repo_id: str,
    private: bool,
    license: str | None,
    *,
    with_bases: bool,
    known: Mapping[str, ExpertInfo],
    config: Mapping[str, Any],
    overwrite: bool,
    api: HfApi,
) -> Publishable:
    """Check that a model can be published: no private weights become public, and its licence is known.

    Args:
        recipe: experts, base and method of the model.
        repo_id: ``owner/name`` of the target.
        private: visibility of a new repo.
        license: licence id of the model; None to derive it from those of experts and bases.
        with_bases: whether the model contains its bases' weights. A base by reference keeps its own access rules.
        known: metadata of models that are local folders, by their names in the recipe.
        config: ``config.json`` of the model, which records experts that are folders of another machine.
        overwrite: whether to replace another model in the repo.
        api: client of the Hub.

    Raises:
        FusionError: a model is not found, the repo contains another model, weights of private or gated experts would
            become public, or the licences cannot be combined.
    """
    known = {**_stages_as_known(recipe), **known}
    read = [_read_experts(own, known, config if own is recipe else {}, api) for own in recipe.all_stages]
    experts = read[0][0]
    # a stage contains what it was merged from
    used, bases = (
        [info for infos in part for info in infos if info.id not in recipe.stages] for part in zip(*read, strict=True)
    )
    with explain_hub_errors(repo_id):
        exists = api.repo_exists(repo_id)
        private = bool(api.model_info(repo_id).private) if exists else private
        if exists and not overwrite:
            _refuse_other_model(repo_id, recipe, api)
    contained = [*used, *bases] if with_bases else used
    restricted = [info.id for info in contained if info.private or info.gated]
    if restricted and not private:
        raise FusionError(
            f"{repo_id} is public, but would contain the weights of private or gated experts: {', '.join(restricted)}",
            hint="publish it to a private repo",
        )
    license = license or combine({info.id: info.license for info in (*used, *bases)})
    return Publishable(experts, exists, private, license)


def _refuse_other_model(repo_id: str, recipe: Recipe, api: HfApi) -> None:
    """Raises FusionError for a repo with weights that are not an earlier version of this model."""
    files = api.list_repo_files(repo_id)
    if not any(name.endswith(_WEIGHTS) for name in files):
        return
    found = None
    if RECIPE_FILE in files:
        with suppress(FusionError):  # a recipe that cannot be read is not one of ours
            found = Recipe.load(api.hf_hub_download(repo_id, RECIPE_FILE))
    if found is not None and _identity(found) == _identity(recipe):
        return
    reason = (
        "is not a fused model"
        if found is None
        else f"was made by {found.method} from {', '.join(_identity(found)[1:])}"
    )
    raise FusionError(
        f"{repo_id} already contains another model, which {reason}",
        hint="publish under another name, or replace it: --overwrite (overwrite=True in Python)",
    )


def _identity(recipe: Recipe) -> list[str]:
    """What all versions of a model share: the method, then the experts' names without owner and commit."""
    names = (ModelRef.parse_pair(expert.model)[1].id for expert in recipe.experts)
    return [recipe.method, *sorted(Path(name).name for name in names)]


def refuse_unpinned(names: list[str]) -> None:
    """Raises FusionError for models without a commit on the Hub, which no one else could load."""
    if names:
        raise FusionError(
            f"these models are not pinned to a commit on the Hub: {', '.join(names)}",
            hint="push each of them, then fuse from owner/name@sha; local folders can be published as they are",
        )


def _stages_as_known(recipe: Recipe) -> dict[str, ExpertInfo]:
    """The names of a recipe's stages where they are inputs, with metadata that says nothing more."""
    refs = [ref for name in recipe.models for ref in ModelRef.parse_pair(name) if ref and recipe.is_stage(ref)]
    return {str(ref): ExpertInfo(ref.id, ref.revision or "") for ref in refs}


def _read_experts(
    recipe: Recipe, known: Mapping[str, ExpertInfo | None], config: Mapping[str, Any], api: HfApi
) -> tuple[list[ExpertInfo], list[ExpertInfo]]:
    """Metadata of a recipe's experts, and of the bases of its adapters."""
    pairs = [ModelRef.parse_pair(expert.model) for expert in recipe.experts]
    named = [(str(base) if base else "", str(model)) for base, model in pairs]
    rows = config.get("experts") or [{}] * len(named)
    known = {**{name: _info_in_config(name, row) for (_, name), row in zip(named, rows, strict=False)}, **known}
    experts = _read_infos([name for _, name in named], known, api)
    bases = {base for base in (recipe.base, *(base for base, _ in named)) if base}
    for info, (base, _) in zip(experts, named, strict=True):
        if info.is_adapter and info.base_model and not (base or recipe.base):
            bases.add(str(info.base_ref))
    return experts, _read_infos(sorted(bases), known, api)


def _info_in_config(name: str, row: Mapping[str, Any]) -> ExpertInfo | None:
    """Metadata of an expert that is a folder of another machine, from a family's config; None for other experts."""
    ref = ModelRef.parse_repo(name)
    if not ref.is_content or ref.revision is None:
        return None
    return ExpertInfo(
        ref.id, ref.revision, row.get("task"), labels=tuple(row.get("labels") or ()), license=row.get("license")
    )


def _read_infos(names: list[str], known: Mapping[str, ExpertInfo | None], api: HfApi) -> list[ExpertInfo]:
    """Metadata of each model; one error for all that are not found."""

    def read(name: str) -> ExpertInfo | FusionError:
        if info := known.get(name):
            return info
        try:
            return read_info(resolve(name, api))
        except FusionError as error:
            return error

    found = in_parallel(read, names)
    if errors := [error for error in found if isinstance(error, FusionError)]:
        raise FusionError("; ".join(error.message for error in errors), hint=errors[0].hint)
    return [info for info in found if isinstance(info, ExpertInfo)]
