"""Checks that everything a suite names is available: bases, experts and data, on the Hub and on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_fusion.bench.rows import PACKAGES, stored_parts
from hf_fusion.bench.sources import expert_path, is_hub_id
from hf_fusion.bench.suite import Suite
from hf_fusion.errors import FusionError, suggestion
from hf_fusion.hub.client import explain_hub_errors, hub_api, in_parallel
from hf_fusion.hub.commits import check_commit
from hf_fusion.hub.refs_to_files import repo_ref
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Status = Literal["there", "gated", "missing", "unreachable"]
# what the Hub's client raises, by name -> what that means for a suite; anything else is "unreachable"
_STATUS: dict[str, Status] = {
    "GatedRepoError": "gated",
    "RepositoryNotFoundError": "missing",
    "RevisionNotFoundError": "missing",
    "HFValidationError": "missing",
}


@dataclass(frozen=True)
class Checked:
    """One thing that a suite names.

    Attributes:
        what: "base", "expert" or "data".
        source: as the suite names it, see `bench.sources`.
        status: "there"; "gated": it is, but this user may not read it; "missing": no such repo, commit, folder or
            wheel; "unreachable": the Hub did not answer.
        sha: the commit that the source stands for now; empty where there is none.
        pinned: whether the source names that commit.
        reason: why it is not available.
        hint: the next command.
    """

    what: str
    source: str
    status: Status
    sha: str = ""
    pinned: bool = False
    reason: str = ""
    hint: str = ""


def check_suite(suite: Suite, data_dir: str | Path | None = None, api: HfApi | None = None) -> list[Checked]:
    """Looks at every base, expert and data set of a suite, each once; weights and rows on the Hub are not read.

    Args:
        suite: see `load_suite`.
        data_dir: the folder below which ``data:`` sources lie.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.
    """
    named = [("base", suite.base)] if suite.base else []
    named += [("expert", source) for source in suite.experts.values()]
    named += [("data", task.data) for task in suite.tasks.values()]
    one = partial(_checked, suite=suite, data_dir=data_dir, api=hub_api(api))
    there = dict.fromkeys(named)  # in order, each once
    # the experts of a checkpoint lie in one repo, which is asked once
    repos = {key: (key[0], re.sub(r"#\d+", "", key[1])) for key in there if is_hub_id(key[1])}
    first = {repo: key for key, repo in reversed(repos.items())}
    found = dict(zip(first, in_parallel(one, first.values()), strict=True))
    return [replace(found[repos[key]], source=key[1]) if key in repos else one(key) for key in there]


def _checked(key: tuple[str, str], suite: Suite, data_dir: str | Path | None, api: HfApi) -> Checked:
    what, source = key
    try:
        if is_hub_id(source):
            return _on_the_hub(what, source, api)
        _here(what, source, suite, data_dir)
        return Checked(what, source, "there")
    except FusionError as error:
        kind = type(error.__cause__).__name__
        status: Status = _STATUS.get(kind, "unreachable") if is_hub_id(source) else "missing"
        hint = error.hint or ""
        if kind == "RevisionNotFoundError":
            hint = f"take the newest commit: {_newest(what, source, api)}"
        return Checked(what, source, status, reason=error.message, hint=hint)


def _on_the_hub(what: str, source: str, api: HfApi) -> Checked:
    """The commit of an id, and whether the id names a commit; the files must be readable."""
    ref = repo_ref(source)
    repo, revision = ref.repo, ref.revision
    with explain_hub_errors(repo):
        info = _info(what, api)(repo, revision=revision)
        if info.gated:
            api.auth_check(repo, repo_type="dataset" if what == "data" else "model")
    files = {file.rfilename for file in info.siblings or []}
    is_pickled = what != "data" and not any(name.endswith(".safetensors") for name in files)
    is_pickled &= any(name.endswith(".bin") for name in files)
    pickled = (
        ("has only pickle weights", "hf-fusion bench run --allow-pickle, if you trust its author")
        if is_pickled
        else ("", "")
    )
    sha = check_commit(repo, revision, info.sha)
    return Checked(what, source, "there", sha, ref.commit is not None, *pickled)


def _newest(what: str, source: str, api: HfApi) -> str:
    repo = repo_ref(source).repo
    with explain_hub_errors(repo):
        return str(ModelRef(repo, _info(what, api)(repo).sha))


def _info(what: str, api: HfApi) -> Callable[..., Any]:
    return api.dataset_info if what == "data" else api.model_info


def _here(what: str, source: str, suite: Suite, data_dir: str | Path | None) -> None:
    scheme, _, name = source.partition(":")
    package, _, rest = name.partition("/")
    if what != "data":
        expert_path(source, suite.build)
    elif scheme == "data":
        stored_parts(data_dir, name)
    elif package in PACKAGES:
        PACKAGES[package](rest, data_dir)
    else:
        raise FusionError(f"{source} is not a source of rows", hint=suggestion(package, PACKAGES))
