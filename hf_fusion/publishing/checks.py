"""Whether a fused model may be published: where to, made of what, under which licence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.hub.client import explained, in_parallel
from hf_fusion.hub.discover import read_info
from hf_fusion.hub.licenses import combine
from hf_fusion.hub.resolve import resolve
from hf_fusion.recipe import RECIPE_FILE, Recipe
from hf_fusion.types import ExpertInfo, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".msgpack")
_LOGIN = "hf auth login with a token that may write there"


def check_id(repo_id: str) -> None:
    """Refuse what is not ``owner/name``."""
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise FusionError(f"{repo_id!r} is not a repo id.", hint="write owner/name")
    with explained(repo_id):
        validate_repo_id(repo_id)


def check_write(repo_id: str, api: HfApi) -> None:
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
class Allowed:
    """What the Hub says about a model that may be published."""

    experts: list[ExpertInfo]
    exists: bool
    private: bool
    license: str


def allowed_to(
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
) -> Allowed:
    """Whether a model may be published: its weights may be shown there, and there is a licence for it.

    Args:
        recipe: what it is made of.
        repo_id: where to.
        private: visibility of a new repo.
        license: the model's, or None.
        with_bases: whether it holds its bases' weights; a base by reference stays behind its own gate.
        known: what is known of models that are folders here, by their names in the recipe.
        config: the model's; it tells of experts that are folders elsewhere.
        overwrite: whether another model in the repo may be replaced.
        api: the Hub's client.
    """
    experts, bases = _find_experts(recipe, known, config, api)
    with explained(repo_id):
        exists = api.repo_exists(repo_id)
        private = bool(api.model_info(repo_id).private) if exists else private
        if exists and not overwrite:
            _refuse_other(repo_id, recipe, api)
    held = [*experts, *bases] if with_bases else experts
    closed = [info.id for info in held if info.private or info.gated]
    if closed and not private:
        raise FusionError(
            f"{repo_id} is public, but it would hold the weights of private or gated experts: {', '.join(closed)}.",
            hint="publish it to a private repo",
        )
    license = license or combine({info.id: info.license for info in (*experts, *bases)})
    return Allowed(experts, exists, private, license)


def _refuse_other(repo_id: str, recipe: Recipe, api: HfApi) -> None:
    """Refuses a repo that holds another model than an earlier version of this one."""
    files = api.list_repo_files(repo_id)
    if not any(name.endswith(_WEIGHTS) for name in files):
        return
    found = None
    if RECIPE_FILE in files:
        with suppress(FusionError):  # broken: it is not ours
            found = Recipe.load(api.hf_hub_download(repo_id, RECIPE_FILE))
    if found is not None and _made_of(found) == _made_of(recipe):
        return
    what = "is not a fused model" if found is None else f"is made by {found.method} of {', '.join(_made_of(found)[1:])}"
    raise FusionError(
        f"{repo_id} holds another model, which {what}.",
        hint="publish under another name, or replace it: --overwrite (overwrite=True in Python)",
    )


def _made_of(recipe: Recipe) -> list[str]:
    """By what a later version of a model is known: method, and names of experts without owner and commit."""
    names = (ModelRef.parse_pair(expert.model)[1].id for expert in recipe.experts)
    return [recipe.method, *sorted(Path(name).name for name in names)]


def refuse_unnamed(names: list[str]) -> None:
    """Refuse models that others could not find."""
    if names:
        raise FusionError(
            f"No commit on the Hub is named for: {', '.join(names)}.",
            hint="push each expert, then fuse from owner/name@sha; folders can be published as they are",
        )


def _find_experts(
    recipe: Recipe, known: Mapping[str, ExpertInfo | None], config: Mapping[str, Any], api: HfApi
) -> tuple[list[ExpertInfo], list[ExpertInfo]]:
    """The experts of a recipe and the bases whose weights travel with them, as the Hub, or their folders, know them."""
    pairs = [ModelRef.parse_pair(expert.model) for expert in recipe.experts]
    named = [(str(base) if base else "", str(model)) for base, model in pairs]
    rows = config.get("experts") or [{}] * len(named)
    known = {**{name: _told_info(name, row) for (_, name), row in zip(named, rows, strict=False)}, **known}
    experts = _find([name for _, name in named], known, api)
    bases = {base for base in (recipe.base, *(base for base, _ in named)) if base}
    for info, (base, _) in zip(experts, named, strict=True):
        if info.is_adapter and info.base_model and not (base or recipe.base):
            bases.add(str(info.base_ref))
    return experts, _find(sorted(bases), known, api)


def _told_info(name: str, row: Mapping[str, Any]) -> ExpertInfo | None:
    """What a family's config tells of an expert that is a folder elsewhere; None of others."""
    ref = ModelRef.parse_repo(name)
    if not ref.is_content or ref.revision is None:
        return None
    return ExpertInfo(
        ref.id, ref.revision, row.get("task"), labels=tuple(row.get("labels") or ()), license=row.get("license")
    )


def _find(names: list[str], known: Mapping[str, ExpertInfo | None], api: HfApi) -> list[ExpertInfo]:
    """`ExpertInfo` of each, or one error that lists all that cannot be found."""

    def read(name: str) -> ExpertInfo | FusionError:
        if info := known.get(name):
            return info
        try:
            return read_info(resolve(name, api))
        except FusionError as error:
            return error

    found = in_parallel(read, names)
    if errors := [error for error in found if isinstance(error, FusionError)]:
        raise FusionError(" ".join(error.message for error in errors), hint=errors[0].hint)
    return [info for info in found if isinstance(info, ExpertInfo)]
