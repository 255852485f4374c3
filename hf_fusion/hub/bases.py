"""What an adapter stands on: the base that it records, or another that the caller names instead."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import printable
from hf_fusion.hub.resolve import resolve, resolve_repo
from hf_fusion.hub.source import Source
from hf_fusion.types import ModelRef, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


def base_ref(source: Source) -> ModelRef:
    """What a resolved base is recorded as: id and commit, or a folder as it was named."""
    return ModelRef(str(source.folder)) if source.is_local else source.ref


def resolve_base(name: ModelRef, adapter: Source, api: HfApi | None = None) -> Source:
    """`resolve` for the base that an adapter records: of an adapter on the Hub a repo, whatever folders there are here.

    Args:
        name: as `recorded_base` gives it.
        adapter: it.
        api: the Hub's client.
    """
    return resolve(name, api) if adapter.is_local else resolve_repo(name, api)


def warn_of_other_bases(adapters: Iterable[tuple[Source, ModelRef]]) -> None:
    """Says once, for all adapters that it is true of, that their base is not the one that they record.

    Args:
        adapters: each with the base that it is put on.
    """
    told: dict[tuple[ModelRef, ModelRef], list[str]] = {}
    for adapter, base in adapters:
        recorded, commit = adapter.adapter.get("base_model_name_or_path"), adapter.adapter.get("revision")
        if not isinstance(recorded, str) or not recorded or not base.id:
            continue
        has = ModelRef(recorded, as_commit(commit) if isinstance(commit, str) else None)  # a branch moves
        if _is_same(recorded, base.id) and (not has.revision or not base.revision or has.revision == base.revision):
            continue
        told.setdefault((has, base), []).append(adapter.name)
    for (has, used), names in told.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        logger.warning("%s", printable(f"{shown}: recorded base {has}, used base {used}"))


def _is_same(recorded: str, used: str) -> bool:
    if recorded == used:
        return True
    try:
        return Path(recorded).expanduser().resolve() == Path(used).expanduser().resolve() and Path(recorded).exists()
    except (OSError, RuntimeError, ValueError):  # no path that this machine could have
        return False
