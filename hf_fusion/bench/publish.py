"""Results on the Hub: a data set with all cells and the report, and the numbers in the cards of fused models.

Everything is planned before anything is sent. The data set gets one commit, then each model's card one; what is there
already is not sent again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.bench.cells import ALL, CLEAN, LEADERBOARD, Cell, read_cells
from hf_fusion.bench.pages import CELLS, README_SECTION, REPORT, write_report
from hf_fusion.bench.summary import BenchSummary
from hf_fusion.errors import FusionError, suggestion
from hf_fusion.hub.client import explain_hub_errors, hub_api, same_file
from hf_fusion.hub.commits import download_file
from hf_fusion.hub.readme import add_tag, put_metadata, put_section, read_metadata
from hf_fusion.io.saving import write_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
TAGS = ("fusionbench", "hf-fusion")
LICENSE = "apache-2.0"
"""License of a dataset repo whose card has none."""
PICTURES = "pictures/"

# type of a cell's field, as it is written there -> what load_dataset makes of it
_TYPES = {
    "str": {"dtype": "string"},
    "Status": {"dtype": "string"},
    "int": {"dtype": "int64"},
    "float": {"dtype": "float64"},
    "float | None": {"dtype": "float64"},
    "tuple[float, float] | None": {"list": "float64"},
    "list[float] | None": {"list": "float64"},
    "dict[str, Any]": {"dtype": "json"},
    "dict[str, str]": {"dtype": "json"},
}
FEATURES = [{"name": row.name, **_TYPES[str(row.type)]} for row in fields(Cell)]
METADATA = {
    "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": CELLS}]}],
    "dataset_info": {"config_name": "default", "features": FEATURES},
}
_USAGE = """\
Every measurement is one row: one technique on one task. Parameters, versions and commits are JSON.

```python
from datasets import load_dataset

cells = load_dataset("{repo_id}", split="train")
```

"""


@dataclass(frozen=True)
class CardChange:
    """The README of a fused model with the numbers in it."""

    repo_id: str
    parent: str
    card: str
    changed: bool


@dataclass(frozen=True)
class ResultsPlan:
    """What publishing would do; nothing has been sent yet.

    Attributes:
        repo_id: the data set.
        exists: whether it is already there.
        private: its visibility (one that exists keeps its own).
        parent: the commit it is at now, None where it does not exist.
        card: its README as it will be.
        files: path → content, of what differs from what is there.
        stale: paths of pictures that are there and no longer in the report.
        models: changes of models' cards.
        rows: number of cells.
    """

    repo_id: str
    exists: bool
    private: bool
    parent: str | None
    card: str
    files: dict[str, bytes]
    stale: tuple[str, ...] = ()
    models: tuple[CardChange, ...] = ()
    rows: int = 0

    def summary(self) -> dict[str, Any]:
        """The plan in a few plain values, for printing."""
        return {
            "repo": self.repo_id + ("" if self.exists else " (new)"),
            "visibility": "private" if self.private else "public",
            "cells": self.rows,
            "changed": sorted(self.files),
            "deleted": list(self.stale),
            "cards": [change.repo_id for change in self.models if change.changed],
        }


@dataclass(frozen=True)
class PublishedResults:
    """The published results: the data set at a commit, and model → commit of each card."""

    repo_id: str
    sha: str
    url: str
    models: dict[str, str] = field(default_factory=dict)


def plan_results(
    cells: Sequence[Cell],
    repo_id: str,
    models: Mapping[str, str] | None = None,
    *,
    private: bool = True,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> ResultsPlan:
    """Find out what publishing results would do.

    Args:
        cells: what was measured.
        repo_id: ``owner/name`` of the data set.
        models: method, or ``method:variant``, → ``owner/name`` of the model that it made; default variant "default".
        private: visibility of a new data set; one that exists keeps its own.
        overwrite: whether the data set may lose cells that are not among these, or hold something else.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Raises:
        FusionError: the data set would lose cells, or is of something else; a model is not on the Hub or was not
            measured, a README cannot be edited, or the Hub refuses.
    """
    from huggingface_hub.hf_api import RepoFile

    api, models = hub_api(api), models or {}
    if twice := [repo for repo in models.values() if list(models.values()).count(repo) > 1]:
        raise FusionError(f"{twice[0]} is named for several methods", "name only the method that made it")
    with tempfile.TemporaryDirectory(prefix="hf-fusion-") as temporary, explain_hub_errors(repo_id):
        folder = Path(temporary)
        summary = write_report(cells, folder)
        exists = api.repo_exists(repo_id, repo_type="dataset")
        parent, tree = None, {}
        if exists:
            info = api.dataset_info(repo_id)
            parent, private = str(info.sha), bool(info.private)
            entries = api.list_repo_tree(repo_id, recursive=True, revision=parent, repo_type="dataset")
            tree = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            if not overwrite:
                _refuse_loss(cells, repo_id, tree, parent, api)
        written = (
            _read(api, repo_id, README, parent, "dataset") if README in tree else f"# {repo_id.rpartition('/')[2]}\n"
        )
        card = _data_card(written, repo_id, (folder / REPORT).read_text(encoding="utf-8"))
        write_file(folder / README, card)
        paths = [folder / name for name in (README, CELLS, LEADERBOARD)] + sorted((folder / PICTURES).glob("*.png"))
        wanted = {path.relative_to(folder).as_posix(): path for path in paths}
        changed = {
            name: path.read_bytes()
            for name, path in wanted.items()
            if name not in tree or tree[name].size != path.stat().st_size or not same_file(path, tree[name])
        }
        stale = tuple(name for name in tree if name.startswith(PICTURES) and name not in wanted)
    source = f"{api.endpoint}/datasets/{repo_id}"
    cards = tuple(_model_card(api, summary, method, model, source) for method, model in models.items())
    return ResultsPlan(repo_id, exists, private, parent, card, changed, stale, cards, len(cells))


def _refuse_loss(cells: Sequence[Cell], repo_id: str, names: Collection[str], sha: str, api: HfApi) -> None:
    """Refuses a data set of something else, and one with cells that are not among these."""
    if set(names) <= {README, ".gitattributes"}:
        return
    hint = "publish under another name, or replace it: --overwrite (overwrite=True in Python)"
    if CELLS not in names:
        raise FusionError(f"{repo_id} is not a data set of benchmark results: it has no {CELLS}", hint)
    theirs = read_cells(download_file(api, repo_id, CELLS, sha, repo_type="dataset"))
    if lost := {cell.path for cell in theirs} - {cell.path for cell in cells}:
        raise FusionError(
            f"{repo_id} has {len(lost):,} cells that are not among these, such as {min(lost)}",
            f"publish them together with these, {hint}",
        )


def push_results(planned: ResultsPlan, api: HfApi | None = None) -> PublishedResults:
    """Carry out a plan: at most one commit to each repo; none where nothing changes.

    Raises:
        FusionError: the Hub refuses, for example because another push was made since the plan.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = hub_api(api)
    repo_id = planned.repo_id
    with explain_hub_errors(repo_id):
        url = str(api.create_repo(repo_id, repo_type="dataset", private=planned.private, exist_ok=True))
        sha = planned.parent or str(api.dataset_info(repo_id).sha)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in planned.files.items()]
        operations += [CommitOperationDelete(name) for name in planned.stale]
        if operations:
            sha = api.create_commit(
                repo_id,
                operations,
                commit_message=f"{planned.rows:,} measurements",
                repo_type="dataset",
                parent_commit=sha,
            ).oid
    shas = {}
    for change in planned.models:
        shas[change.repo_id] = change.parent
        if change.changed:
            with explain_hub_errors(change.repo_id):
                shas[change.repo_id] = api.create_commit(
                    change.repo_id,
                    [CommitOperationAdd(README, change.card.encode())],
                    commit_message=f"Results of {repo_id}",
                    parent_commit=change.parent,
                ).oid
    return PublishedResults(repo_id, sha, url, shas)


# ---------------------------------------------------------------- cards


def _data_card(written: str, repo_id: str, report: str) -> str:
    """The data set's README: its metadata and our section; the rest is left alone."""
    card = put_section(written, README_SECTION, _USAGE.format(repo_id=repo_id) + report)
    given = read_metadata(card)
    card = put_metadata(card, {"license": given.get("license") or LICENSE, **METADATA})
    for tag in TAGS:
        card = add_tag(card, tag)
    return card


def _model_card(api: HfApi, summary: BenchSummary, method: str, repo_id: str, source: str) -> CardChange:
    """A model's README with the method's numbers in its ``model-index``; results from elsewhere stay."""
    with explain_hub_errors(repo_id):
        sha = str(api.model_info(repo_id).sha)
        text = _read(api, repo_id, README, sha, "model") if api.file_exists(repo_id, README, revision=sha) else ""
    metadata = read_metadata(text)
    index = metadata.get("model-index") or []
    try:
        kept = [row for row in (index[0]["results"] if index else []) if (row.get("source") or {}).get("url") != source]
        name = str(index[0].get("name", "")) if index else ""
    except (TypeError, KeyError, IndexError, AttributeError):
        raise FusionError(
            f"the model-index in the card of {repo_id} does not have the Hub's format", "correct or remove it"
        ) from None
    task_type = str(metadata.get("pipeline_tag") or "other")
    name = name or repo_id.rpartition("/")[2]
    results = [*kept, *_results(summary, method, name, task_type, source)]
    card = put_metadata(text, {"model-index": [{"name": name, "results": results}, *index[1:]]})
    return CardChange(repo_id, sha, card, card != text)


def _results(summary: BenchSummary, method: str, name: str, task_type: str, source: str) -> list[dict[str, Any]]:
    """What a method scored on clean rows, task by task, in the Hub's form."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    wanted, _, variant = method.partition(":")
    key = (wanted, variant or "default", ALL)
    found = [
        (suite, row)
        for suite in summary["suites"]
        for row in suite["rows"]
        if (row["method"], row["variant"], row["split"]) == key
        and any("score" in s for s in row["scores"].get(CLEAN, {}).values())
    ]
    if not found:
        known = sorted({row["method"] for suite in summary["suites"] for row in suite["rows"] if row["split"] == ALL})
        raise FusionError(f"these results have no scores for {method}", suggestion(method, known))
    if len(found) > 1:
        suites = ", ".join(suite["name"] for suite, _ in found)
        raise FusionError(
            f"{method} was measured on {suites}, with a different model on each", "publish the cells of one suite alone"
        )
    suite, row = found[0]
    measured = [(task, row["scores"][CLEAN].get(task["name"], {})) for task in suite["tasks"]]
    given = [
        EvalResult(
            task_type=task_type,
            dataset_type=task["name"],
            dataset_name=f"{task['name']} ({suite['title']})",
            dataset_split="test",
            dataset_args={"n": score["n"]},
            metric_type=task["metric"],
            metric_name=f"{task['metric']} (mean of {len(row['seeds'])} seeds)"
            if len(row["seeds"]) > 1
            else task["metric"],
            metric_value=round(score["score"], 4),
            source_name="FusionBench by hf_fusion",
            source_url=source,
        )
        for task, score in measured
        if "score" in score
    ]
    return list(eval_results_to_model_index(name, given)[0]["results"])


def _read(api: HfApi, repo_id: str, name: str, sha: str | None, repo_type: str) -> str:
    """A text file of a repo, every byte of it."""
    content = download_file(api, repo_id, name, sha, repo_type=repo_type).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FusionError(f"{name} of {repo_id} is not UTF-8 ({error})", "save it as UTF-8") from None
