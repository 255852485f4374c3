"""Finds experts on the Hub by tags, author, base model, task, collection or ids."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

from hf_fusion.errors import FusionError, printable
from hf_fusion.hub.client import READERS, explain_hub_errors, hub_api, in_parallel
from hf_fusion.hub.formats import ADAPTER_CONFIG, weight_files
from hf_fusion.hub.gates_file import GATES_FILE
from hf_fusion.hub.model_files import Source, source_of
from hf_fusion.hub.refs_to_files import resolve_repo
from hf_fusion.hub.remote_files import CARD_ERRORS, DESCRIBED
from hf_fusion.hub.selection import safe_files
from hf_fusion.hub.task_heads import architectures, default_task, head_of_adapter, label_names
from hf_fusion.models.fused_html import first_of, lines_of, table_of_rows
from hf_fusion.types import ExpertInfo, ModelRef, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

EXPERT_TAG = "hf-fusion-expert"


@dataclass(frozen=True)
class Experts(Sequence[ExpertInfo]):
    """The result of `discover`, in the Hub's order: a sequence that can be shown as a table."""

    infos: tuple[ExpertInfo, ...] = ()

    @overload
    def __getitem__(self, index: int) -> ExpertInfo: ...
    @overload
    def __getitem__(self, index: slice) -> Experts: ...
    def __getitem__(self, index: int | slice) -> ExpertInfo | Experts:
        return Experts(self.infos[index]) if isinstance(index, slice) else self.infos[index]

    def __len__(self) -> int:
        return len(self.infos)

    def table(self) -> list[dict[str, Any]]:
        """One row per expert."""
        return [info_row(info) for info in self.infos]

    def _repr_html_(self) -> str:
        found = f"{len(self):,} expert{'' if len(self) == 1 else 's'} found"
        return table_of_rows(first_of([html_row(info) for info in self.infos], "experts"), found)


def info_row(info: ExpertInfo) -> dict[str, Any]:
    """An expert as a table row of printable text."""
    row = {
        "id": info.id,
        "sha": info.sha[:7],
        "task": info.task or "",
        "kind": "adapter" if info.is_adapter else info.architecture or "",
        "base": info.base_model or "",
        "labels": ", ".join(info.labels),
        "gates": "yes" if info.has_gates else "",
        "license": info.license or "",
        "MB": round(info.size / 1e6, 1),
    }
    return {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}


def html_row(info: ExpertInfo) -> dict[str, Any]:
    """An expert as a row of a notebook's table: as `info_row`, with many labels cut."""
    return info_row(info) | {"labels": ", ".join(lines_of([printable(label) for label in info.labels]))}


def discover(
    tags: str | Sequence[str] | None = EXPERT_TAG,
    author: str | None = None,
    base_model: str | None = None,
    task: str | None = None,
    collection: str | None = None,
    ids: Sequence[str] | None = None,
    limit: int | None = None,
    api: HfApi | None = None,
) -> Experts:
    """Finds experts and pins each to its current commit. Reads configs, but no weights.

    Args:
        tags: only repos with all of these tags. They are not required of repos in ``ids`` or ``collection``, nor of
            adapters of ``base_model``, which are found by their ``adapter_config.json``.
        author: only repos of this user or organisation.
        base_model: only experts of this base. Untagged adapters are then searched for among the repos that the Hub
            links to the base, and among all repos of ``author``.
        task: only experts with this pipeline tag, such as "text-classification".
        collection: only the models in a collection, by its slug ``owner/title-id``.
        ids: only these repos, each ``owner/name`` or ``owner/name@revision``.
        limit: maximum number of experts.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Returns:
        The experts, which `check_compatibility` can check.

    Raises:
        FusionError: no argument narrows the search, or an id or collection does not exist.
    """
    api = hub_api(api)
    if not (tags or author or base_model or collection or ids):
        raise FusionError("nothing narrows the search", hint="pass tags=, author=, base_model=, collection= or ids=")

    def wanted(info: ExpertInfo) -> bool:
        return (
            (author is None or info.id.partition("/")[0] == author)
            and (base_model is None or info.base_model == base_model)
            and (task is None or info.task == task)
        )

    def read(candidate: str | Source) -> ExpertInfo | None:
        if isinstance(candidate, Source):
            return read_info(candidate)
        if ids and candidate in ids:
            return read_info(resolve_repo(candidate, api))
        source = _read_repo(candidate, api)  # None if it no longer exists or is not accessible
        return read_info(source) if source else None

    named = [*(ids or ()), *(_list_collection(collection, api) if collection else ())]
    candidates: Iterator[str | Source] = (
        iter(named) if named or collection else _list_repos(tags, author, base_model, api)
    )
    found: list[ExpertInfo] = []
    while batch := list(islice(candidates, None if limit is None else READERS)):  # with a limit, stops early
        found += [info for info in in_parallel(read, batch, name="Reading repos") if info is not None and wanted(info)]
        if limit is not None and len(found) >= limit:
            break
    return Experts(tuple(found[:limit]))


def _list_collection(slug: str, api: HfApi) -> list[str]:
    """Ids of the models in a collection."""
    with explain_hub_errors(f"collection {slug}"):
        return [item.item_id for item in api.get_collection(slug).items if item.item_type == "model"]


def _list_repos(
    tags: str | Sequence[str] | None, author: str | None, base_model: str | None, api: HfApi
) -> Iterator[Source]:
    """Candidate repos without duplicates, the most downloaded first within each search."""
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    searches: list[Iterable[Source]] = []
    if tags or not base_model:
        searches.append(_search(api, filter=tags, author=author))
    if base_model:
        # repos whose card names the base, then adapters without a card
        searches.append(_search(api, filter=[f"base_model:{base_model}"], author=author))
        if author:
            searches.append(_search(api, author=author, holding=ADAPTER_CONFIG))
    seen: set[str] = set()
    for search in searches:
        for source in search:
            if source.name not in seen and as_commit(source.revision):  # an empty repo has no commit
                seen.add(source.name)
                yield source


def _search(api: HfApi, holding: str | None = None, **filters: Any) -> Iterator[Source]:
    """`list_models`, filtered by a file if one is given: a thousand repos per request."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    filters["sort"] = "downloads"
    with explain_hub_errors("the Hub"):
        try:
            for info in api.list_models(expand=[*DESCRIBED, "cardData"], **filters):
                if _holds(info, holding):
                    yield source_of(info, api)
        except (HfHubHTTPError, HFValidationError):
            raise
        except CARD_ERRORS:  # an invalid card of one repo, which would hide all later ones
            for info in api.list_models(expand=list(DESCRIBED), **filters):
                if _holds(info, holding) and (source := _read_repo(ModelRef(info.id, info.sha), api)):
                    yield source


def _holds(info: ModelInfo, file: str | None) -> bool:
    return file is None or any(sibling.rfilename == file for sibling in info.siblings or ())


def _read_repo(name: ModelRef | str, api: HfApi) -> Source | None:
    """One repo; None, with a warning, if it does not exist or is not accessible."""
    try:
        return resolve_repo(name, api)
    except FusionError as error:
        logger.warning("a repo was left out: %s", error)
        return None


def read_info(source: Source) -> ExpertInfo:
    """The Hub's information about a repo. Fields from files that cannot be read are empty; it never raises.

    If the Hub listed the repo without file sizes, the headers of the weights are read, whose shapes
    `check_compatibility` needs as well.
    """
    info = source.info
    assert info is not None, "folders have no ExpertInfo"
    config, adapter = _readable(source, "config.json"), _readable(source, ADAPTER_CONFIG)
    architecture = next(iter(architectures(config)), None)
    head = head_of_adapter(adapter) if source.is_adapter else None
    return ExpertInfo(
        id=info.id,
        sha=source.revision or "",
        task=info.pipeline_tag or (head.tasks[0] if head else default_task(architecture)),
        architecture=None if source.is_adapter else architecture,
        base_model=_base_of(source, adapter),
        base_revision=as_commit(revision := _text(adapter.get("revision"))) or revision,
        labels=label_names(config),
        license=_license(source.card.get("license")),
        size=_weight_bytes(source),
        downloads=info.downloads or 0,
        tags=tuple(info.tags or ()),
        is_adapter=source.is_adapter,
        has_gates=GATES_FILE in source.sizes,
        gated=bool(info.gated),
        private=bool(info.private),
    ).having_read(source)


def _readable(source: Source, file: str) -> dict[str, Any]:
    """A JSON file's content, empty if it is missing, gated or broken (`check_compatibility` reports which)."""
    try:
        return source.json(file)
    except FusionError:
        return {}


def _base_of(source: Source, adapter: dict[str, Any]) -> str | None:
    """The base named in the adapter's config, else in the card."""
    named = adapter.get("base_model_name_or_path") or source.card.get("base_model")
    return _text(named[0] if isinstance(named, list) and named else named)


def _weight_bytes(source: Source) -> int:
    """Bytes of the weight files; 0 if unknown."""
    pickled = "adapter_model" if source.is_adapter else "pytorch_model"
    files = safe_files(source) or weight_files(source.sizes, pickled, "bin")
    if known := sum(source.sizes[file] for file in files):
        return known
    try:
        if len(files) > 1:  # an index and its shards
            total = (source.json(files[0]).get("metadata") or {}).get("total_size")
            return total if isinstance(total, int) else 0
        return sum(source.size(file) for file in files)
    except (FusionError, AttributeError):  # reported by `check_compatibility`
        return 0


def _license(value: object) -> str | None:
    """A card's licence; None for several."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = _text(value)
    return text.lower() if text else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
