"""From a reference to the files of a model: a repo at its commit, a folder, or an expert of PHATGOOSE's checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.hub.client import explained, hub_api
from hf_fusion.hub.commits import as_commit, found_commit
from hf_fusion.hub.download import download
from hf_fusion.hub.phatgoose_release import write_expert
from hf_fusion.hub.references import _REPO_ID, parts_of_expert, split_revision
from hf_fusion.hub.remote import described
from hf_fusion.hub.source import Source, folder_source, source_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def resolve(name: str | Path, api: HfApi | None = None) -> Source:
    """Find a repo's commit and file list, or a folder's, for which no client is needed; reads no weights.

    A folder is checked as a whole: what it gives to read lies in it.

    Args:
        name: ``owner/name``, ``owner/name@revision`` or a folder; ``owner/name#number`` is an expert of a checkpoint
            of PHATGOOSE's authors, which is downloaded.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: it cannot be found, or a file of the folder leads out of it (`check_snapshot`).
    """
    folder = _folder(name)
    if folder is not None:
        return folder_source(folder, api)
    if parts := parts_of_expert(str(name)):
        return _resolve_expert(*parts, api)
    return resolve_repo(str(name), api)


def _resolve_expert(name: str, number: int, api: HfApi | None) -> Source:
    """One expert of a checkpoint of PHATGOOSE's authors: it has the repo's commit, and its files are here."""
    source = resolve_repo(name, api)
    files = [file for file in source.sizes if file.endswith(".pt")]
    if len(files) != 1:
        what = f"{source.name} has {len(files)} checkpoints (*.pt), one is expected."
        raise FusionError(what, hint=f"without #{number}, if it is an adapter")
    download([(source, files)], api)
    assert source.folder is not None and source.info is not None
    folder = write_expert(source, source.folder / files[0], number)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    info = copy.copy(source.info)
    info.id = numbered = f"{source.name}#{number}"
    return replace(source, name=numbered, sizes=sizes, folder=folder, info=info)


def _folder(name: str | Path) -> Path | None:
    """The folder of that name, if there is one.

    Raises:
        FusionError: there cannot be one: the name is longer than any path, or in the home of nobody.
    """
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise FusionError(f"{shown(str(name))} is no model ({one_line(error)}).", hint="check the name") from None


def resolve_repo(name: str, api: HfApi | None = None) -> Source:
    """`resolve` for ``owner/name[@revision]`` on the Hub, even if there is a folder of that name."""
    repo, revision = split_revision(name)
    api = hub_api(api)
    with explained(repo):
        info = described(repo, revision, api)
    found_commit(repo, revision, info.sha)
    return source_of(info, api, pinned=as_commit(revision) is not None)


def recorded_base(source: Source) -> str:
    """``owner/base[@revision]`` as an adapter records it; a folder only if the adapter itself lies in one.

    Raises:
        FusionError: if it records nothing, or a path on its author's machine.
    """
    base, revision = source.adapter.get("base_model_name_or_path"), source.adapter.get("revision")
    if source.is_local and isinstance(base, str) and base and _folder(base):
        return base
    if not isinstance(base, str) or not _REPO_ID.fullmatch(base) or base.startswith("."):
        raise FusionError(f"Adapter {source.name} records {shown(base)} as its base.", hint="pass base=owner/name")
    return f"{base}@{revision}" if revision else base
