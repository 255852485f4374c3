"""Publishing a fused model on the Hub: plan, confirm, push; and the checks to run before a model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.hub.client import hub_api
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.publishing.checks import check_publishable, check_repo_id, check_write_access
from hf_fusion.publishing.local_experts import folder_info, target_repos
from hf_fusion.publishing.plan import PublishPlan, plan
from hf_fusion.publishing.push import PublishResult, push
from hf_fusion.recipe import Recipe
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.evaluation.results import Results


def publish(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    results: Results | Mapping[str, Any] | None = None,
    push_experts: bool = False,
    overwrite: bool = False,
    confirm: Callable[[PublishPlan], bool] | None = None,
    api: HfApi | None = None,
) -> PublishResult | None:
    """Publish a fused model with its recipe and card. After an interruption, repeat the call.

    Args:
        model: a folder written by `save_fused`, or a model returned by `fuse`.
        repo_id: ``owner/name``; created if missing.
        private: whether a new repo is private; an existing repo keeps its visibility.
        license: licence id of the model; default: derived from those of the experts.
        results: `Results`, or its dict; default: ``results.json`` in the folder.
        push_experts: see `plan`.
        overwrite: see `plan`.
        confirm: called with the plan before anything is uploaded; False cancels the push. Default: no confirmation.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Returns:
        The repo and the commit to load; None if ``confirm`` returned False.

    Raises:
        FusionError: see `plan`, or the Hub refuses a request.
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
    """Check before a fusion whether its result can be published; reads metadata only.

    Args:
        recipe: experts and method; references need no commit yet.
        repo_id: ``owner/name``, to be created if missing.
        private: whether a new repo is private.
        license: licence id of the model; default: derived from those of the experts.
        push_experts: see `plan`.
        overwrite: see `plan`.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: see `plan`; or the token is missing or cannot write to the repo.
    """
    api = hub_api(api)
    check_repo_id(repo_id)
    check_write_access(repo_id, api)
    names = [str(ref) for text in recipe.models for ref in ModelRef.parse_pair(text) if ref]
    known = {name: folder_info(name) for name in names if Path(name).expanduser().is_dir()}
    if push_experts:
        target_repos({str(Path(name).expanduser().resolve()): "" for name in known}, repo_id)
    # whether a family's model refers to its base is known only after the fusion
    row = MERGE_METHODS.get(recipe.method)
    with_bases = row is not None and row.merges == "models"
    check_publishable(
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
