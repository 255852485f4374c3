"""Routers with a base by reference: the repo has experts and gates, and the base is loaded from its own repo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from .configuration_phatgoose import PhatgooseConfig
from .fused_files import ALL_INDEXES, check_base, check_files
from .fused_heads import AUTO_CLASSES
from .fused_loading import weight_files


def load_by_reference(
    name: Any, config: PhatgooseConfig, hub: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments for `from_pretrained` with all weights: those of the base at its pinned revision, and the repo's.

    Raises:
        ValueError: the repo names a local folder as its base, or the base's files lead out of its repo.
    """
    dtype = kwargs.get("dtype") or kwargs.pop("torch_dtype", None) or "auto"
    if dtype == "auto":
        dtype = config.dtype or "auto"
    where: dict[str, Any] = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub}
    check_base(name, config.base["id"])
    refuse_other_commit(config.base["id"], config.base["revision"], where)
    inner = {"config": config.backbone_config(), "dtype": dtype, "use_safetensors": True}
    check_files(config.base["id"], {**where, "revision": config.base["revision"]}, ALL_INDEXES)
    base = AUTO_CLASSES[config.head].from_pretrained(
        config.base["id"],
        revision=config.base["revision"],
        trust_remote_code=False,  # another repo: trust in this one does not extend to it
        # where an adapter beside it is looked for, which is asked of the Hub otherwise
        adapter_kwargs={key: where[key] for key in ("cache_dir", "local_files_only") if key in where},
        **inner,
        **where,
    )
    state = {f"backbone.{key}": tensor for key, tensor in base.state_dict().items()}
    for file in weight_files(name, hub):
        state |= load_file(file)
    drop = (*hub, "config", "dtype", "torch_dtype")
    rest = {key: value for key, value in kwargs.items() if key not in drop}
    return {**rest, "config": config, "state_dict": state, "dtype": dtype}


def refuse_other_commit(name: str, revision: str, where: Any) -> None:
    """Check that a Hub resolves a commit to itself, since a branch can have the name of a commit.

    Args:
        name: id of a repo.
        revision: the requested revision.
        where: arguments of `cached_file`.

    Raises:
        ValueError: the Hub returns another commit.
    """
    found = Path(str(cached_file(name, "config.json", revision=revision, **where))).parent.name
    if re.fullmatch(r"[0-9a-fA-F]{40}", revision) and found != revision.lower():
        raise ValueError(f"the Hub returned commit {found} of {name} for {revision}")


def generation_of(name: Any, hub: dict[str, Any]) -> GenerationConfig | None:
    """The generation config in the repo; None if there is none."""
    try:
        return GenerationConfig.from_pretrained(name, **hub)
    except OSError:
        return None


__all__ = ["generation_of", "load_by_reference"]
