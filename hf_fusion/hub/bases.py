"""The base of an adapter: the one that it records, or another that the caller names instead."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import printable
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.refs_to_files import resolve, resolve_repo
from hf_fusion.types import ModelRef, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


def base_ref(source: Source) -> ModelRef:
    """The reference to record for a resolved base: id and commit, or the folder."""
    return ModelRef(str(source.folder)) if source.is_local else source.ref


def resolve_base(name: ModelRef, adapter: Source, api: HfApi | None = None) -> Source:
    """Resolves the base that an adapter records; for an adapter on the Hub it is a repo, never a local folder.

    Args:
        name: from `recorded_base`.
        adapter: the adapter.
        api: the Hub's client.
    """
    return resolve(name, api) if adapter.is_local else resolve_repo(name, api)


def warn_of_other_bases(adapters: Iterable[tuple[Source, ModelRef]]) -> None:
    """Logs a warning for adapters that are applied to another base than the one that they record.

    Args:
        adapters: each with the base that is used.
    """
    others: dict[tuple[ModelRef, ModelRef], list[str]] = {}
    for adapter, base in adapters:
        recorded, commit = adapter.adapter.get("base_model_name_or_path"), adapter.adapter.get("revision")
        if not isinstance(recorded, str) or not recorded or not base.id:
            continue
        has = ModelRef(recorded, as_commit(commit) if isinstance(commit, str) else None)  # a branch may have moved
        if _is_same(recorded, base.id) and (not has.revision or not base.revision or has.revision == base.revision):
            continue
        others.setdefault((has, base), []).append(adapter.name)
    for (has, used), names in others.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        logger.warning("%s", printable(f"{shown}: the recorded base is {has}, but {used} is used"))


def _is_same(recorded: str, used: str) -> bool:
    if recorded == used:
        return True
    try:
        return Path(recorded).expanduser().resolve() == Path(used).expanduser().resolve() and Path(recorded).exists()
    except (OSError, RuntimeError, ValueError):  # not a valid path on this machine
        return False
