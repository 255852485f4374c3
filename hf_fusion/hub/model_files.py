"""The files of one model, in a repo at a commit or in a folder; small files are read on first use."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, one_line
from hf_fusion.hub.client import explain_hub_errors, hub_api, silent_bar
from hf_fusion.hub.commits import download_file
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.manifests import read_content
from hf_fusion.hub.readme import filter_metadata, read_metadata
from hf_fusion.hub.remote_files import Header, card_of, read_header, read_json_file, read_range
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.json_files import parse_object, read_json
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)


@dataclass
class Source:
    """One model's files: a repo at a commit, or a folder.

    Attributes:
        name: repo id, or the folder's name.
        sizes: bytes of each file; 0 where the Hub listed the file without its size.
        api: the Hub's client, for a repo.
        folder: contains the files; for a repo None until they are downloaded.
        revision: commit sha of a repo, None for a folder.
        pinned: whether the caller named that sha; folders count as pinned.
        card: metadata of the README.
        info: the Hub's information about a repo; None for a folder.
    """

    name: str
    sizes: dict[str, int]
    api: HfApi | None
    folder: Path | None = None
    revision: str | None = None
    pinned: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    info: ModelInfo | None = None
    _json: dict[str, dict[str, Any]] = field(default_factory=dict)
    _headers: dict[str, Header] = field(default_factory=dict)

    @property
    def ref(self) -> ModelRef:
        """A reproducible reference: the repo at its commit, or the folder's absolute path."""
        if self.is_local and self.folder is not None:
            return ModelRef(str(self.folder.resolve()))
        return ModelRef(self.name, self.revision)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return self.revision is None

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter rather than a full model."""
        return ADAPTER_CONFIG in self.sizes

    @property
    def adapter(self) -> dict[str, Any]:
        """Content of ``adapter_config.json``, empty for a full model."""
        return self.json(ADAPTER_CONFIG)

    @property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``; empty if it does not exist."""
        return self.json("config.json")

    def json(self, file: str) -> dict[str, Any]:
        """Content of a JSON file, cached; empty if it does not exist."""
        if file not in self._json:
            self._json[file] = self._read_json(file) if file in self.sizes else {}
        return self._json[file]

    def read(self, file: str) -> Any:
        """Content of a JSON file of any type; downloaded if necessary."""
        if self.folder is not None and own_file(self.folder / file, self.folder):
            return read_content(self.folder / file, self.name)
        with explain_hub_errors(self.name):
            path = download_file(hub_api(self.api), self.name, file, self.revision, tqdm_class=silent_bar())
        return read_content(path, self.name)

    def _read_json(self, file: str) -> dict[str, Any]:
        if self.folder is not None:
            return read_json(self.folder / file, self.name)
        assert self.revision is not None
        with explain_hub_errors(self.name):
            content = read_json_file(hub_api(self.api), self.name, file, self.revision)
        return parse_object(content, file, self.name)

    def header(self, file: str) -> Header:
        """The header of one of a repo's safetensors files, cached."""
        if file not in self._headers:
            with explain_hub_errors(self.name):
                self._headers[file] = read_header(hub_api(self.api), self.name, file, self.revision)
        return self._headers[file]

    def size(self, file: str) -> int:
        """Bytes of one of a repo's files; requested if the Hub listed it without its size."""
        if self.sizes[file]:
            return self.sizes[file]
        if file.endswith(".safetensors"):
            return self.header(file).size
        with explain_hub_errors(self.name):
            return read_range(hub_api(self.api), self.name, file, self.revision, 0, 1).size


def source_of(info: ModelInfo, api: HfApi, *, pinned: bool = False) -> Source:
    """The files of a repo, from the Hub's information about it.

    Args:
        info: with its sha and siblings.
        api: the client that returned it.
        pinned: whether the caller named that sha.
    """
    return Source(
        name=info.id,
        sizes={file.rfilename: file.size or 0 for file in info.siblings or [] if _is_inside(file.rfilename)},
        api=api,
        revision=info.sha,
        pinned=pinned,
        card=card_of(info),
        info=info,
    )


def folder_source(folder: Path, api: HfApi | None = None) -> Source:
    """The files of a folder, which is checked as a whole for links out of it.

    Args:
        folder: of a model or an adapter.
        api: the Hub's client, for its base.

    Raises:
        FusionError: a file of the folder leads out of it (`check_snapshot`).
    """
    check_snapshot(folder, folder.resolve().name)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    card = _local_card(folder) if "README.md" in sizes else {}
    return Source(folder.resolve().name, sizes, api, folder=folder, pinned=True, card=card)


def _is_inside(path: str) -> bool:
    """Whether a file's path stays within its repo, on any operating system; the server is not trusted."""
    return not path.startswith(("/", "~")) and not {"..", ""} & set(path.split("/")) and not set("\\:\0") & set(path)


def _local_card(folder: Path) -> dict[str, Any]:
    """Metadata of a folder's README; empty if it cannot be parsed, as on the Hub."""
    try:
        return filter_metadata(read_metadata(read_text(folder / "README.md")))
    except (FusionError, ValueError) as error:  # an invalid card must not prevent loading
        logger.warning("the metadata of %s/README.md cannot be read: %s", folder, one_line(error))
        return {}
