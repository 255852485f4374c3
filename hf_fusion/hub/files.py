"""Where an expert's files lie, which are needed, and how they get here: parallel, resumable, one bar."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_fusion.errors import FusionError, one_line, printable, shown
from hf_fusion.hub.commits import as_commit, download_file, found_commit
from hf_fusion.hub.linearized import STEM as LINEARIZED
from hf_fusion.hub.lora import CONFIG as ADAPTER_CONFIG
from hf_fusion.hub.lora import read_json
from hf_fusion.hub.manifests import (
    local_files,
    local_named_files,
    module_folders,
    named_files,
    read_content,
    refuse_pickled,
)
from hf_fusion.hub.readme import known_metadata, metadata_of
from hf_fusion.hub.remote import Header, card_of, described, read_header, read_json_file, read_part
from hf_fusion.hub.snapshot import check_snapshot
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.json_files import parse_object
from hf_fusion.io.saving import refusal, unwritable
from hf_fusion.progress import is_reported, phase, track
from hf_fusion.recipe import CONTENT

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NUMBERED = re.compile(r"([\w./-]+)#(\d+)(?:@(.+))?")  # an expert of one of PHATGOOSE's authors' checkpoints
WORKERS = 8  # downloads of weights at a time
READERS = 48  # small requests at a time: they mostly wait

PROCESSOR_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
# Training leftovers that no loader reads.
_SKIPPED = ("trainer_state.json", "optimizer.safetensors", "results.json")


@dataclass
class Source:
    """One model's files: a repo at a commit, or a folder.

    Attributes:
        name: repo id, or the folder's name.
        sizes: bytes of each file; 0 where the Hub listed the file without its size.
        api: the Hub's client, for a repo.
        folder: where the files are; for a repo, once they are downloaded.
        revision: commit sha of a repo, None for a folder.
        pinned: whether the caller named that sha (a folder counts as pinned: it does not move by itself).
        card: metadata of the README.
        info: all that the Hub says about a repo, None for a folder.
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
    def is_local(self) -> bool:
        """Whether it was given as a folder."""
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
        """Content of ``config.json``, empty where there is none."""
        return self.json("config.json")

    def json(self, file: str) -> dict[str, Any]:
        """Content of one small JSON file, fetched once; empty where the file is not there."""
        if file not in self._json:
            self._json[file] = self._read_json(file) if file in self.sizes else {}
        return self._json[file]

    def read(self, file: str) -> Any:
        """Content of one small JSON file, whatever it is; fetched where it is not here."""
        if self.folder is not None and own_file(self.folder / file, self.folder):
            return read_content(self.folder / file, self.name)
        with explained(self.name):
            path = download_file(hub_api(self.api), self.name, file, self.revision, tqdm_class=_silent_bar())
        return read_content(path, self.name)

    def _read_json(self, file: str) -> dict[str, Any]:
        if self.folder is not None:
            return read_json(self.folder / file, self.name)
        assert self.revision is not None
        with explained(self.name):
            content = read_json_file(hub_api(self.api), self.name, file, self.revision)
        return parse_object(content, file, self.name)

    def header(self, file: str) -> Header:
        """The header of one of a repo's safetensors files, fetched once."""
        if file not in self._headers:
            with explained(self.name):
                self._headers[file] = read_header(hub_api(self.api), self.name, file, self.revision)
        return self._headers[file]

    def size(self, file: str) -> int:
        """Bytes of one of a repo's files, asked for where the Hub listed it without its size."""
        if self.sizes[file]:
            return self.sizes[file]
        if file.endswith(".safetensors"):
            return self.header(file).size
        with explained(self.name):
            return read_part(hub_api(self.api), self.name, file, self.revision, 0, 1).size


def hub_api(api: HfApi | None) -> HfApi:
    """The given client, or one for ``HF_ENDPOINT`` with the stored token."""
    from huggingface_hub import HfApi

    return api or HfApi()


def split_revision(name: str) -> tuple[str, str | None]:
    """``owner/name@revision`` → (id, revision or None); a commit in lower case.

    Raises:
        FusionError: where it is neither a repo id nor an existing folder.
    """
    repo, _, revision = name.partition("@")
    if revision.startswith(CONTENT):
        raise FusionError(
            f"{repo} was a folder of the machine that fused it (content {revision[:19]}…).",
            hint="put the path of your copy of it into the recipe",
        )
    if not _REPO_ID.fullmatch(repo) or ".." in repo:
        raise FusionError(
            f"{name!r} is neither a folder nor a repo id.",
            hint="write owner/name, owner/name@revision or a folder",
        )
    return repo, as_commit(revision) or revision or None


def parts_of(name: str) -> tuple[str, str]:
    """(base, adapter) of ``base+adapter``; ("", name) of any other name."""
    base, plus, adapter = name.partition("+")
    return (base, adapter) if plus and not Path(name).expanduser().is_dir() else ("", name)


def parts_of_expert(name: str) -> tuple[str, int] | None:
    """(``owner/name[@revision]``, number) of ``owner/name#number[@revision]``; None of any other name."""
    match = _NUMBERED.fullmatch(name)
    return match and (f"{match[1]}@{match[3]}" if match[3] else match[1], int(match[2]))


def repo_of(name: str) -> tuple[str, str | None]:
    """(id, revision or None) of an id, or of the checkpoint that holds an expert."""
    numbered = parts_of_expert(name)
    return split_revision(numbered[0] if numbered else name)


# what to do about an HTTP status that the client has no exception for
_HINTS = {
    401: "hf auth login, or set HF_TOKEN",
    403: "hf auth login with a token that may write there",
    412: "it was changed meanwhile: run it again",
    507: "free some room on the Hub's disk, and run it again",
}


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repo into a FusionError that names it and the next step."""
    import httpx2
    from huggingface_hub import errors

    # most particular first
    rows: tuple[tuple[type[Exception], str, str | None], ...] = (
        (errors.GatedRepoError, "is gated", "accept its terms on its page, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "was not found", "check the id; a private repo needs `hf auth login`"),
        (errors.RevisionNotFoundError, "has no such revision", "check the part after @"),
        (errors.EntryNotFoundError, "lacks a file", None),
        (errors.LocalTokenNotFoundError, "needs a token", "hf auth login, or set HF_TOKEN"),
        (errors.HFValidationError, "is not a valid repo id", "write owner/name"),
        (errors.OfflineModeIsEnabled, "cannot be read offline", "unset HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, "was refused by the Hub", None),
        (httpx2.TransportError, "cannot be reached", "check the network and HF_ENDPOINT"),
        (OSError, "cannot be read", None),
    )
    kinds = tuple(row[0] for row in rows)
    try:
        yield
    except (RuntimeError, *kinds) as raised:
        error = raised if isinstance(raised, kinds) else raised.__cause__  # of a large file: the client wraps it
        if not isinstance(error, kinds):
            raise
        if refusal(error) is not None:  # a cache, or a temporary file
            raise unwritable(getattr(error, "filename", None) or name, error) from error
        what, hint = next((what, hint) for kind, what, hint in rows if isinstance(error, kind))
        if type(error) is errors.HfHubHTTPError:
            hint = _HINTS.get(error.response.status_code)
        raise FusionError(f"{name} {what} ({first_line(error).rstrip('.')}).", hint=hint) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none; never a URL's query, which may sign it."""
    line = printable((str(error).strip() or type(error).__name__).splitlines()[0], 500)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", line)


def in_parallel(function: Callable[[T], R], items: Iterable[T], workers: int = READERS, name: str = "") -> list[R]:
    """``[function(item) for item in items]`` in threads, for calls that wait for the network; a phase if named."""
    items = list(items)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(function, items)
        return list(track(found, name, len(items)) if name else found)


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
    if folder is None and (parts := parts_of_expert(str(name))):
        return _resolve_expert(*parts, api)
    if folder is not None:
        check_snapshot(folder, folder.resolve().name)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        card = _local_card(folder) if "README.md" in sizes else {}
        return Source(folder.resolve().name, sizes, api, folder=folder, pinned=True, card=card)
    return resolve_repo(str(name), api)


def _resolve_expert(name: str, number: int, api: HfApi | None) -> Source:
    """One expert of a checkpoint of PHATGOOSE's authors: it has the repo's commit, and its files are here."""
    from hf_fusion.hub.phatgoose_release import write_expert

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


def source_of(info: ModelInfo, api: HfApi, *, pinned: bool = False) -> Source:
    """The files of a repo as the Hub's own description names them.

    Args:
        info: with its sha and siblings.
        api: the client that it came from.
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


def _is_inside(path: str) -> bool:
    """Whether a file's path stays within its repo, on any system; a Hub has no other, but a client may be lied to."""
    return not path.startswith(("/", "~")) and not {"..", ""} & set(path.split("/")) and not set("\\:\0") & set(path)


def _local_card(folder: Path) -> dict[str, Any]:
    """Metadata of a folder's README; empty where it cannot be parsed, as on the Hub."""
    try:
        return known_metadata(metadata_of(read_text(folder / "README.md")))
    except (FusionError, ValueError) as error:  # none of it may hide weights that work
        logger.warning("The metadata of %s/README.md cannot be read: %s", folder, one_line(error))
        return {}


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


def weight_files(sizes: Mapping[str, int], stem: str, suffix: str) -> list[str]:
    """The weight files at a repo's root: one ``stem.suffix``, or its index and shards; empty if none."""
    if f"{stem}.{suffix}" in sizes:
        return [f"{stem}.{suffix}"]
    index = f"{stem}.{suffix}.index.json"
    if index not in sizes:
        return []
    shard = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    return [index, *sorted(file for file in sizes if shard.fullmatch(file))]


def safe_files(source: Source) -> list[str]:
    """The safetensors of a model or an adapter: `weight_files` of PEFT's name, else of L-LoRA's."""
    stems = ("adapter_model", LINEARIZED) if source.is_adapter else ("model",)
    return next(filter(None, (weight_files(source.sizes, stem, "safetensors") for stem in stems)), [])


def has_processor(sizes: Mapping[str, int]) -> bool:
    """Whether tokenizer or image processor files are among a repo's files."""
    return any(file in sizes for file in PROCESSOR_FILES + IMAGE_FILES)


def pick_weights(source: Source, *, allow_pickle: bool) -> list[str]:
    """The weight files to read, safetensors first.

    Raises:
        FusionError: if there are none, or only pickles and they were not asked for.
    """
    if safe := safe_files(source):
        return safe
    pickled = weight_files(source.sizes, "adapter_model" if source.is_adapter else "pytorch_model", "bin")
    if not pickled:
        raise FusionError(f"{source.name} has no weights (model.safetensors or adapter_model.safetensors).")
    if not allow_pickle:
        raise FusionError(
            f"{source.name} has only pickle weights ({pickled[0]}).",
            hint="pass allow_pickle=True if you trust its author",
        )
    return pickled


def pick_small(source: Source, *, code: bool) -> list[str]:
    """Configs and processor files, and Python files where the expert's own code was agreed to.

    Those at the root and in the sub-folders that its manifests name, as paths from the root.
    """
    wanted = (".json", ".txt", ".model", ".jinja") + ((".py",) if code else ())
    at_root = [
        file
        for file in source.sizes
        if "/" not in file and file.endswith(wanted) and not file.endswith(".index.json") and file not in _SKIPPED
    ]
    return at_root + [file for file in _named(source, code) if not file.endswith(".safetensors")]


def pick_modules(source: Source) -> list[str]:
    """The weights of sentence-transformers' modules beside the model (``2_Dense/model.safetensors``).

    Raises:
        FusionError: they are only there as a pickle.
    """
    is_here = source.is_local and source.folder is not None
    files = list(local_files(source.folder)) if is_here and source.folder else list(source.sizes)
    refuse_pickled(source.name, files, module_folders(source.name, files, source.read))
    return [file for file in _named(source, code=False) if file.endswith(".safetensors")]


def _named(source: Source, code: bool) -> list[str]:
    if source.is_local and source.folder is not None:
        return local_named_files(source.folder, source.name, code=code)
    return named_files(source.name, source.sizes, source.read, code=code)


def same_file(path: Path, entry: Any) -> bool:
    """Whether a local file is the one a repo holds: by sha256 for large files, by git's hash for others."""
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def download(wanted: Sequence[tuple[Source, list[str]]], api: HfApi | None = None) -> None:
    """Fetch all files of all sources at once and set each ``source.folder``.

    Run again after an interruption, it fetches what is not in the cache in full. A phase over all bytes; where nobody
    is told of phases, a bar on a terminal's stderr.
    """
    jobs = [
        (source, file)
        for source, files in wanted
        for file in files
        if not source.is_local and (source.folder is None or not (source.folder / file).exists())
    ]
    if not jobs:
        return

    from huggingface_hub.utils import tqdm  # silent under HF_HUB_DISABLE_PROGRESS_BARS

    client = hub_api(api)
    total = sum(source.sizes[file] for source, file in jobs)
    quiet = True if is_reported() else None
    with (
        phase("Downloading", total, "B") as told,
        tqdm(total=total, unit="B", unit_scale=True, desc="Downloading experts", disable=quiet) as bar,
    ):

        def more(size: float) -> None:
            bar.update(size)
            told.advance(size)

        def fetch(job: tuple[Source, str]) -> None:
            source, file = job
            with explained(source.name):
                path = download_file(client, source.name, file, source.revision, tqdm_class=_silent_bar(more))
            source.folder = path.parents[file.count("/")]

        in_parallel(fetch, jobs, WORKERS)
        for source in {id(source): source for source, _ in jobs}.values():
            assert source.folder is not None
            check_snapshot(source.folder, source.name)
        more(max(0, total - told.done))  # files that were in the cache


def _silent_bar(more: Callable[[float], None] | None = None) -> type:
    """A tqdm class that draws nothing itself and tells ``more`` of its progress."""
    from tqdm.auto import tqdm

    class Forwarding(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(kwargs.get("initial", 0))  # what an interrupted download had already

        def update(self, n: float | None = 1) -> None:
            if more is not None and n:
                more(n)

    return Forwarding
