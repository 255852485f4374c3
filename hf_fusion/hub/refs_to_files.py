"""Resolves references to the files of models: repos at commits, folders, and experts of PHATGOOSE's checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.hub.client import explain_hub_errors, hub_api
from hf_fusion.hub.commits import check_commit
from hf_fusion.hub.download import download
from hf_fusion.hub.model_files import Source, folder_source, source_of
from hf_fusion.hub.phatgoose_release import write_expert
from hf_fusion.hub.remote_files import fetch_model_info
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def resolve(name: ModelRef | str | Path, api: HfApi | None = None) -> Source:
    """Finds the commit and file list of a repo, or the file list of a folder; reads no weights.

    A folder is checked as a whole for links out of it (`check_snapshot`).

    Args:
        name: any reference of `ModelRef` except content hashes; an expert of a checkpoint of PHATGOOSE's authors is
            downloaded.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: it does not exist, or a file of the folder leads out of it.
    """
    if (folder := _folder(str(name))) is not None:
        return folder_source(folder, api)
    ref = ModelRef.parse(str(name))
    return resolve_repo(ref, api) if ref.number is None else _resolve_expert(ref, ref.number, api)


def _resolve_expert(ref: ModelRef, number: int, api: HfApi | None) -> Source:
    """One expert of a checkpoint of PHATGOOSE's authors, with the repo's commit and local files."""
    source = resolve_repo(ModelRef(ref.repo, ref.revision), api)
    files = [file for file in source.sizes if file.endswith(".pt")]
    if len(files) != 1:
        what = f"{source.name} has {len(files)} checkpoints (*.pt) instead of one"
        raise FusionError(what, hint=f"omit #{number}, if the repo is an adapter")
    download([(source, files)], api)
    assert source.folder is not None and source.info is not None
    folder = write_expert(source, source.folder / files[0], number)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    info = copy.copy(source.info)
    info.id = numbered = f"{source.name}#{number}"
    return replace(source, name=numbered, sizes=sizes, folder=folder, info=info)


def _folder(name: str) -> Path | None:
    """The folder of that name, or None.

    Raises:
        FusionError: the name is not a valid path.
    """
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise FusionError(f"{shown(name)} is not a model ({one_line(error)})", hint="check the name") from None


def repo_ref(name: ModelRef | str) -> ModelRef:
    """A reference to a repo on the Hub, even if there is a folder of that name.

    Raises:
        FusionError: it is not a valid reference to a repo.
    """
    ref = name if isinstance(name, ModelRef) else ModelRef.parse_repo(name)
    if ref.is_content and ref.revision:
        raise FusionError(
            f"{ref.id} was a local folder on the machine that fused the model (content {ref.revision[:19]}…)",
            hint="write the path of your copy of the folder into the recipe",
        )
    if not ref.is_repo:
        raise FusionError(
            f"{str(name)!r} is neither a folder nor a repo id",
            hint="write owner/name, owner/name@revision or a folder",
        )
    return ref


def resolve_repo(name: ModelRef | str, api: HfApi | None = None) -> Source:
    """`resolve` for ``owner/name[@revision]`` on the Hub, even if there is a folder of that name."""
    ref = repo_ref(name)
    api = hub_api(api)
    with explain_hub_errors(ref.id, api):
        info = fetch_model_info(ref.id, ref.revision, api)
    check_commit(ref.id, ref.revision, info.sha)
    return source_of(info, api, pinned=ref.commit is not None)


def recorded_base(source: Source) -> ModelRef:
    """The base that an adapter records, with its revision; may be a folder if the adapter is local.

    Raises:
        FusionError: it records no base, or a path that does not exist here.
    """
    base, revision = source.adapter.get("base_model_name_or_path"), source.adapter.get("revision")
    if source.is_local and isinstance(base, str) and base and _folder(base):
        return ModelRef(base)
    if isinstance(base, str) and not base.startswith("."):
        ref = ModelRef(base).with_revision(revision)
        if ref.is_repo and ref.number is None:
            return ref
    what = f"records the base {shown(base)}, which is neither a repo nor a folder here" if base else "records no base"
    raise FusionError(f"adapter {source.name} {what}", hint="name the base: --base owner/name (base=… in Python)")
